"""Scores equal plain transformers on full prompts, and nothing about batching changes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from kvopt.base.loading import Base
from kvopt.base.prefix import gold_hidden, prefill
from kvopt.contexts import KVContext, NoContext, SoftContext
from kvopt.errors import InputError
from kvopt.kernels import KLOptions, reference_facts
from kvopt.measure.reference import build_reference, open_reference, reference_key
from kvopt.measure.score import TokenScores, own_scores, score_prefix, score_tokens, summarize
from kvopt.task.seam import Encoded, Row, make_batch
from tests.naive import naive_logits, naive_scores
from tests.tasks import OTHER, Task, make_task, template_for
from tests.tiny import MODELS, tiny_base


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tiny_base(request.param), tmp_path_factory.mktemp(request.param))


def pairs(encoded: Encoded) -> list[tuple[list[int], tuple[int, ...]]]:
    return [([*encoded.prefix, *row.body], row.gold) for row in encoded.rows]


def original_logits(task: Task) -> list[torch.Tensor]:
    return [naive_logits(task.base, prompt, gold) for prompt, gold in pairs(task.encoded)]


def test_a_text_context_scores_as_a_float64_loop_over_full_prompts(task: Task) -> None:
    other = task.text("other", template_for(task.base, OTHER))
    ours = score_tokens(task.base, other, task.encoded, task.reference)
    naive = naive_scores(task.base, pairs(other.encoded), original_logits(task))
    assert naive.kl.mean() > 1e-4
    torch.testing.assert_close(ours.kl.mean(), naive.kl.mean(), rtol=1e-3, atol=0)
    torch.testing.assert_close(ours.kl, naive.kl, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(ours.nll, naive.nll, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.agree, naive.agree)
    assert ours.counts.tolist() == [len(row.gold) for row in task.encoded.rows]


def test_the_original_s_own_scores_need_no_pass_and_are_those_of_one(task: Task) -> None:
    rows = task.encoded.rows
    own = own_scores(task.base, rows, task.reference, batch_size=5)
    naive = naive_scores(task.base, pairs(task.encoded), original_logits(task))
    torch.testing.assert_close(own.nll, naive.nll, rtol=1e-4, atol=1e-5)
    assert torch.equal(own.kl, torch.zeros_like(own.nll))
    assert own.agree.all()
    assert own.counts.tolist() == [len(row.gold) for row in rows]


def test_progress_counts_every_row_once(task: Task) -> None:
    done: list[int] = []
    score_tokens(task.base, task.original, task.encoded, task.reference, batch_size=5, progress=done.append)
    assert (len(done), sum(done)) == (3, 12)


def test_a_score_s_document_has_its_numbers() -> None:
    kl = torch.tensor([0.0, 1.0, 2.0, 5.0])
    score = summarize(TokenScores(kl, 2 * kl + 1, kl < 1.5, torch.tensor([3, 1])), resamples=50)
    assert score.to_json() == {
        "kl_forward": {"mean": 2.0, "ci95": list(score.kl_forward.ci95 or ()), "p95": score.kl_forward_p95},
        "gold_nll": 5.0,
        "gold_nll_ci95": list(score.gold_nll.ci95 or ()),
        "top1_agreement": 0.5,
        "examples": 2,
        "gold_tokens": 4,
    }
    assert score.kl_forward_p95 == pytest.approx(4.55)


def test_the_original_is_at_no_distance_from_itself_through_any_batching(task: Task) -> None:
    for batch_size in (1, 3, 12):
        scores = score_tokens(task.base, task.original, task.encoded, task.reference, batch_size=batch_size)
        assert scores.kl.abs().max() <= 1e-6
        assert scores.agree.all()


def test_scores_do_not_depend_on_batch_size_order_padding_or_chunks(task: Task) -> None:
    other = task.text("other", template_for(task.base, OTHER))
    prefix, rows = other.prefix(task.base), other.encoded.rows
    first = score_prefix(task.base, prefix, rows, task.reference, batch_size=5)
    for batch_size, options in ((1, None), (12, None), (5, KLOptions(chunk_bytes=2**20))):
        again = score_prefix(task.base, prefix, rows, task.reference, batch_size=batch_size, options=options)
        torch.testing.assert_close(again.kl, first.kl, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(again.nll, first.nll, rtol=1e-5, atol=1e-6)
    backwards = score_prefix(task.base, prefix, rows[::-1], task.reference, batch_size=5)
    parts = list(backwards.kl.split(backwards.counts.tolist()))[::-1]
    torch.testing.assert_close(torch.cat(parts), first.kl, rtol=1e-3, atol=1e-7)


def test_changing_a_token_of_v_behind_the_scored_positions_changes_nothing_and_padding_is_never_seen(
    task: Task,
) -> None:
    rows = task.encoded.rows
    batch = make_batch(rows, range(len(rows)))
    prefix = task.original.prefix(task.base)
    with torch.no_grad():
        clean = gold_hidden(task.base, prefix, batch)
        batch.ids[~batch.mask] = 7
        dirty = gold_hidden(task.base, prefix, batch)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=1e-6)


def test_a_context_of_the_templates_own_states_or_embeddings_scores_zero(task: Task) -> None:
    ids = torch.tensor(task.encoded.prefix)
    with torch.no_grad():
        kv = KVContext("kv", prefill(task.base, ids=ids).stack())
        soft = SoftContext("soft", task.base.embed(ids))
    for context in (kv, soft):
        scores = score_tokens(task.base, context, task.encoded, task.reference)
        assert scores.kl.abs().max() <= 1e-6, context.kind


def test_no_context_runs_the_bodies_alone(task: Task) -> None:
    none = NoContext("none", task.encoder.bos())
    ours = score_tokens(task.base, none, task.encoded, task.reference)
    alone = [([*task.encoder.bos(), *row.body], row.gold) for row in task.encoded.rows]
    naive = naive_scores(task.base, alone, original_logits(task))
    torch.testing.assert_close(ours.kl.mean(), naive.kl.mean(), rtol=1e-3, atol=0)


def test_intervals_hold_the_mean_and_narrow_with_more_examples() -> None:
    generator = torch.Generator().manual_seed(0)

    def scores(examples: int) -> TokenScores:
        counts = torch.randint(2, 9, (examples,), generator=generator)
        kl = torch.rand(int(counts.sum()), generator=generator)
        return TokenScores(kl, kl + 1, kl > 0.1, counts)

    few, many = summarize(scores(10)), summarize(scores(1000))
    for score in (few, many):
        low, high = score.kl_forward.ci95 or (1.0, 0.0)
        assert low < score.kl_forward.mean < high
        assert score.gold_nll.mean == pytest.approx(score.kl_forward.mean + 1)
    width = [s.kl_forward.ci95[1] - s.kl_forward.ci95[0] for s in (few, many) if s.kl_forward.ci95]
    assert width[1] < width[0] / 4
    assert summarize(scores(1)).kl_forward.ci95 is None


def test_p95_is_over_gold_tokens() -> None:
    kl = torch.cat([torch.full((20,), 1.0), torch.arange(81.0) / 100])  # the 96th of 101 in order is 1.0, the 81st 0.8
    scores = TokenScores(kl, kl, kl > 0, torch.tensor([20, *[1] * 81]))
    assert summarize(scores, resamples=10).kl_forward_p95 == pytest.approx(1.0)
    thin = replace(scores, kl=torch.arange(101.0)[torch.randperm(101)])
    assert summarize(thin, resamples=10).kl_forward_p95 == pytest.approx(95.0)


def test_the_interval_draws_rows_and_weighs_them_by_their_gold_tokens() -> None:
    """Rows of 1 and 20 tokens: draws of tokens, means of row means, and unpaired draws give other intervals."""
    counts = torch.tensor([1, 20] * 15)
    level = torch.rand(30, generator=torch.Generator().manual_seed(1)) * torch.tensor([3.0, 1.0] * 15)
    kl = level.repeat_interleave(counts)
    found = summarize(TokenScores(kl, 2 * kl, kl > 0, counts), seed=4, resamples=500)
    sums = np.array([part.double().sum() for part in kl.split(counts.tolist())])
    expected = bootstrap(
        (sums, counts.double().numpy()), lambda total, tokens, axis=-1: total.sum(axis) / tokens.sum(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=500, rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    assert found.kl_forward.mean == pytest.approx(float(kl.double().mean()))
    assert found.kl_forward.ci95 == (expected.low, expected.high)
    assert found.gold_nll.ci95 == pytest.approx((2 * expected.low, 2 * expected.high))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.where(torch.rand(40, generator=generator) < 0.3, 20, 1)
        kl = torch.rand(40, generator=generator).repeat_interleave(counts)
        interval = summarize(TokenScores(kl, kl, kl > 0, counts), seed=seed, resamples=300).kl_forward.ci95
        assert interval is not None
        hits += interval[0] < 0.5 < interval[1]
    assert 0.9 <= hits / 200 <= 0.98


def test_reference_refuses_another_key_and_is_resumed_shard_by_shard(tmp_path: Path, llama: Base) -> None:
    from kvopt.measure.reference import shard_name

    task = make_task(llama, tmp_path)
    shard = tmp_path / shard_name(0)
    before, stamp = shard.read_bytes(), shard.stat().st_mtime_ns
    prefix = task.original.prefix(llama)
    build_reference(llama, prefix, task.encoded, tmp_path, batch_size=4)
    assert shard.stat().st_mtime_ns == stamp
    shard.write_bytes(before[:-9])
    with pytest.raises(InputError, match="damaged"):
        open_reference(tmp_path, task.reference.key)
    build_reference(llama, prefix, task.encoded, tmp_path, batch_size=4)
    assert shard.read_bytes() == before
    with pytest.raises(InputError, match="another base"):
        open_reference(tmp_path, "0" * 64)


def test_the_reference_s_key_names_all_that_it_depends_on(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = make_task(llama, tmp_path).encoded
    row = encoded.rows[3]
    other_body = Row(row.example_id, (*row.body[:-1], row.body[-1] + 1), row.gold)
    other_gold = Row(row.example_id, row.body, (row.gold[0] + 1, *row.gold[1:]))
    changed = [Encoded(encoded.prefix, (*encoded.rows[:3], new, *encoded.rows[4:])) for new in (other_body, other_gold)]
    changed.append(Encoded((*encoded.prefix[:-1], encoded.prefix[-1] + 1), encoded.rows))
    half = replace(llama, dtype=torch.bfloat16)
    named = replace(llama, identity=llama.identity | {"config": "another"})
    elsewhere = replace(llama, device=torch.device("cuda"))
    keys = [reference_key(base, encoded, 4) for base in (llama, half, named, elsewhere)]
    keys += [reference_key(llama, encoded, 5), *(reference_key(llama, other, 4) for other in changed)]
    assert reference_key(llama, Encoded(encoded.prefix, encoded.rows), 4) == keys[0]
    monkeypatch.setattr("kvopt.measure.reference.ROWS_PER_SHARD", 5)
    keys.append(reference_key(llama, encoded, 4))
    assert len(set(keys)) == len(keys) == 9


def test_a_reference_of_as_many_other_rows_is_built_anew(llama: Base, tmp_path: Path) -> None:
    task = make_task(llama, tmp_path / "one")
    rows = list(task.encoded.rows)
    rows[3] = Row(rows[3].example_id, (*rows[3].body[:-2], rows[3].body[-1], rows[3].body[-2]), rows[3].gold)
    encoded, prefix = Encoded(task.encoded.prefix, tuple(rows)), task.original.prefix(llama)
    again = build_reference(llama, prefix, encoded, tmp_path / "one", batch_size=4)
    fresh = build_reference(llama, prefix, encoded, tmp_path / "two", batch_size=4)
    ids = [row.example_id for row in rows]
    assert torch.equal(again.hidden(ids), fresh.hidden(ids))
    assert not torch.equal(again.hidden(ids), task_hidden(task, prefix))


def task_hidden(task: Task, prefix: object) -> torch.Tensor:
    """The gold positions' hidden states of all rows, computed now."""
    with torch.no_grad():
        return gold_hidden(task.base, prefix, make_batch(task.encoded.rows, range(len(task.encoded.rows))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{", "the reference cannot be read"),
        ("[1]", "is no index of a reference"),
        ('{"rows": [], "hidden_size": 3}', "is no index of a reference"),
        ('{"key": "k", "hidden_size": 3}', "is no index of a reference"),
        ('{"key": "k", "rows": [], "shards": [], "hidden_size": 3}', "another base, template or data set"),
    ],
)
def test_a_damaged_index_is_one_line(written: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(written)
    with pytest.raises(InputError, match=message):
        open_reference(tmp_path, "mine")


def test_an_index_of_0_1_0_which_says_how_many_rows_a_shard_has_is_read(
    tmp_path: Path, llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvopt.measure import reference as module

    monkeypatch.setattr(module, "ROWS_PER_SHARD", 5)
    task = make_task(llama, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index.pop("shards") == [5, 5, 2]
    assert index.pop("checksum")
    (tmp_path / "index.json").write_text(json.dumps(index | {"rows_per_shard": 5}))
    ids = [row.example_id for row in task.encoded.rows]
    assert torch.equal(open_reference(tmp_path, task.reference.key).hidden(ids), task.reference.hidden(ids))


def test_a_reference_grows_in_shards_of_its_own_and_says_what_was_there(
    tmp_path: Path, llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvopt.measure import reference as module

    monkeypatch.setattr(module, "ROWS_PER_SHARD", 5)
    whole = make_task(llama, tmp_path / "whole")
    ids, prefix = [row.example_id for row in whole.encoded.rows], whole.original.prefix(llama)
    told: list[int] = []

    def build(folder: str, wanted: set[str] | None) -> object:
        return build_reference(
            llama, prefix, whole.encoded, tmp_path / folder, batch_size=4, wanted=wanted, stored=told.append
        )

    some = build("grown", set(ids[:4]))
    assert told == [], "nothing was there"
    assert some.lacks(ids)  # type: ignore[attr-defined]
    assert not some.lacks(ids[:4])  # type: ignore[attr-defined]
    grown = build("grown", None)
    assert told == [4]
    again = build("grown", set(ids[2:7]))
    assert told == [4, 5]
    assert sorted(path.name for path in (tmp_path / "grown").glob("hidden-*")) == [
        f"hidden-0000{shard}.safetensors" for shard in range(3)
    ]
    for one in (grown, again):
        torch.testing.assert_close(one.hidden(ids), whole.reference.hidden(ids), rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]


def test_facts_of_the_reference_are_computed_once_and_do_not_depend_on_what_was_scored_first(
    tmp_path: Path, llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvopt.measure import reference as module

    monkeypatch.setattr(module, "FACTS_ROWS", 5)
    calls = []
    monkeypatch.setattr(module, "reference_facts", lambda *args, **kw: calls.append(1) or reference_facts(*args, **kw))
    task = make_task(llama, tmp_path)
    ids = [row.example_id for row in task.encoded.rows]
    again = open_reference(tmp_path, task.reference.key)
    some, every = task.reference.facts(ids[3:4], llama.head), task.reference.facts(ids, llama.head)
    assert len(calls) == 3  # twelve rows are three blocks
    backwards = again.facts(ids[::-1], llama.head)
    assert torch.equal(some.entropy, every.entropy.split(task.reference.counts(ids))[3])
    parts = list(backwards.log_partition.split(again.counts(ids[::-1])))[::-1]
    assert torch.equal(torch.cat(parts), every.log_partition)
    warm = task.reference.facts(ids, llama.head, KLOptions(temperature=2.0))
    assert (warm.entropy > every.entropy).all()
    logits = torch.cat(original_logits(task)).double()
    torch.testing.assert_close(every.log_partition.double(), logits.logsumexp(-1), rtol=0, atol=1e-5)


def test_shards_have_few_tokens_however_long_the_outputs_are(
    tmp_path: Path, llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvopt.measure import reference as module

    whole = make_task(llama, tmp_path / "whole")
    ids = [row.example_id for row in whole.encoded.rows]
    counts = dict(zip(ids, whole.reference.counts(ids), strict=True))
    longest = max(counts.values())
    monkeypatch.setattr(module, "TOKENS_PER_SHARD", longest + 1)
    monkeypatch.setattr(module, "FACTS_TOKENS", 3)
    cut = make_task(llama, tmp_path / "cut")
    shards = json.loads((tmp_path / "cut" / "index.json").read_text())["shards"]
    assert len(shards) > 2
    assert sum(shards) == len(ids)
    rows = iter(ids)
    assert all(sum(counts[next(rows)] for _ in range(shard)) <= longest + 1 for shard in shards)
    torch.testing.assert_close(cut.reference.hidden(ids), whole.reference.hidden(ids), rtol=1e-5, atol=1e-5)
    ours, theirs = (reference.facts(ids, llama.head) for reference in (cut.reference, whole.reference))
    torch.testing.assert_close(ours.log_partition, theirs.log_partition, rtol=1e-5, atol=1e-5)
    assert cut.reference.key != whole.reference.key
    monkeypatch.setattr(module, "TOKENS_PER_SHARD", 1)
    assert module.cut_by_tokens([("a", 5), ("b", 1), ("c", 0)], 3, 4) == [[("a", 5)], [("b", 1), ("c", 0)]]
