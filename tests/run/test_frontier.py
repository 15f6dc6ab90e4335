"""``kvopt frontier``: three kinds of context at the same lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.run.frontier import in_words, shortest
from tests.jobs import write_job

Kvopt = Callable[..., tuple[int, str, str]]
QUICK = ("--rows", 3, "--exchanges", 0, "--steps", 2)


def test_three_kinds_at_the_same_lengths(kvopt: Kvopt, tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", lambda config: config["contexts"].append({"name": "mine", "text": "mine.txt"}))
    (tmp_path / "job/mine.txt").write_text("Sort the message: weather, music or book.", "utf-8")
    code, out, err = kvopt("frontier", path, "--tokens", 60, "--tokens", 40, "--tokens", 2, *QUICK, "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["contexts"]}
    assert set(rows) == {
        "original", "none", "mine", "short-60", "short-40", "soft-60", "soft-40", "soft-2", "kv-60", "kv-40", "kv-2",
    }  # fmt: skip
    assert "no text: 2 tokens wanted, but" in err
    assert rows["soft-40"]["tokens"] == rows["short-40"]["tokens"] <= 40
    assert rows["soft-2"]["tokens"] == rows["kv-2"]["tokens"] == 2
    history = json.loads(Path("runs/job-frontier/contexts/soft-40/kvopt.json").read_text("utf-8"))
    assert json.dumps(history).count("held_out_kl") >= 2
    code, out, err = kvopt("frontier", path, "--tokens", 60, "--tokens", 40, "--tokens", 2, *QUICK)
    assert code == 0, err
    assert " tokens -> " in out or "nothing here keeps 97.0%" in out


def test_bad_input(kvopt: Kvopt, tmp_path: Path) -> None:
    path = write_job(tmp_path / "job")
    code, _, err = kvopt("frontier", path, "--kind", "words")
    assert (code, "no kind 'words' (one of text, soft, kv)" in err) == (2, True)
    code, _, err = kvopt("frontier", path, "--tokens", 4000)
    assert code == 2
    assert "4000 tokens wanted, the template has" in err.splitlines()[-1]


def test_the_shortest_of_each_kind_in_words() -> None:
    def row(name: str, kind: str, tokens: int, kl: float) -> dict[str, object]:
        counts = {"examples": 4, "gold_tokens": 9}
        scores = {"kl_forward": {"mean": kl, "ci95": None, "p95": kl}, "gold_nll": 1.0, "gold_nll_ci95": None}
        return {"name": name, "kind": kind, "tokens": tokens, "top1_agreement": 1.0, **scores, **counts}

    board = LeaderboardDocument.model_validate(
        {
            "name": "job", "base": "b", "template_tokens": 100,
            "rows": {"train": 1, "selection": 1, "validation": 4},
            "noise_floor": {"kl_forward": 0.0, "dtype": "float32"},
            "contexts": [
                row("original", "text", 100, 0.0), row("none", "text", 0, 1.0), row("kv-16", "kv", 16, 0.02),
                row("kv-32", "kv", 32, 0.01), row("kv-8", "kv", 8, 0.2), row("short-70", "text", 70, 0.03),
                row("soft-64", "soft", 64, 0.5),
            ],
        }
    )  # fmt: skip
    found = shortest(board, 0.97)
    assert {kind: row and row.name for kind, row in found.items()} == {"text": "short-70", "soft": None, "kv": "kv-16"}
    assert in_words(board, 0.97) == (
        "100 tokens -> 70 tokens of text or 16 KV slots keep 97.0% (soft: none that is this close)"
    )
    assert in_words(board, 0.999) == "nothing here keeps 99.9%; kv-32 keeps 99.0%"
