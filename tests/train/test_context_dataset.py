"""Rows under many wordings for training loops of others: items, schedules, batches, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

from kvopt.cli import app
from kvopt.errors import InputError
from kvopt.task.examples import Example
from kvopt.task.seam import Encoder
from kvopt.task.template import Template
from kvopt.train import ContextCollator, ContextDataset
from tests.jobs import rows, run_job, write_job
from tests.tiny import TOKENIZERS, tiny_tokenizer

WORDINGS = {
    "original": [{"role": "user", "content": "Sort the message. {{text}}"}],
    "short": [{"role": "user", "content": "Label: {{text}}"}],
    "long": [{"role": "user", "content": "Read the request twice and name its label.\n{{text}}"}],
}
PLAIN = {name: f"{messages[0]['content']}\n" for name, messages in WORDINGS.items()}


def made(contexts: Any = None, count: int = 12, tokenizer: str = "chatml", **settings: Any) -> ContextDataset:
    return ContextDataset(rows(count), contexts or WORDINGS, tiny_tokenizer(tokenizer), **settings)


def wordings(data: ContextDataset) -> list[int]:
    return [data.meets(i)[1] for i in range(len(data))]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_items_are_the_ids_and_the_gold_of_the_token_seam(tokenizer: str) -> None:
    contexts = PLAIN if tokenizer == "plain" else WORDINGS
    data = made(contexts, tokenizer=tokenizer)
    encoder = Encoder(tiny_tokenizer(tokenizer))
    for number, (name, source) in enumerate(contexts.items()):
        template = Template.from_text(source) if isinstance(source, str) else Template.from_messages(source)
        for i, row in enumerate(rows(12)):
            prompt, _, gold = encoder.prompt_and_gold(template, Example("", {"text": row["text"]}, row["output"], ""))
            item = data.item(i, number)
            assert item["input_ids"] == [*prompt, *gold], name
            assert item["labels"] == [-100] * len(prompt) + [*gold]


def test_each_row_meets_another_wording_from_epoch_to_epoch_by_weight() -> None:
    data = made(weights={"short": 6}, count=20)
    epochs = []
    for epoch in range(30):
        data.begin(epoch, 0, 4)
        epochs.append(wordings(data))
    assert [data.meets(i)[0] for i in range(len(data))] == list(range(20)), "an index is a row"
    assert len({tuple(epoch) for epoch in epochs}) == 30
    share = sum(epoch.count(1) for epoch in epochs) / 600
    assert share == pytest.approx(6 / 8, abs=0.06)
    data.begin(3, 0, 4)
    assert wordings(data) == epochs[3], "it depends on seed, epoch and row alone"
    assert data[7] == data.item(7, epochs[3][7])


def test_all_rows_of_k_steps_meet_one_wording() -> None:
    data = made(schedule={"kind": "resample", "every": 2}, count=20, seed=1)
    data.begin(0, 0, 4)
    lengths = [len(data[i]["input_ids"]) for i in range(20)]
    met = [next(c for c in range(3) if len(data.item(i, c)["input_ids"]) == n) for i, n in enumerate(lengths)]
    steps = [met[i : i + 4] for i in range(0, 20, 4)]
    assert all(len(set(step)) == 1 for step in steps)
    assert steps[0][0] == steps[1][0]
    assert steps[2][0] == steps[3][0]
    assert [step[0] for step in steps] == [data.stream.context(step, ()) for step in range(5)]
    assert steps[0][0] != steps[2][0]
    data.begin(0, 3, 4)  # resumed in the middle: as it would have been
    assert [data.item(i, steps[3][0]) for i in range(4)] == [data[i] for i in range(4)]
    later = [data.stream.context(step, ()) for step in range(0, 200, 2)]
    assert set(later) == {0, 1, 2}


def test_expanded_an_epoch_is_every_row_under_every_wording_as_often_as_it_weighs() -> None:
    data = made(schedule="expand", weights={"long": 2}, count=5)
    assert len(data) == 5 * 4
    met = [data.meets(i) for i in range(len(data))]
    assert sorted(met) == sorted((row, context) for row in range(5) for context in (0, 1, 2, 2))


def test_a_datasets_data_set_is_wrapped_and_gives_one_for_trl() -> None:
    plain, wrapped = made(), ContextDataset(Dataset.from_list(rows(12)), WORDINGS, tiny_tokenizer("chatml"))
    for epoch in (0, 1):
        for data in (plain, wrapped):
            data.begin(epoch, 0, 4)
        assert [plain[i] for i in range(12)] == [wrapped[i] for i in range(12)]
    view = wrapped.for_trl()
    wrapped.begin(2, 0, 4)
    plain.begin(2, 0, 4)
    assert view[:] == {key: [plain[i][key] for i in range(12)] for key in ("input_ids", "labels")}
    assert view.shuffle(seed=1)[0] in [plain[i] for i in range(12)]


def test_worker_processes_see_the_epoch() -> None:
    data = made()
    collate = ContextCollator.of(data.tokenizer)
    loader = torch.utils.data.DataLoader(
        data, batch_size=12, num_workers=1, persistent_workers=True, collate_fn=collate
    )
    for epoch in (0, 1, 2):
        data.begin(epoch, 0, 12)
        (batch,) = loader
        assert torch.equal(batch["labels"], collate([data[i] for i in range(12)])["labels"])


def test_batches_are_padded_on_the_right() -> None:
    items = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = ContextCollator(pad_id=9, multiple=4)(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [8, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert ContextCollator.of(tiny_tokenizer("plain")).pad_id == tiny_tokenizer("plain").eos_token_id


def test_without_a_callback_that_tells_the_time_it_stops() -> None:
    data = made(count=8)
    for _ in range(10):
        data[0]
    with pytest.raises(InputError, match=r"nothing tells the data set when \(give the trainer the callback ContextC"):
        data[0]
    data.set_epoch(1)  # as accelerate does in one process
    assert [data[i] for i in range(8)] * 9
    for schedule in ({"kind": "resample", "every": 2}, "state-adaptive"):
        stepwise = made(schedule=schedule)
        assert stepwise[0]
        assert stepwise[0]
        with pytest.raises(InputError, match="nothing tells"):
            stepwise[0]
    adaptive = made(schedule="state-adaptive")
    adaptive.begin(0, 0, 4)
    assert [adaptive[0], adaptive[1]]
    with pytest.raises(InputError, match=r"the callback StateAdaptive\(dataset\)"):
        adaptive[2]
    alone = made({"original": WORDINGS["original"]})
    assert [alone[0] for _ in range(50)]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"schedule": "daily"}, "schedule: no schedule 'daily'"),
        ({"schedule": {"kind": "resample", "every": 0}}, "schedule.every: Input should be greater than or equal to 1"),
        ({"weights": {"m001": 2}}, "weights.m001: there is no such context"),
        ({"weights": {"short": 0}}, "weights.short: must be above 0"),
        ({"weights": {"short": 1.5}, "schedule": "expand"}, "takes whole numbers"),
        ({"output": "label"}, r"rows\[0\]: the output has no column 'label'"),
        ({"columns": {"text": "body"}}, r"rows\[0\]: slot 'text' has no column 'body'"),
        ({"max_length": 20}, "more than the context window of 20"),
        ({"contexts": {}}, "contexts: no template"),
        ({"contexts": {"a": "x {{text}}\n", "b": "x {{other}}\n"}}, "contexts.b: has the slots other"),
        ({"contexts": {"a": 3}}, "contexts.a: must be text or chat messages"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(settings: Mapping[str, Any], reason: str) -> None:
    given = {"contexts": WORDINGS, **settings}
    with pytest.raises(InputError, match=reason):
        ContextDataset(rows(4), given.pop("contexts"), tiny_tokenizer("chatml"), **given)


def test_a_wording_that_changes_gold_ids_is_refused() -> None:
    contexts = {"original": "Sort it: {{text}}\n", "joined": "Sort it: {{text}}"}
    values = [{"text": "rain", "output": "weather"}, {"text": "a song. P", "output": "lay the album"}]
    with pytest.raises(InputError, match=r"contexts\.joined"):
        ContextDataset(values, contexts, tiny_tokenizer("plain"))


def test_of_a_run_it_takes_rows_wordings_and_tokenizer_from_there(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", lambda config: config.update(contexts=[]))
    run_job(job, tmp_path / "out")
    data = ContextDataset.of_run(tmp_path / "out", ["original", "best-mutations:2"])
    assert data.names[0] == "original"
    assert len(data.names) == 3
    values = [rows()[int(row.example_id.rpartition(":")[2])] for row in data.pool.contexts[0].rows]
    text = data.tokenizer.decode(data.item(0, 0)["input_ids"])
    assert f"Message: {values[0]['text']}" in text
    assert text.rstrip().endswith(f"{values[0]['output']}<|im_end|>")
    held_out = ContextDataset.of_run(tmp_path / "out", ["original"], split="validation")
    assert len(held_out) == 6
    with pytest.raises(InputError, match="no split 'test'"):
        ContextDataset.of_run(tmp_path / "out", split="test")
    moved = (tmp_path / "job").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="give the run's own config with --config"):
        ContextDataset.of_run(tmp_path / "out", ["original"])
    again = ContextDataset.of_run(tmp_path / "out", ["original"], config=moved / "job.yaml")
    assert again.item(0, 0) == data.item(0, 0)


def test_a_run_and_its_data_that_are_moved_together_find_each_other(tmp_path: Path) -> None:
    job = write_job(tmp_path / "project", lambda config: config.update(contexts=[]))
    run_job(job, tmp_path / "project/runs/job")
    moved = (tmp_path / "project").rename(tmp_path / "moved")
    arguments = ["export", f"{moved}/runs/job#m001", "--to", "trl-dataset", "--out", str(tmp_path / "rows")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "rows/train.jsonl").read_text("utf-8").count("\n") == len(
        ContextDataset.of_run(moved / "runs/job", ["m001"])
    )
