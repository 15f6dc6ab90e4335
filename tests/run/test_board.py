"""The leaderboard while it grows: the order, what is written after each context, one's own wordings, task metrics, and
that no row is computed that nothing needs.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from kvopt.config.document import load_config
from kvopt.documents.answers_file import AnswersDocument
from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.errors import InputError
from kvopt.learning.descent import batch_at
from kvopt.measure.paired import holm, optimism, sign_flip_p
from kvopt.run.run import Run
from tests.jobs import entries, rows, run_job, stages_in, write_job

SHORT = "Sort the message: weather, music or book."
METRICS = ["exact-match", {"kind": "regex", "name": "a-word", "pattern": "[a-z]"}]


def job(folder: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """The job with a wording of the user's own, a context without steps, and metrics."""

    def whole(config: dict[str, Any]) -> None:
        config["contexts"].insert(2, {"name": "short", "text": "short.txt"})
        config["contexts"].append({"name": "kv-4", "tokens": 4, "init": "strided", "steps": 0})
        config["evaluate"] = {"rows": 5, "max_new_tokens": 4, "metrics": METRICS}
        if change:
            change(config)

    path = write_job(folder, whole)
    (folder / "short.txt").write_text(SHORT, "utf-8")
    return path


def open_job(path: Path, out: Path) -> Run:
    config, base_dir = load_config(path)
    return Run(config, base_dir, out, say=lambda line: None, bars=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[LeaderboardDocument], LeaderboardDocument]:
    """The run's folder, the boards as they were shown, and the last one."""
    place = tmp_path_factory.mktemp("board")
    shown: list[LeaderboardDocument] = []
    stored: list[LeaderboardDocument] = []

    def keep(board: LeaderboardDocument) -> None:
        shown.append(board)
        stored.append(LeaderboardDocument.model_validate(entries(place / "out/leaderboard.json")))

    with open_job(job(place), place / "out").opened() as run:
        board = run.run(keep)
    assert stored == shown, "what is shown is what is written"
    return place / "out", shown, board


def test_contexts_come_cheapest_first_and_each_is_on_the_board_at_once(finished: Any) -> None:
    _, shown, board = finished
    names = [{row.name for row in one.contexts} for one in shown]
    order = [(after - before).pop() for before, after in zip([set(), *names], names, strict=False)]
    assert [name for name in order if not name.startswith("m0")] == [
        "original", "none", "short", "kv-4", "soft-6", "kv-best", "kv-8",
    ]  # fmt: skip
    mutations = [place for place, name in enumerate(order) if name.startswith("m0")]
    assert mutations == [4, 5], "before the contexts that take steps"
    assert all(one.complete is False for one in shown)
    assert board.complete
    assert "complete" not in board.to_json()


def test_pairs_are_compared_row_by_row_with_the_chosen_contexts(finished: Any) -> None:
    out, shown, board = finished
    rows = {row.name: row for row in board.contexts}
    rivals = [row for row in board.contexts if row.name not in ("original", "none")]
    assert all(row.selection is not None for row in rivals)
    closest = min(rivals, key=lambda row: row.selection.kl_forward.mean if row.selection else math.inf)
    best = rows[board.recommended or ""]
    assert best.tokens <= 0.75 * board.template_tokens or best is closest
    assert (closest.separable_from_best, rows["original"].separable_from_best) == (None, None)
    with open_job(out.parent / "job.yaml", out).opened() as run:
        names = [row.name for row in rivals] + ["none"]
        contexts = {context.name: context for name in names for context in run.stored_contexts(name)}
        scores = {name: run.token_scores(context) for name, context in contexts.items()}
    sums = {name: one.by_example(one.kl).numpy() for name, one in scores.items()}
    counts = scores["none"].counts.numpy()
    for to, others in ((best.name, "difference"), (closest.name, "separable_from_best")):
        found = {name: sign_flip_p(sums[name] - sums[to]) for name in names if name != to}
        corrected = dict(zip(found, holm(list(found.values())), strict=True))
        for name, p in corrected.items():
            if others == "separable_from_best":
                assert rows[name].separable_from_best is (p is not None and p <= 0.05)
                continue
            difference = rows[name].difference
            assert difference is not None
            assert (difference.to, difference.p) == (to, pytest.approx(p))
            assert difference.mean == pytest.approx((sums[name] - sums[to]).sum() / counts.sum())
    picked = np.stack([sums[row.name] for row in rivals])
    expected = optimism(picked, counts, seed=run.config.seed, resamples=run.config.score.resamples)
    assert board.picking == pytest.approx(expected)
    assert all(row.difference is None for one in shown for row in one.contexts), "not before all are there"


def test_a_run_that_was_stopped_leaves_the_board_so_far(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(board: LeaderboardDocument) -> None:
        if len(board.contexts) == 3:
            raise Stopped

    path = job(tmp_path)
    with pytest.raises(Stopped), open_job(path, tmp_path / "out").opened() as run:
        run.run(stop)
    left = LeaderboardDocument.model_validate(json.loads((tmp_path / "out/leaderboard.json").read_text()))
    assert ({row.name for row in left.contexts}, left.complete) == ({"original", "none", "short"}, False)
    with open_job(path, tmp_path / "out").opened() as run:
        again = run.run()
    assert len(again.contexts) == 9
    twice = {stage for stage, count in Counter(stages_in(tmp_path / "out")).items() if count > 1}
    assert twice == {"reference", "scores/original.validation"}, "its two parts, and the noise floor: nothing else"


def test_the_users_own_wording_is_scored_like_a_mutation_of_the_same_text(finished: Any) -> None:
    out, _, board = finished
    row = next(row for row in board.contexts if row.name == "short")
    assert row.kind == "text"
    assert row.template is not None
    assert row.template.messages is not None
    assert row.template.messages[0].content == SHORT
    assert "template" not in next(row for row in board.contexts if row.name == "original").to_json()
    with open_job(out.parent / "job.yaml", out).opened() as run:
        [same] = run.stored_contexts(f"text:{out.parent / 'short.txt'}")
        assert run.score(same).kl_forward.mean == row.kl_forward.mean > 0


def test_metrics_are_those_of_greedy_answers_by_hand(finished: Any) -> None:
    out, _, board = finished
    answers = AnswersDocument.model_validate(json.loads((out / "answers.json").read_text()))
    assert (board.headlines, answers.headlines, board.answered) == (["exact-match", "a-word"],) * 2 + (5,)
    assert answers.pass_or_fail == ["exact-match", "a-word"]
    gold = {row["text"]: row["output"] for row in rows()}
    assert [example.output for example in answers.examples] == [gold[e.values["text"]] for e in answers.examples]
    for row in board.contexts:
        given = [example.answers[row.name] for example in answers.examples]
        right = [float(a.text.strip() == e.output) for a, e in zip(given, answers.examples, strict=True)]
        words = [float(any("a" <= c <= "z" for c in a.text)) for a in given]
        assert row.metrics is not None
        assert row.metrics["exact-match"].mean == sum(right) / 5
        assert row.metrics["a-word"].mean == sum(words) / 5
        assert [a.metrics["a-word"] for a in given] == words
    some = next(r.metrics["a-word"] for r in board.contexts if r.metrics and 0 < (r.metrics["a-word"].mean or 0) < 1)
    values = [float(any("a" <= c <= "z" for c in e.answers[name].text)) for name in [
        next(r.name for r in board.contexts if r.metrics and r.metrics["a-word"] is some)
    ] for e in answers.examples]  # fmt: skip
    interval = bootstrap((values,), lambda x, axis: x.mean(axis), method="percentile", n_resamples=200, rng=0)
    assert some.ci95 == pytest.approx(tuple(interval.confidence_interval))


def test_a_config_without_metrics_generates_no_answers_for_the_board(tmp_path: Path) -> None:
    run_job(job(tmp_path, lambda c: c.pop("evaluate")), tmp_path / "out")
    assert not (tmp_path / "out/answers.json").exists()
    assert "metrics" not in (tmp_path / "out/leaderboard.json").read_text()


def test_the_reference_holds_the_rows_that_are_used_and_grows(tmp_path: Path) -> None:
    def few(config: dict[str, Any]) -> None:
        config["contexts"] = [{"name": "kv-4", "tokens": 4, "steps": 2, "batch_size": 2, "init": "strided"}]

    path = write_job(tmp_path, few)
    run_job(path, tmp_path / "out")
    with open_job(path, tmp_path / "out").opened() as run:
        reference, dataset = run.reference(), run.task().dataset
        drawn = {dataset.train[i].id for step in range(2) for i in batch_at(step, len(dataset.train), 2, 0)}
        scored = {example.id for example in (*dataset.selection, *dataset.validation)}
        assert set(reference.index) == drawn | scored
        assert 0 < len(drawn) < len(dataset.train)
        before = {i: reference.hidden([i]) for i in reference.index}
        whole = run.whole_reference()
        assert set(whole.index) == {example.id for example in run.inputs.examples}
        assert all((whole.hidden([i]) == states).all() for i, states in before.items()), "what is stored stays"


def test_a_wording_that_is_scored_lands_on_the_board_and_stays(tmp_path: Path, kvopt: Any) -> None:
    path, out = job(tmp_path), tmp_path / "out"
    before = run_job(path, out)
    (tmp_path / "mine.txt").write_text("Label it: weather, music, book.", "utf-8")
    assert kvopt("score", str(path), "--context", f"text:{tmp_path / 'mine.txt'}", "--out", str(out))[0] == 0
    names = {row["name"] for row in json.loads((out / "leaderboard.json").read_text())["contexts"]}
    assert names == {row["name"] for row in before["contexts"]} | {"mine"}
    assert "Label it: weather" in (out / "report.html").read_text("utf-8")
    answers = json.loads((out / "answers.json").read_text())
    assert all("mine" in example["answers"] for example in answers["examples"])
    (tmp_path / "mine.txt").unlink()
    after = run_job(path, out)
    assert names == {row["name"] for row in after["contexts"]}, "the board has its text"
    assert "mine" in json.dumps(json.loads((out / "answers.json").read_text())["contexts"])


def test_scoring_a_wording_first_makes_a_board(tmp_path: Path, kvopt: Any) -> None:
    path, out = job(tmp_path), tmp_path / "out"
    (tmp_path / "mine.txt").write_text("Label it.", "utf-8")
    assert kvopt("score", str(path), "--context", f"text:{tmp_path / 'mine.txt'}", "--out", str(out))[0] == 0
    board = json.loads((out / "leaderboard.json").read_text())
    assert {row["name"] for row in board["contexts"]} == {"original", "none", "mine"}


def test_a_wording_does_not_take_the_place_of_another_context(tmp_path: Path) -> None:
    path, out = job(tmp_path), tmp_path / "out"
    run_job(path, out)
    (tmp_path / "kv-8.txt").write_text("Label it.", "utf-8")
    with open_job(path, out).opened() as run, pytest.raises(InputError, match="kv-8: is the name of another context"):
        run.put_on_board(run.stored_contexts(f"text:{tmp_path / 'kv-8.txt'}"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "own", "text": "short.txt", "steps": 3}, "steps is for contexts that are learned"),
        ({"name": "own", "text": "absent.txt"}, "absent.txt"),
        ({"name": "own", "text": "slots.txt"}, "has the slots other, the template has text"),
        ({"name": "m001", "text": "short.txt"}, "is the name of a mutation"),
    ],
)
def test_wrong_wordings_are_told_before_any_work(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    path = job(tmp_path, lambda config: config["contexts"].append(entry))
    (tmp_path / "slots.txt").write_text("Sort {{other}}.", "utf-8")
    with pytest.raises(InputError, match=message):
        open_job(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wording_is_a_context_by_its_name_everywhere(tmp_path: Path, kvopt: Any) -> None:
    path, out = job(tmp_path), tmp_path / "out"
    run_job(path, out)
    with open_job(path, out).opened() as run:
        assert [context.name for context in run.stored_contexts("short")] == ["short"]
    assert kvopt("export", f"{out}#short", "--to", "text", "--out", str(tmp_path / "text"))[0] == 0
    assert SHORT in "".join(p.read_text("utf-8") for p in (tmp_path / "text").iterdir() if p.suffix != ".md")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def wordings(out: Path) -> list[str]:
    board = json.loads((out / "leaderboard.json").read_text())
    return sorted(row["name"] for row in board["contexts"] if "template" in row)


def test_a_run_that_dies_keeps_the_wordings_that_were_scored_onto_its_board(tmp_path: Path) -> None:
    """The board is written again from its first row on: those that come later must be on it all the time."""
    path, out = job(tmp_path, lambda c: c.update(contexts=c["contexts"][:1])), tmp_path / "out"
    (tmp_path / "mine.txt").write_text("Sort it.", "utf-8")

    def die(board: LeaderboardDocument) -> None:
        assert "mine" in wordings(out)
        if len(board.contexts) > 2:
            raise Killed

    def score(run: Run) -> list[str]:
        board = run.put_on_board(run.stored_contexts(f"text:{tmp_path / 'mine.txt'}"))
        assert board is not None
        return sorted(row.name for row in board.contexts)

    with open_job(path, out).opened() as run:
        assert score(run) == ["mine", "none", "original"]
    with pytest.raises(Killed), open_job(path, out).opened() as run:
        run.run(die)
    with open_job(path, out).opened() as run:
        run.run()
    assert wordings(out) == ["mine"]
    assert json.loads((out / "leaderboard.json").read_text()).get("complete", True) is True


@pytest.mark.parametrize("stops_at", ["answers.json", "leaderboard.csv", "leaderboard.json"])
def test_a_scoring_that_dies_anywhere_ends_in_the_same_board_when_it_is_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: str
) -> None:
    from kvopt.storage import files

    path = job(tmp_path, lambda c: c.update(contexts=[]))
    (tmp_path / "mine.txt").write_text("Sort it.", "utf-8")

    def score(out: Path) -> None:
        with open_job(path, out).opened() as run:
            run.put_on_board(run.stored_contexts(f"text:{tmp_path / 'mine.txt'}"))

    score(tmp_path / "whole")
    write = files.write_bytes
    died = 0

    def dies(target: Path | str, data: bytes) -> None:
        nonlocal died
        if Path(target).name == stops_at and (stops_at != "leaderboard.json" or b'"mine"' in data):
            died += 1
            raise Killed
        write(target, data)

    monkeypatch.setattr(files, "write_bytes", dies)
    with pytest.raises(Killed):
        score(tmp_path / "out")
    assert died == 1
    monkeypatch.setattr(files, "write_bytes", write)
    score(tmp_path / "out")
    for name in ("leaderboard.json", "leaderboard.csv", "answers.json", "scores.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
