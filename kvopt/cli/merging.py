"""Commands on trained students: lines, soup."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvopt.cli.common import Json, Sets, next_command, print_json, say
from kvopt.errors import InputError

if TYPE_CHECKING:
    from kvopt.base.loading import StoredBase
    from kvopt.documents.student_record import StudentMerge

NewFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write the new student to.")]
OfBase = Annotated[
    str | None, typer.Option("--base", metavar="BASE", help="The base model (default: the one that the student names).")
]


def lines(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="The folder of a student, LoRA or full.")],
    out: NewFolder,
    alpha: Annotated[float, typer.Option(min=0, help="The factor on the update of the first layer.")] = 0.5,
    beta: Annotated[float, typer.Option(help="How much larger the factor is at the last layer.")] = 0.5,
    base: OfBase = None,
    as_json: Json = False,
) -> None:
    """Scale a student's update by depth (LiNeS), which reduces forgetting.

    The update of each layer is multiplied by alpha + beta * layer / (layers - 1).
    """
    from kvopt.train.merging.folders import check_new, scaled_student

    check_new(out)
    merge = scaled_student(student, _base_of([student], base), out, alpha=alpha, beta=beta)
    _tell(merge, out, as_json)


def soup(
    students: Annotated[list[Path], typer.Argument(metavar="STUDENT...", help="Student folders, all of one base.")],
    out: NewFolder,
    rank: Annotated[
        int | None, typer.Option(min=1, help="For LoRA: cut the average to this rank (default: the sum of the ranks).")
    ] = None,
    greedy: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.yaml",
            help="Keep only students that lower the gold NLL (loss) of this config's selection rows.",
        ),
    ] = None,
    context: Annotated[str, typer.Option(help="With --greedy: the context of these rows.")] = "original",
    sets: Sets = None,
    base: OfBase = None,
    as_json: Json = False,
) -> None:
    """Average several students into one: all of them, or those that improve it (--greedy).

    For LoRA students the updates B A are averaged, not the factors A and B.
    """
    from kvopt.train.merging import folders

    folders.check_new(out)
    if len(students) < 2:
        raise InputError("a soup needs two or more students", where="STUDENT", fix="name another student folder")
    loaded = _base_of(students, base)
    if greedy is None:
        merge = folders.soup(students, loaded, out, rank=rank)
    else:
        measure = _gold_nll_of(greedy, sets, context, loaded)
        merge = folders.best_soup(students, loaded, out, measure, rank=rank)
    _tell(merge, out, as_json)


def _base_of(students: list[Path], base: str | None) -> StoredBase:
    """The base of all of them, which is not loaded."""
    from kvopt.base.loading import stored_base
    from kvopt.config.model import ModelConfig
    from kvopt.train.student import read_student_record

    name = base
    for folder in students:
        record = read_student_record(folder)
        if record is None and not folder.is_dir():
            raise InputError(
                f"no such folder in {folder.parent.resolve()}", where=str(folder), fix="give a folder from students/"
            )
        name = name or (record.base.name if record and record.base else None)
    if name is None:
        raise InputError("does not say what its base is", where=str(students[0]), fix="give --base")
    return stored_base(ModelConfig(base=name), say=say)


def _gold_nll_of(config: Path, sets: list[str] | None, context: str, base: StoredBase) -> Any:
    """Gold NLL of a student folder on the selection rows of a config, whose base must be the students' own."""
    from kvopt.cli.common import open_run
    from kvopt.train.gold import gold_nll
    from kvopt.train.student import load_student

    run = open_run(config, sets, None)
    task = run.task()
    for what, digest in base.identity.items():
        if task.base.identity.get(what) != digest:
            fix = "give the config that the students were trained with"
            raise InputError(f"its base differs from the students' in its {what}", where=str(config), fix=fix)
    named = run.stored_contexts(context)
    if len(named) != 1:
        raise InputError("names more than one context", where=f"--context {context}", fix="name one")
    rows = task.rows_for(named[0], "selection")

    def measure(folder: Path) -> float:
        value = gold_nll(load_student(folder, task.base), named[0], rows, batch_size=run.config.score.batch_size).mean
        say(f"gold NLL {value:.4f}")
        return value

    return measure


def _tell(merge: StudentMerge, out: Path, as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(out), **merge.to_json()})
        return
    names = ", ".join(part.name for part in merge.of)
    lost = "" if merge.lost is None else f", {merge.lost:.2%} of the update's norm lost"
    rank = "" if merge.rank is None else f", rank {merge.rank}{lost}"
    value = "" if merge.value is None else f", gold NLL {merge.value:.4f}"
    print(f"{out}: {merge.by} of {names}{rank}{value}")
    next_command("inspect", out)
