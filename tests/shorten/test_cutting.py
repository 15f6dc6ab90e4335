"""The search for a shorter text: exact figures, what must stay, the same result again, and no work twice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch

from kvopt.base.loading import Base
from kvopt.measure.score import score_tokens
from kvopt.shorten.cutting import CutSearch
from kvopt.shorten.importance import Sensitivity, largest_attention, sensitivity
from kvopt.shorten.pieces import Pieces, take_apart
from kvopt.shorten.trials import Trials, spread_order
from kvopt.task.examples import Example
from tests.tasks import Task, make_task


def pieces_of(task: Task, **options: object) -> Pieces:
    return take_apart(task.template, task.examples[0], task.encoder, task.encoded.prefix, **options)  # type: ignore[arg-type]


def judge_of(
    task: Task, pieces: Pieces, journal: Path | None = None, key: str = "k", rows: int | None = None
) -> Trials:
    gold = {row.example_id: row.gold for row in task.encoded.rows}
    return Trials(task.base, task.encoder, pieces, task.examples, gold, task.reference, journal=journal, key=key)


def search_of(task: Task, pieces: Pieces, judge: Trials, **options: object) -> CutSearch:
    ids, rows = task.encoded.prefix, task.encoded.rows

    def worth(kept: torch.Tensor, probes: int) -> object:
        return sensitivity(task.base, ids, kept, rows, task.reference, probes=probes)

    return CutSearch(pieces, judge, largest_attention(task.base, ids, rows), worth, **options)  # type: ignore[arg-type]


@pytest.fixture
def task(llama: Base, tmp_path: Path) -> Task:
    return make_task(llama, tmp_path / "reference", 8)


def test_the_judge_gives_the_kl_of_the_written_text(base: Base, tmp_path: Path) -> None:
    task = make_task(base, tmp_path / "reference", 6)
    pieces = pieces_of(task)
    judge = judge_of(task, pieces)
    rng = Random(0)
    for share in (0.9, 0.5, 0.7, 0.9):
        kept = {i for i in range(len(pieces)) if rng.random() < share} | {0}
        scores = score_tokens(task.base, task.text("x", pieces.written(kept)), task.encoded, task.reference)
        assert judge.kl(kept) == pytest.approx(float(scores.kl.double().mean()), rel=1e-4, abs=1e-6)
        assert judge.tokens(kept) == task.text("x", pieces.written(kept)).tokens
        few = scores.by_example(scores.kl)[:2].sum() / scores.counts[:2].sum()
        assert judge.kl(kept, 2) == pytest.approx(float(few), rel=1e-4, abs=1e-6)


def test_nothing_is_run_twice_even_by_another_process(task: Task, tmp_path: Path) -> None:
    pieces, journal = pieces_of(task), tmp_path / "trials.jsonl"
    first = judge_of(task, pieces, journal)
    texts = [frozenset(range(len(pieces))) - {i} for i in range(4)]
    values = [first.kl(text, 3) for text in texts] + [first.kl(text) for text in texts]
    assert first.rows_run == 4 * len(task.examples)
    with journal.open("a") as file:
        file.write('{"key": "k", "text": "torn')
    second = judge_of(task, pieces, journal)
    assert [second.kl(text, 3) for text in texts] + [second.kl(text) for text in texts] == values
    assert second.rows_run == 0
    assert judge_of(task, pieces, journal, key="other").kl(texts[0]) == pytest.approx(values[4], rel=1e-6)


@pytest.mark.parametrize("lines", [1, 7, 20])
def test_an_interrupted_search_ends_in_the_same_bits(task: Task, tmp_path: Path, lines: int) -> None:
    """Which texts are in memory, to share keys and values with, is another thing after an interruption."""
    pieces, journal = pieces_of(task, gold_texts=["weather"]), tmp_path / "trials.jsonl"

    def search() -> tuple[object, int]:
        judge = judge_of(task, pieces, journal)
        return search_of(task, pieces, judge).down_to(len(pieces.prefix) - 12), judge.rows_tried

    found, whole = search(), journal.read_bytes()
    assert whole.count(b"\n") > 20
    journal.write_bytes(b"".join(whole.splitlines(keepends=True)[:lines]) + b'{"key": "k", "te')
    assert search() == found
    assert journal.read_bytes() == whole


def test_a_text_that_changes_the_gold_ids_is_refused(task: Task) -> None:
    pieces = pieces_of(task)
    judge = judge_of(task, pieces)
    first = task.examples[0].id
    judge.gold = {**judge.gold, first: (*judge.gold[first][:-1], 5)}  # type: ignore[misc]
    assert judge.tokens(range(len(pieces))) is None
    assert judge.kl(range(len(pieces))) == float("inf")


@pytest.mark.parametrize("tokens", [60, 45, 30])
def test_a_text_of_the_length_that_was_asked_for(task: Task, tokens: int) -> None:
    pieces = pieces_of(task, gold_texts=["weather"])
    assert tokens < len(pieces.prefix)
    judge = judge_of(task, pieces)
    found = search_of(task, pieces, judge).down_to(tokens)
    assert found is not None
    written = task.text("short", pieces.written(found.kept))
    assert found.tokens == written.tokens <= tokens
    scores = score_tokens(task.base, written, task.encoded, task.reference)
    assert found.kl == pytest.approx(float(scores.kl.double().mean()), rel=1e-4)
    assert pieces.allowed(found.kept)
    assert written.template.slots == task.template.slots


@dataclass
class KnownTrials:
    """A judge whose KL is a known function: of every piece that is gone, and of pairs of them."""

    pieces: Pieces
    costs: torch.Tensor
    pairs: torch.Tensor
    examples: range = range(8)

    def kl(self, kept: Iterable[int], rows: int | None = None) -> float:
        gone = torch.ones(len(self.pieces))
        gone[list(kept)] = 0
        noise = 0.0 if rows in (None, 8) else 0.002 * (hash(frozenset(kept)) % 7)
        return float(gone @ self.costs + gone @ self.pairs @ gone) + noise

    def tokens(self, kept: Iterable[int]) -> int:
        fixed = len(self.pieces.prefix) - sum(map(len, self.pieces.tokens))
        return fixed + sum(len(self.pieces.tokens[i]) for i in kept)


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_nearly_the_best_of_all_texts(task: Task, seed: int) -> None:
    """Fourteen pieces may go, so that every text can be tried. What the search is told of them knows no pairs."""
    pieces = pieces_of(task)
    generator = torch.Generator().manual_seed(seed)
    free = [i for i in range(len(pieces)) if len(pieces.tokens[i]) == 1][:14]
    object.__setattr__(pieces, "held", frozenset(range(len(pieces))) - set(free))
    costs = torch.rand(len(pieces), generator=generator) ** 2
    pairs = torch.triu(torch.rand(len(pieces), len(pieces), generator=generator) ** 4, 1)
    judge = KnownTrials(pieces, costs, pairs)
    whole = set(range(len(pieces)))
    values = [judge.kl(whole - set(gone)) for gone in itertools.combinations(free, 7)]

    def per_token(of_pieces: torch.Tensor) -> torch.Tensor:
        values = torch.zeros(len(pieces.prefix))
        for i, tokens in enumerate(pieces.tokens):
            values[tokens[0]] = of_pieces[i]
        return values

    def worth(kept: torch.Tensor, probes: int) -> Sensitivity:
        gone = torch.tensor([not bool(kept[tokens[0]]) for tokens in pieces.tokens]).float()
        return Sensitivity(per_token(costs), -per_token(costs + (pairs + pairs.T) @ gone))

    attention = per_token(torch.rand(len(pieces), generator=generator))
    search = CutSearch(pieces, judge, attention, worth, seed=seed)  # type: ignore[arg-type]
    found = search.down_to(judge.tokens(whole) - 7)
    assert found is not None
    assert len(found.kept) == len(pieces) - 7
    better = sum(value < found.kl - 1e-6 for value in values) / len(values)
    assert better <= 0.005, f"{better:.2%} of all texts are closer"


def test_the_same_arguments_give_the_same_text(task: Task) -> None:
    pieces = pieces_of(task)
    one, other = (search_of(task, pieces, judge_of(task, pieces), seed=3).down_to(40) for _ in range(2))
    assert one == other


def test_down_to_a_kl(task: Task) -> None:
    pieces = pieces_of(task)
    judge = judge_of(task, pieces)
    cut = search_of(task, pieces, judge).down_to(50)
    assert cut is not None
    search = search_of(task, pieces, judge)
    found = search.down_while(cut.kl * 1.2)
    assert found.kl <= cut.kl * 1.2
    assert found.tokens < len(pieces.prefix)
    shorter = search_of(task, pieces, judge).down_while(cut.kl * 2)
    assert shorter.tokens <= found.tokens
    nothing = search_of(task, pieces, judge)
    assert nothing.down_while(0.0).tokens == len(pieces.prefix)
    assert nothing.nearest is not None
    assert nothing.nearest.kl > 0


def test_what_cannot_go_sets_the_shortest_length(task: Task) -> None:
    pieces = pieces_of(task, literals="all")
    judge = judge_of(task, pieces)
    search = search_of(task, pieces, judge)
    shortest = search.shortest()
    assert 0 < shortest < len(pieces.prefix)
    assert search.down_to(shortest - 1) is None
    reached = search_of(task, pieces, judge).down_to(shortest)
    assert reached is not None
    assert reached.tokens == shortest


def test_rows_that_show_much_come_first() -> None:
    rows = [Example(f"train:{i}", {}, "", "") for i in range(4)]
    gold = {"train:0": (1, 2), "train:1": (1, 2), "train:2": (1, 3, 4), "train:3": (2, 5)}
    assert [row.id for row in spread_order(rows, gold)] == ["train:2", "train:3", "train:0", "train:1"]


def test_progress_tells_lengths_that_fall(task: Task) -> None:
    seen: list[tuple[int, float]] = []
    progress: Callable[[int, float], None] = lambda tokens, kl: seen.append((tokens, kl))  # noqa: E731
    pieces = pieces_of(task)
    search_of(task, pieces, judge_of(task, pieces), progress=progress).down_to(40)
    assert [tokens for tokens, _ in seen] == sorted((tokens for tokens, _ in seen), reverse=True)
    assert json.dumps(seen)
