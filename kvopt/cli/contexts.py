"""Commands about contexts: run, mutate, score, optimize, inspect, clean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvopt.cli.common import (
    ConfigPath,
    Json,
    Out,
    Sets,
    next_command,
    next_export,
    next_of_board,
    open_run,
    print_json,
    show_board,
)
from kvopt.cli.growing_board import growing_board
from kvopt.cli.plans import say_plan
from kvopt.cli.report import leave_page
from kvopt.cli.students import prepared, show_students
from kvopt.errors import counted


def run_all(config: ConfigPath, sets: Sets = None, out: Out = None, as_json: Json = False) -> None:
    """Find mutations, learn contexts, score all of them, write the leaderboard and the report, train the students.

    Stages that are up to date are not run again. After an interruption, give the same command again to continue.
    """
    run = open_run(config, sets, out)
    train_students = prepared(run)
    with run.opened():
        say_plan(run)
        with growing_board(run.directory.path) as show:
            board = run.run(show)
        records = train_students()
    show_board(board, run.directory.path, as_json, records)
    if not as_json:
        show_students(records, run.directory.path, False)
    leave_page(run.directory.path)
    if records and not as_json:
        next_command("evaluate", config, sets=sets, out=out)
    elif not as_json:
        next_of_board(board, run.directory.path)


def mutate(config: ConfigPath, sets: Sets = None, out: Out = None, as_json: Json = False) -> None:
    """Sample other wordings (mutations) of the template.

    mutations.jsonl gets every candidate, with the reason if it was rejected.
    """
    run = open_run(config, sets, out)
    with run.opened():
        mutations = run.mutations()
    from kvopt.mutate.mutation import counts_by_reason

    counts = counts_by_reason(mutations)
    if as_json:
        print_json({"counts": counts, "accepted": [m.to_json() for m in mutations if m.accepted]})
        return
    for reason, count in counts.items():
        print(f"{count:6d}  {reason}")
    print(run.directory / "mutations.jsonl")
    next_command("run", config, sets=sets, out=out)


def score(
    config: ConfigPath,
    context: Annotated[
        list[str] | None,
        typer.Option(
            "--context",
            help="What to score: original, none, text:FILE, mutations:FILE, or a context's name or folder; may be"
            " repeated. Default: original and none.",
        ),
    ] = None,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Score contexts on the validation rows: forward KL, gold NLL, top-1 agreement.

    Forward KL is the divergence from the model under the template, in nats per token of the gold outputs (the expected
    answers); 0 means the same behaviour. Gold NLL is the loss on these tokens. Top-1 agreement is the share of them for
    which the most likely token is the template's. A wording of your own (text:FILE) also takes its place on the run's
    leaderboard and page.
    """
    run = open_run(config, sets, out)
    from kvopt.report.choice import recommended
    from kvopt.run.leaderboard import build_leaderboard

    specs = context or ["original", "none"]
    with run.opened():
        of_specs = [run.stored_contexts(spec) for spec in specs]
        contexts = [context for of_spec in of_specs for context in of_spec]
        measures = run.measures()
        entries = [measures.entry(context) for context in run.at.progress.over("scoring", contexts)]
        board = build_leaderboard(run.task(), entries, [], measures.noise_floor)
        landed = run.put_on_board(contexts)
    if as_json:
        print_json({**board.to_json(), "contexts": [entry.row().to_json() for entry in entries]})
        return
    show_board(board, run.directory.path, False)
    if landed is not None:
        leave_page(run.directory.path)
    own = {c.name for spec, of_spec in zip(specs, of_specs, strict=True) for c in of_spec if spec == c.name}
    if recommended(board) in own:
        next_of_board(board, run.directory.path)
    else:
        next_command("run", config, sets=sets, out=out)


def optimize(
    config: ConfigPath,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Learn only this context; may be repeated.")
    ] = None,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Learn the soft prompts and KV caches of the config, by gradient descent on the KL to the template."""
    run = open_run(config, sets, out)
    from kvopt.run.stages import learning_history

    with run.opened():
        learned = run.learned(only or ())
        rows = [
            {
                "name": c.name,
                "kind": c.kind,
                "tokens": c.tokens,
                **run.score(c).to_json(),
                "history": [point.to_json() for point in learning_history(c.name, run.at)],
            }
            for c in learned
        ]
    if as_json:
        print_json({"contexts": rows})
        return
    for row in rows:
        folder = run.directory / "contexts" / row["name"]
        kl = row["kl_forward"]["mean"]
        curve = ", ".join(f"{point['step']}: {point['held_out_kl']:.4f}" for point in row["history"])
        print(f"{row['name']}: {counted(row['tokens'], row['kind'] + ' slot')}, forward KL {kl:.4f}, {folder}")
        print(f"  held-out KL by step: {curve}")
    if rows:
        best = min(rows, key=lambda row: float(row["kl_forward"]["mean"]))
        next_export(run.directory.path, best["name"], best["kind"])
    else:
        next_command("config")


def inspect(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="The folder of a context, an export or a student, or a run directory."),
    ],
    as_json: Json = False,
) -> None:
    """Say what a context folder holds, for which model, how good it is, and how to use it.

    Of a run directory: what it holds, and what it has put aside because the config no longer names it, or because what
    it depends on changed.
    """
    from kvopt.export.inspection import describe, describe_text

    facts = describe(folder)
    if as_json:
        print_json(facts)
    else:
        print(describe_text(facts))


def clean(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what a run directory has put aside: results that its config no longer names, or whose inputs changed.

    Nothing else deletes them. What the config names stays.
    """
    from kvopt.errors import InputError
    from kvopt.export.inspection import MANIFEST, describe, kept_lines
    from kvopt.run.directory import RunDirectory

    if not (folder / MANIFEST).is_file():
        fix = "kvopt run writes one, runs/NAME by default"
        raise InputError("is not a run directory", where=str(folder), fix=fix)
    directory = RunDirectory(folder)
    with directory.locked():
        facts = describe(folder)["kept"]
        for result in [] if dry_run else directory.kept.results():
            directory.kept.remove(result)
    if as_json:
        print_json({"deleted": not dry_run, "kept": facts})
        return
    print("\n".join(kept_lines(facts)))
    if facts:
        print("nothing is deleted: leave out --dry-run" if dry_run else "all of this is deleted")
