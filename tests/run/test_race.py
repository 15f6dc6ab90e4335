"""``score.race``: the best few mutations for a quarter of the row evaluations."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvopt.config.document import load_config
from kvopt.config.names import ContextName
from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.documents.validated import read_leaderboard
from kvopt.errors import InputError
from kvopt.measure.paired import LEVEL, paired_difference
from kvopt.measure.racing import evaluations, heats
from kvopt.run import race as race_module
from kvopt.run.race import check_raced
from kvopt.run.run import Run
from tests.jobs import THINGS, artefacts, run_job, stages_in, write_job, write_rows

COUNT, KEEP, ROWS = 32, 4, 24
VERBS = ("Explain", "Look up", "Order", "Who knows", "Put on", "Sell", "Where is", "Hide", "Count", "I like")


def racing(**race: Any) -> Any:
    def change(config: dict[str, Any]) -> None:
        config["contexts"] = []
        config["mutations"]["count"] = COUNT
        config["data"]["limit"] = {"selection": ROWS}
        config["score"] |= {"best": KEEP, "race": race}

    return change


def write(folder: Path, **race: Any) -> Path:
    path = write_job(folder, racing(**race))
    messages = [f"{verb} {thing}." for verb in VERBS for thing in THINGS]
    write_rows(
        folder / "train.jsonl", [{"text": m, "output": ("weather", "music", "book")[len(m) % 3]} for m in messages]
    )
    return path


def open_job(path: Path, out: Path, *sets: str) -> Run:
    config, base_dir = load_config(path, sets)
    return Run(config, base_dir, out, say=lambda line: None, bars=False)


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, LeaderboardDocument]:
    """A config and its finished run; do not change them."""
    place = tmp_path_factory.mktemp("raced")
    run_job(write(place), place / "out")
    return place / "job.yaml", place / "out", read_leaderboard(place / "out/leaderboard.json")


def of_one_row(left: int, keep: int, rows: int) -> int:
    """Row evaluations of a race that begins with one row."""
    spent, done, until = keep * rows, 0, 1
    while left > keep:
        spent += left * (until - done)
        left, done, until = (keep if until == rows else max(keep, -(-left // 2))), until, min(rows, 2 * until)
    return spent


@pytest.mark.parametrize("contestants", [5, 16, 33, 64, 500])
@pytest.mark.parametrize("keep", [1, 4])
@pytest.mark.parametrize("rows", [8, 32, 100])
def test_a_race_keeps_within_its_share_and_every_row_is_run_once(contestants: int, keep: int, rows: int) -> None:
    share = 0.25
    found = heats(contestants, keep, rows, share)
    if not found:
        assert of_one_row(contestants, keep, rows) > share * contestants * rows
        return
    assert found[0].first == 0
    assert found[-1].left == keep
    for before, after in pairwise(found):
        assert (after.first, after.contestants) == (before.last, before.left)
        assert after.last > after.first
        assert after.left < after.contestants
    spent = sum(heat.contestants * (heat.last - heat.first) for heat in found) + keep * rows
    assert spent == evaluations(found, keep, rows) <= share * contestants * rows
    assert max(heat.last for heat in found) <= rows


def test_a_larger_share_begins_with_more_rows() -> None:
    begun = [heats(64, 4, 64, share)[0].last for share in (0.15, 0.25, 0.5)]
    assert begun == sorted(set(begun))


def test_the_best_are_those_of_the_whole_ranking_up_to_what_rows_can_separate(
    raced: tuple[Path, Path, LeaderboardDocument], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, board = raced
    finalists = [row.name for row in board.contexts if row.lineage.id]
    assert len(finalists) == KEEP
    with open_job(path, tmp_path / "whole", "score.race=null").opened() as run:
        ranked = run.ranked_mutations()
        assert len(ranked) == COUNT
        sums, counts = {}, np.zeros(0)
        for context, _ in ranked:
            scores = run.token_scores(context, "selection")
            sums[context.name], counts = scores.by_example(scores.kl).numpy(), scores.counts.numpy()
        whole = {context.name: score.document for context, score in ranked}
    best = [context.name for context, _ in ranked[:KEEP]]
    assert board.race is not None
    with capsys.disabled():
        print(f"\nrace: {board.race.evaluations} of {board.race.without_race} row evaluations; {finalists} of {best}")
    assert board.race.without_race == COUNT * ROWS
    assert board.race.evaluations <= 0.25 * COUNT * ROWS
    for name in set(finalists) - set(best):
        for missed in set(best) - set(finalists):
            p = paired_difference(sums[name], sums[missed], counts).p
            assert p is not None
            assert p > LEVEL, f"{name} is told from {missed}, which the race dropped"
    median = np.median([score.kl_forward.mean for score in whole.values()])
    for row in board.contexts:
        if row.name in finalists:
            assert row.selection is not None
            assert row.selection.to_json() == whole[row.name].to_json(), "scores on all rows, to the last bit"
            assert row.selection.kl_forward.mean < median


def test_who_was_dropped_is_never_shown_as_scored_in_full(raced: tuple[Path, Path, LeaderboardDocument]) -> None:
    _, out, board = raced
    assert board.race is not None
    dropped = {row.name: row for row in board.dropped_mutations}
    assert len(dropped) == COUNT - KEEP
    assert {row.first_rows.examples for row in dropped.values()} == set(board.race.rows) - {ROWS}
    assert all(row.lineage.id for row in dropped.values())
    others = {row.name for row in (*board.contexts, *board.other_mutations)}
    assert not others & dropped.keys()
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text("utf-8").splitlines()]
    assert not {line["context"] for line in lines} & dropped.keys()
    assert {line["examples"] for line in lines if line["split"] == "selection"} == {ROWS}
    csv = (out / "leaderboard.csv").read_text("utf-8")
    assert not [name for name in dropped if f"{name}," in csv]


def test_a_race_that_is_stopped_goes_on_to_the_same_bytes(
    raced: tuple[Path, Path, LeaderboardDocument], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, _ = raced
    with monkeypatch.context() as patch:
        calls, real = [], race_module.token_scores

        def stopped(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == COUNT + 5:  # in the second round
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        patch.setattr(race_module, "token_scores", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_job(path, tmp_path / "again")
    run_job(path, tmp_path / "again")
    assert artefacts(tmp_path / "again") == artefacts(out)
    parts = [stage for stage in stages_in(tmp_path / "again") if ".race-" in stage]
    assert len(parts) == len(set(parts)), "no part was run twice"


def test_few_mutations_are_all_scored(tmp_path: Path) -> None:
    lines: list[str] = []
    config, base_dir = load_config(write(tmp_path), ("mutations.count=6",))
    with Run(config, base_dir, tmp_path / "out", say=lines.append, bars=False).opened() as run:
        assert len(run.ranked_mutations()) == 6
        assert run.raced().facts is None
    assert any("no race: 4 of 6 mutations on 24 rows leave no room" in line for line in lines)


@pytest.mark.parametrize(
    ("race", "score", "message"),
    [
        ({"keep": 2}, {}, r"race.keep \(2\) is less than best \(4\)"),
        ({}, {"select": "exact-match"}, "a race is decided by the KL or gold_nll of rows, not by select 'exact-match'"),
        ({"share": 1.0}, {}, "score.race.share"),
    ],
)
def test_a_race_that_cannot_be_run_is_refused(
    tmp_path: Path, race: dict[str, Any], score: dict[str, Any], message: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        racing(**race)(config)
        config["score"] |= score

    with pytest.raises(InputError, match=message):
        load_config(write_job(tmp_path, change))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spread-mutations:2", "needs every mutation's KL"),
        ("diverse-mutations:2", "needs every mutation's KL"),
        ("best-mutations:5", r"more mutations than the race leaves \(4\)"),
        ("best-mutations:4", None),
        ("random-mutations:9", None),
    ],
)
def test_orders_that_a_race_leaves_unknown_are_refused(tmp_path: Path, spec: str, message: str | None) -> None:
    config, _ = load_config(write(tmp_path))
    name = ContextName.parse(spec, "students.a.contexts")
    if message is None:
        check_raced(config, name, "students.a.contexts")
        return
    with pytest.raises(InputError, match=message):
        check_raced(config, name, "students.a.contexts")


def test_the_parts_of_a_race_are_one_score() -> None:
    from kvopt.measure.score import TokenScores

    def made(counts: list[int], first: int) -> TokenScores:
        values = torch.arange(first, first + sum(counts), dtype=torch.float32)
        return TokenScores(values, -values, values > 2, torch.tensor(counts))

    both = race_module.joined([made([1, 2], 0), made([3], 3)])
    assert both.counts.tolist() == [1, 2, 3]
    assert both.by_example(both.kl).tolist() == [0.0, 3.0, 12.0]
