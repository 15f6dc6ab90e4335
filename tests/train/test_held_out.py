"""Gold NLL on held-out rows while a student is trained: what is measured, when, and what is shown of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvopt.base.loading import Base
from kvopt.config.document import load_config
from kvopt.documents.student_record import StudentRecord
from kvopt.run.run import Run
from kvopt.train.commands import train_students
from kvopt.train.student import load_student
from tests.jobs import write_job


def trained(folder: Path, *students: dict[str, Any]) -> tuple[Run, list[StudentRecord], list[str]]:
    """A run with its students, their records, and the lines that were said."""
    common = {"batch_size": 4, "report_to": [], "learning_rate": 0.01}
    config = write_job(folder, lambda c: c.update(students=[common | student for student in students]))
    lines: list[str] = []
    settings, base_dir = load_config(config, ())
    run = Run(settings, base_dir, folder / "out", say=lines.append, bars=False)
    records = train_students(run)
    assert records is not None
    return run, records, lines


@torch.no_grad()
def plain_nll(model: Base, run: Run, prefix: tuple[int, ...]) -> float:
    """By plain transformers on whole prompts of the selection rows."""
    total, count = 0.0, 0
    for row in run.task().rows("selection").rows:
        ids = torch.tensor([[*prefix, *row.body, *row.gold]])
        logits = model.model(input_ids=ids).logits[0].double().log_softmax(-1)
        total -= sum(float(logits[-len(row.gold) - 1 + i, token]) for i, token in enumerate(row.gold))
        count += len(row.gold)
    return total / count


def test_it_is_that_of_the_selection_rows_under_the_original(tmp_path: Path) -> None:
    student = {"name": "s", "contexts": ["none", "original"], "steps": 7}
    run, [record], lines = trained(tmp_path, student)
    assert [point.step for point in record.held_out] == [0, 2, 4, 6, 7]
    task, prefix = run.task(), run.task().encoded.prefix
    learned = load_student(tmp_path / "out" / "students" / "s", task.base)
    assert record.held_out[0].gold_nll == pytest.approx(plain_nll(task.base, run, prefix), abs=1e-4)
    assert record.held_out[-1].gold_nll == pytest.approx(plain_nll(learned, run, prefix), abs=1e-4)
    assert record.held_out[-1].gold_nll < record.held_out[0].gold_nll - 0.01
    assert "student s: 7 steps of 4 rows under none, original" in lines


@pytest.mark.parametrize("context", ["kv-8", "none", "best-mutations:1"])
def test_a_student_of_other_contexts_is_measured_under_the_first(tmp_path: Path, context: str) -> None:
    run, [record], _ = trained(tmp_path, {"name": "s", "contexts": [context], "steps": 1})
    assert [point.step for point in record.held_out] == [0, 1]
    [named] = run.stored_contexts(record.contexts[0].name)
    expected = run.score(named, "selection").gold_nll.mean
    assert record.held_out[0].gold_nll == pytest.approx(expected, abs=1e-4)


def test_a_log_gets_it_and_not_the_loss_of_a_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvopt.console.progress.SECONDS_BETWEEN_LINES", 0.0)
    _, [record], lines = trained(tmp_path, {"name": "s", "contexts": ["original"], "steps": 3, "log_every": 1})
    of_steps = [line for line in lines if line.startswith("s step ")]
    for point in record.held_out[:-1]:
        told = f"s step {point.step}/3, held-out NLL {point.gold_nll:.4f}"
        assert any(line.startswith(told) for line in of_steps), told
    assert not [line for line in of_steps if "loss" in line or "train" in line]
