"""Commands that measure models: evaluate, study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvopt.cli.common import ConfigPath, Json, Out, Sets, console, open_run, print_json
from kvopt.cli.report import leave_page, renew_page

if TYPE_CHECKING:
    from rich.console import RenderableType


def evaluate(
    config: ConfigPath,
    student: Annotated[
        list[str] | None,
        typer.Option("--student", metavar="NAME", help="A trained student, or base; may be repeated. Default: all."),
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(
            "--context",
            metavar="SPEC",
            help="Only under this context: one of the config's, a group (held-out, templates, learned), or as in "
            "kvopt score; may be repeated.",
        ),
    ] = None,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure the base and the trained students on the validation rows: answers, likelihoods, forgetting. Run it again
    to go on after an interruption.
    """
    run = open_run(config, sets, out)
    from kvopt.train.commands import evaluate_all
    from kvopt.train.evaluation.tables import tables
    from kvopt.train.launch import one_process

    one_process("an evaluation")
    with run.opened():
        documents = evaluate_all(run, student or (), context or ())
    renew_page(run.directory.path)
    if as_json:
        print_json({"students": [document.to_json() for document in documents]})
        return
    show(tables(documents))
    print(f"run directory: {run.directory.path}")


def study(config: ConfigPath, sets: Sets = None, out: Out = None, as_json: Json = False) -> None:
    """Train every student with every seed at an equal budget, evaluate and compare them; writes study.json, the
    leaderboard of their contexts and the page. Run it again to go on after an interruption.
    """
    run = open_run(config, sets, out)
    from kvopt.train.arms import study_arms
    from kvopt.train.commands import conduct_study
    from kvopt.train.launch import one_process
    from kvopt.train.stages import check_student
    from kvopt.train.study.tables import tables
    from kvopt.train.validate import check_evaluation

    one_process("a study")
    for arm in study_arms(run.config):  # a fault in the grid is told before a model is loaded
        check_student(run.inputs, arm.config)
    check_evaluation(run.inputs)
    with run.opened():
        run.run()  # the leaderboard of the contexts, which the page of a study shows too
        document = conduct_study(run)
    leave_page(run.directory.path)
    if as_json:
        print_json(document.to_json())
        return
    show(tables(document))
    print(run.directory / "study.json")


def show(views: list[Any]) -> None:
    out = console()
    for view in views:
        renderable: RenderableType = view
        out.print(renderable)
