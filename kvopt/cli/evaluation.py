"""Commands that measure models: evaluate, study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvopt.cli.common import ConfigPath, Jobs, Json, Out, Ray, Sets, next_command, open_run, print_json, workers_of
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
            help="Measure only under this context: one of the config's, a group (held-out, templates, learned), or one"
            " as for kvopt score; may be repeated.",
        ),
    ] = None,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure the base and the trained students on the validation rows: answers, likelihoods, forgetting.

    After an interruption, give the same command again to continue.
    """
    run = open_run(config, sets, out)
    from kvopt.train.commands import evaluate_all
    from kvopt.train.evaluation.tables import tables

    with run.opened():
        documents = evaluate_all(run, student or (), context or ())
    renew_page(run.directory.path)
    if as_json:
        print_json({"students": [document.to_json() for document in documents]})
        return
    show(tables(documents))
    print(f"run directory: {run.directory.path}")
    if run.config.study is not None:
        next_command("study", config, sets=sets, out=out)
    elif run.config.students and all(document.student is None for document in documents):
        next_command("train", config, sets=sets, out=out)
    elif (run.directory / "leaderboard.json").is_file():
        next_command("compare", run.directory.path)
    else:
        next_command("run", config, sets=sets, out=out)


def study(
    config: ConfigPath,
    jobs: Jobs = None,
    ray: Ray = None,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compare students: train each with every seed at an equal budget, evaluate them, and report the differences.

    Writes study.json, the leaderboard of the contexts and the report page. After an interruption, give the same command
    again to continue, with any --jobs.
    """
    workers = workers_of(jobs, ray)
    run = open_run(config, sets, out)
    from kvopt.train.arms import study_arms
    from kvopt.train.commands import conduct_study
    from kvopt.train.early_checks import check_evaluation
    from kvopt.train.study.tables import tables
    from kvopt.train.training import check_student

    for arm in study_arms(run.config):  # a mistake in the study is reported before a model is loaded
        check_student(run.inputs, arm.config)
    check_evaluation(run.inputs)
    with run.opened():
        run.run()  # the leaderboard of the contexts, which the page of a study shows too
        document = conduct_study(run, workers=workers)
    leave_page(run.directory.path)
    if as_json:
        print_json(document.to_json())
        return
    show(tables(document))
    print(run.directory / "study.json")
    next_command("compare", run.directory.path)


def show(views: list[Any]) -> None:
    from kvopt.console.tables import console

    out = console()
    for view in views:
        renderable: RenderableType = view
        out.print(renderable)
