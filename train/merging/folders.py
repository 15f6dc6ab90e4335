"""LiNeS and soups on student folders: read, check against the base, write one new student folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from kvopt.base.loading import StoredBase
from kvopt.documents.student_record import MeasuredSoup, MergedStudent, StudentFacts, StudentMerge
from kvopt.errors import InputError
from kvopt.train.merging.lines import scale_adapter, scaled
from kvopt.train.merging.lora_adapter import CONFIG, Adapter, average, read_adapter, truncate, write_adapter
from kvopt.train.merging.soup import average_tensors, greedy_soup
from kvopt.train.merging.weight_files import StoredWeights, write_weights
from kvopt.train.student import check_student, write_student_folder


def scaled_student(folder: Path, base: StoredBase, out: Path, *, alpha: float, beta: float) -> StudentMerge:
    """Write the student of ``folder`` with its update scaled by depth (LiNeS) to ``out``; returns its record.

    Args:
        folder: a student folder, LoRA or full.
        base: the base that it was trained from.
        out: a folder that is not there yet.

    Raises:
        InputError: no student, another base, or ``out`` is there.
    """
    check_new(out)
    provenance = StudentMerge(by="lines", alpha=alpha, beta=beta, of=[_origin(folder, base)])
    if is_lora(folder):
        _write_lora(scale_adapter(read_adapter(folder), base.layers, alpha, beta), base, out, provenance)
    else:
        student, start = StoredWeights.of(folder), StoredWeights.of(base.folder)

        def scaled_tensor(name: str) -> Tensor:
            return scaled(name, student[name], student.like(name, start), base.layers, alpha, beta)

        _write(out, base, "full", provenance, lambda place: write_weights(student, scaled_tensor, place))
    return provenance


def soup(folders: Sequence[Path], base: StoredBase, out: Path, *, rank: int | None = None) -> StudentMerge:
    """Write the uniform average of students to ``out``; returns its record.

    Args:
        folders: student folders of one method over ``base``.
        out: a folder that is not there yet.
        rank: LoRA alone: cut the average back to this rank by SVD; the record's ``lost`` is the share of the update's
            Frobenius norm that went. None keeps it exact, at the sum of the ranks.

    Raises:
        InputError: no student, another base, students of both methods, a rank for full students, or ``out`` is there.
    """
    check_new(out)
    return _mix(folders, base, out, rank, StudentMerge(by="soup", of=[]))


def best_soup(
    folders: Sequence[Path],
    base: StoredBase,
    out: Path,
    measure: Callable[[Path], float],
    *,
    rank: int | None = None,
    higher_is_better: bool = False,
) -> StudentMerge:
    """Write the greedy soup of students to ``out``; returns its record with every soup that was measured.

    Args:
        measure: the validation metric of a student folder.
        higher_is_better: False for a loss, the default.

    The rest as in :func:`soup`.
    """
    check_new(out)
    _one_method(folders)

    def soup_value(members: Sequence[int]) -> float:
        with tempfile.TemporaryDirectory() as place:
            mixed = Path(place) / "soup"
            _mix([folders[i] for i in members], base, mixed, rank, StudentMerge(by="soup", of=[]))
            return measure(mixed)

    chosen = greedy_soup(len(folders), soup_value, higher_is_better=higher_is_better)
    tried = [MeasuredSoup.model_validate(one) for one in chosen.tried]
    provenance = StudentMerge(by="greedy soup", value=chosen.value, tried=tried, of=[])
    return _mix([folders[i] for i in chosen.members], base, out, rank, provenance)


def _mix(
    folders: Sequence[Path], base: StoredBase, out: Path, rank: int | None, provenance: StudentMerge
) -> StudentMerge:
    """Write the average of ``folders`` to ``out``; ``provenance`` says how they were chosen, and is filled in."""
    provenance.of = [_origin(folder, base) for folder in folders]
    if _one_method(folders) == "lora":
        adapter = average([read_adapter(folder) for folder in folders], [1 / len(folders)] * len(folders))
        provenance.rank = adapter.config["r"]
        if rank is not None:
            adapter, provenance.lost = truncate(adapter, rank)
            provenance.rank = rank
        _write_lora(adapter, base, out, provenance)
    else:
        if rank is not None:
            raise InputError("full students have no rank", where="--rank", fix="leave it out")
        students = [StoredWeights.of(folder) for folder in folders]
        _check_alike(students)

        def mean(name: str) -> Tensor:
            return average_tensors([student[name] for student in students])

        _write(out, base, "full", provenance, lambda place: write_weights(students[0], mean, place))
    return provenance


def is_lora(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def check_new(out: Path) -> None:
    """Raises InputError when ``out`` is there: nobody's student is written over."""
    if out.exists():
        raise InputError("already exists", where=str(out), fix="choose another --out")


def _one_method(folders: Sequence[Path]) -> str:
    lora = [is_lora(folder) for folder in folders]
    if len(set(lora)) == 2:
        first, other = folders[lora.index(True)], folders[lora.index(False)]
        what = f"{first} is a LoRA student and {other} a full one; a soup needs students of one kind"
        raise InputError(what, fix="leave one of them out")
    return "lora" if lora[0] else "full"


def _origin(folder: Path, base: StoredBase) -> MergedStudent:
    name, digest = check_student(folder, base)
    return MergedStudent(folder=folder.name, name=name, weights_sha256=digest)


def _check_alike(students: Sequence[StoredWeights]) -> None:
    """Raises InputError where the files of one student hold other tensors than those of the first."""
    first = students[0]
    for other in students[1:]:
        if wrong := sorted(set(first) ^ set(other)):
            what = f"its tensors are not those of {first.folder}, first {wrong[0]}"
            raise InputError(what, where=str(other.folder), fix="leave it out")


def _write_lora(adapter: Adapter, base: StoredBase, out: Path, provenance: StudentMerge) -> None:
    changed = adapter.with_modules(adapter.modules, base_model_name_or_path=base.name, inference_mode=True)
    _write(out, base, "lora", provenance, lambda place: write_adapter(changed, place))


def _write(out: Path, base: StoredBase, method: str, provenance: StudentMerge, write: Callable[[Path], None]) -> None:
    write_student_folder(out, base, name=out.name, method=method, record=StudentFacts(made=provenance), write=write)
