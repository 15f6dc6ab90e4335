"""Training on stored moments: the same gradients, the same held-out measure, safe to interrupt, refused where wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvopt.base.loading import Base
from kvopt.base.prefix import prefill
from kvopt.config.document import load_config
from kvopt.errors import InputError
from kvopt.learning.descent import context_loss
from kvopt.measure import moments as stored_moments
from kvopt.measure.moments import StoredMoments
from kvopt.run import stages
from kvopt.run.run import Run
from tests.jobs import artefacts, run_job, stages_in, write_job
from tests.tasks import Task, make_task

MOMENTS = ("reference.storage=moments",)


@pytest.fixture
def task(llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(stored_moments, "ROWS_PER_FILE", 5)
    return make_task(llama, tmp_path)


def made(task: Task, rows: slice = slice(None)) -> StoredMoments:
    moments = StoredMoments(task.reference, [row.example_id for row in task.encoded.rows[rows]])
    moments.build(task.base.head)
    return moments


def test_loss_and_gradient_are_those_of_the_hidden_states(task: Task) -> None:
    with torch.no_grad():
        start = prefill(task.base, ids=torch.tensor(task.encoded.prefix)).stack()
    tensor = (start + 0.1 * torch.randn_like(start)).requires_grad_()
    rows = [task.encoded.rows[i] for i in (7, 0, 11, 4)]
    results = []
    for moments in (None, made(task)):
        loss = context_loss(task.base, "kv", tensor, rows, task.reference, moments)
        (gradient,) = torch.autograd.grad(loss, tensor)
        results.append((loss.item(), gradient))
    assert results[1][0] == pytest.approx(results[0][0], abs=2e-6)
    assert results[0][0] > 1e-4
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-2, atol=1e-3 * results[0][1].abs().max().item())


def test_an_interrupted_build_ends_in_the_same_bytes_and_another_set_of_rows_replaces_it(task: Task) -> None:
    made(task)
    files = sorted(task.reference.folder.glob("moments-*"))
    before = [path.read_bytes() for path in files]
    assert len(files) == 3
    stamp = files[1].stat().st_mtime_ns
    files[0].write_bytes(before[0][:-5])
    files[2].unlink()
    with pytest.raises(InputError, match="missing, damaged"):
        StoredMoments(task.reference, [row.example_id for row in task.encoded.rows]).of(["train:0"], "cpu")
    made(task)
    assert [path.read_bytes() for path in files] == before
    assert files[1].stat().st_mtime_ns == stamp
    made(task, slice(0, 4))
    assert sorted(task.reference.folder.glob("moments-*")) == files[:1]


def test_a_run_on_moments_learns_what_a_run_on_hidden_states_learns_and_scores_it_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    of = StoredMoments.of
    monkeypatch.setattr(StoredMoments, "of", lambda self, ids, device: asked.append(len(ids)) or of(self, ids, device))
    config = write_job(tmp_path / "job")
    plain = run_job(config, tmp_path / "a")
    assert asked == []
    board = run_job(config, tmp_path / "b", MOMENTS)
    assert asked == [4] * (6 + 3 + 3)  # every training step of the three contexts
    assert "reference/moments" in stages_in(tmp_path / "b")
    for ours, theirs in zip(board["contexts"], plain["contexts"], strict=True):
        assert ours["name"] == theirs["name"]
        assert ours["gold_nll"] == pytest.approx(theirs["gold_nll"], abs=1e-3)
        assert ours["kl_forward"]["mean"] == pytest.approx(theirs["kl_forward"]["mean"], rel=2e-2, abs=1e-5)
    again = artefacts(tmp_path / "b")
    run_job(config, tmp_path / "b", MOMENTS)
    assert artefacts(tmp_path / "b") == again
    assert stages_in(tmp_path / "b").count("reference/moments") == 1


def test_changing_the_storage_learns_again_and_leaves_nothing_behind(tmp_path: Path) -> None:
    config = write_job(tmp_path / "job")
    run_job(config, tmp_path / "a", MOMENTS)
    run_job(config, tmp_path / "b")
    run_job(config, tmp_path / "a")
    assert stages_in(tmp_path / "a").count("contexts/kv-8") == 2
    assert artefacts(tmp_path / "a") == artefacts(tmp_path / "b")


def test_a_base_that_caps_its_logits_is_refused_before_any_work(tmp_path: Path, llama: Base, monkeypatch) -> None:
    config, base_dir = load_config(write_job(tmp_path / "job"), MOMENTS)
    capped = SimpleNamespace(head=replace(llama.head, softcap=30.0), identity=llama.identity, dtype=llama.dtype)
    run = Run(config, base_dir, tmp_path / "out", say=lambda line: None, bars=False)
    monkeypatch.setattr(stages, "reference_key", lambda *args: pytest.fail("work was begun"))
    task = SimpleNamespace(base=capped, config=config)
    with pytest.raises(InputError, match=r"softcap.*storage: hidden"):
        stages.make_reference(task, run.at)


def test_long_outputs_are_cut_into_files_of_fewer_rows_and_give_the_same(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(task)
    ids = [task.encoded.rows[i].example_id for i in (9, 2, 4)]
    expected = whole.of(ids, "cpu")
    monkeypatch.setattr(stored_moments, "TOKENS_PER_FILE", 1 + max(task.reference.counts(ids)))
    cut = made(task)
    assert cut.key != whole.key
    assert len(list(task.reference.folder.glob("moments-*"))) > len(task.encoded.rows) // 5 + 1
    torch.testing.assert_close(cut.of(ids, "cpu").mean_weight, expected.mean_weight)
    torch.testing.assert_close(cut.of(ids, "cpu").entropy, expected.entropy)
    whole._files.clear()
    with pytest.raises(InputError, match="missing, damaged or another's"):
        whole.of(ids, "cpu")
