"""The samples stage: which examples are shown, what is said of their tokens, and when it is made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvopt.base.loading import Base
from kvopt.config.document import load_config
from kvopt.contexts import KVContext
from kvopt.measure.samples import SampleLimits, Shown, _answers, collect, ordering, places, token_text
from kvopt.measure.score import TokenScores, score_tokens
from kvopt.run.run import Run
from kvopt.task.seam import Encoded, Row
from tests.jobs import run_job, stages_in, write_job
from tests.naive import naive_logits
from tests.tasks import OTHER, make_task, template_for
from tests.tiny import tiny_base


def scores(*rows: list[float]) -> TokenScores:
    kl = torch.tensor([value for row in rows for value in row])
    return TokenScores(kl, kl, kl < 1, torch.tensor([len(row) for row in rows]))


def shown(*rows: list[float]) -> Shown:
    return Shown(None, Encoded((), ()), scores(*rows))  # type: ignore[arg-type]


def test_rows_are_ordered_by_kl_per_token_and_not_by_its_sum():
    assert ordering([shown([0.1, 0.1, 0.1], [0.2], [0.05])]).tolist() == [1, 0, 2]


def test_one_bad_context_does_not_decide_the_order_alone():
    good = [shown([0.3], [0.2], [0.1]), shown([0.03], [0.02], [0.01])]
    assert ordering([*good, shown([1.0], [2.0], [90.0])]).tolist() == [0, 1, 2]


def test_places_run_from_the_worst_to_the_best():
    assert places(3, 9) == [(0, "worst"), (4, "median"), (8, "best")]
    assert places(1, 9) == [(0, "worst")]
    assert places(5, 2) == [(0, "worst"), (1, "best")]
    assert places(4, 1) == [(0, "worst")]
    assert [spot for spot, _ in places(5, 101)] == [0, 25, 50, 75, 100]
    assert places(5, 101)[1][1] == "75% of rows are better"


@pytest.mark.parametrize("tokenizer", ["chatml", "llama2", "gemma", "plain"])
def test_token_texts_keep_spaces_and_name_control_tokens(tokenizer: str):
    base = tiny_base("llama", tokenizer)
    text = "Read the book again, and then find a label."
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_text(base, token) for token in ids).strip() == text
    end = base.tokenizer.eos_token_id
    assert token_text(base, end) == base.tokenizer.convert_ids_to_tokens(end)


def test_probabilities_and_ranks_are_those_of_plain_transformers(base: Base, tmp_path: Path):
    task = make_task(base, tmp_path, count=5)
    other = task.text("other", template_for(base, OTHER))
    pair = [
        Shown(c, c.bodies(task.encoded), score_tokens(base, c, task.encoded, task.reference, batch_size=4))
        for c in (task.original, other)
    ]
    document = collect(
        base, task.reference, pair[0], pair[1:], task.examples, SampleLimits(2, 3, 4), stop=frozenset({-1})
    ).to_json()
    assert [e["place"] for e in document["examples"]] == ["worst", "best"]
    for example in document["examples"]:
        index = next(i for i, e in enumerate(task.examples) if e.id == example["id"])
        row = task.encoded.rows[index]
        log_p = naive_logits(base, [*task.encoded.prefix, *row.body], row.gold).log_softmax(-1)
        mine = other.encoded.rows[index]
        log_q = naive_logits(base, [*other.encoded.prefix, *mine.body], row.gold).log_softmax(-1)
        nll = -log_p.gather(1, torch.tensor(row.gold)[:, None])[:, 0]
        assert example["reference"]["nll"] == pytest.approx(nll.tolist(), abs=1e-4)
        found = example["contexts"]["other"]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        assert found["kl"] == pytest.approx(kl.tolist(), abs=1e-4)
        for position, (q, p) in enumerate(zip(found["top"], example["reference"]["top"], strict=True)):
            values, tokens = log_p[position].exp().topk(3)
            assert [t["p"] for t in p] == pytest.approx(values.tolist(), abs=1e-4)
            assert p[0]["token"] == token_text(base, int(tokens[0]))
            assert (q is None) == found["agree"][position]
            if q is not None:
                assert [t["p"] for t in q] == pytest.approx(log_q[position].exp().topk(3)[0].tolist(), abs=1e-4)
                assert q[0]["token"] == token_text(base, int(log_q[position].argmax()))
        assert "top" not in example["contexts"]["original"]
        greedy: list[int] = []
        for _ in range(4):
            greedy.append(int(naive_logits(base, [*other.encoded.prefix, *mine.body, *greedy], [0])[0].argmax()))
        assert found["answer"] == base.tokenizer.decode(greedy, skip_special_tokens=True)


def test_where_the_window_has_no_room_there_is_no_answer():
    base = tiny_base("llama")
    full = Encoded((), (Row("r", (5,) * (base.geometry.window - 8), (5,)),))
    g = base.geometry
    prefix = KVContext("kv", torch.zeros(8, g.layers, 2, g.kv_heads, g.head_dim)).prefix(base)
    assert _answers(base, prefix, full, [0], 4, frozenset()) == [None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("job")
    run_job(write_job(place), place / "out")
    return place


def test_a_run_shows_original_best_mutation_learned_contexts_and_none(finished: Path):
    document = json.loads((finished / "out" / "samples.json").read_text("utf-8"))
    board = json.loads((finished / "out" / "leaderboard.json").read_text("utf-8"))
    chosen = min(
        (row for row in board["contexts"] if row["name"].startswith("m0")),
        key=lambda r: r["selection"]["kl_forward"]["mean"],
    )
    names = ["original", chosen["name"], "kv-8", "kv-best", "soft-6", "none"]
    assert [c["name"] for c in document["contexts"]] == names
    assert document["ranked_by"] == names[1:-1]
    assert all(list(example["contexts"]) == names for example in document["examples"])
    assert len(document["examples"]) == 3


def test_the_kl_of_tokens_is_that_of_the_leaderboard(finished: Path):
    document = json.loads((finished / "out" / "samples.json").read_text("utf-8"))
    loaded, base_dir = load_config(finished / "job.yaml")
    with Run(loaded, base_dir, finished / "out", say=lambda line: None, bars=False).opened() as run:
        (context,) = run.stored_contexts("kv-8")
        stored = run.token_scores(context, "validation")
        ids = [example.id for example in run.inputs.dataset.validation]
    by_row = dict(zip(ids, stored.kl.split(stored.counts.tolist()), strict=True))
    for example in document["examples"]:
        assert example["contexts"]["kv-8"]["kl"] == pytest.approx(by_row[example["id"]].tolist(), abs=1e-6)


def test_samples_are_made_again_only_when_what_they_show_changed(finished: Path):
    config, out = finished / "job.yaml", finished / "out"
    before = (out / "samples.json").read_bytes()
    (out / "ledger.jsonl").unlink()
    run_job(config, out)
    assert not (out / "ledger.jsonl").exists()
    run_job(config, out, ("report.top_k=2",))
    assert stages_in(out) == ["samples"]
    assert (out / "samples.json").read_bytes() != before
    (out / "samples.json").write_text("{", "utf-8")
    run_job(config, out)
    assert (out / "samples.json").read_bytes() == before
    run_job(config, out, ("report.examples=0",))
    assert not (out / "samples.json").exists()
    run_job(config, out)
    assert (out / "samples.json").read_bytes() == before
