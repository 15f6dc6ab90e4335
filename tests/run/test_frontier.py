"""``kvopt frontier``: three kinds of context at the same lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.report.frontier_words import in_words
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
    assert "no short-2: 2 tokens wanted, but" in err
    assert rows["soft-40"]["tokens"] == rows["short-40"]["tokens"] <= 40
    assert rows["soft-2"]["tokens"] == rows["kv-2"]["tokens"] == 2
    history = json.loads(Path("runs/job-frontier/contexts/soft-40/kvopt.json").read_text("utf-8"))
    assert json.dumps(history).count("held_out_kl") >= 2
    code, out, err = kvopt("frontier", path, "--tokens", 60, "--tokens", 40, "--tokens", 2, *QUICK)
    assert code == 0, err
    board = LeaderboardDocument.model_validate_json(Path("runs/job-frontier/leaderboard.json").read_text("utf-8"))
    assert in_words(board, 0.97) in out.splitlines()


def test_bad_input(kvopt: Kvopt, tmp_path: Path) -> None:
    path = write_job(tmp_path / "job")
    code, _, err = kvopt("frontier", path, "--kind", "words")
    assert (code, "no kind 'words' (one of text, soft, kv)" in err) == (2, True)
    code, _, err = kvopt("frontier", path, "--max-kl", 0.1, "--tokens", 30)
    assert (code, "--max-kl: is a question of its own" in err) == (2, True)


def test_the_shortest_of_each_kind_is_looked_for(kvopt: Kvopt, tmp_path: Path) -> None:
    path = write_job(tmp_path / "job")
    asked = ("frontier", path, "--max-kl", 0.02, "--seconds", 30, *QUICK)
    code, out, err = kvopt(*asked)
    assert code == 0, err
    sentence = next(line for line in out.splitlines() if " tokens → " in line)
    board = json.loads(Path("runs/job-frontier/leaderboard.json").read_text("utf-8"))
    probes = {row["name"]: row["tokens"] for row in board["contexts"] if row["kind"] in ("soft", "kv")}
    said = [line for line in err.splitlines() if "(at most 0.0200)" in line]
    for kind in ("soft", "kv"):
        tried = {line.split(":")[0]: " holds " in line for line in said if line.startswith(f"{kind}-")}
        holds = [probes[name] for name, held in tried.items() if held]
        fails = [probes[name] for name, held in tried.items() if not held]
        assert set(tried) == {name for name in probes if name.startswith(kind)}
        assert max(fails, default=0) < min(holds, default=10**9)
        if holds:
            assert f"({kind}-{min(holds)}: " in sentence
            assert min(holds) - max(fails, default=0) <= max(1, 0.1 * min(holds))
    steps = json.loads(Path("runs/job-frontier/frontier.json").read_text("utf-8"))["steps"]
    assert set(steps) == set(probes)
    assert all(0 <= count <= 2 for count in steps.values())
    first = Path("runs/job-frontier/leaderboard.json").read_bytes()
    code, out, err = kvopt(*asked)
    assert code == 0, err
    assert sentence in out
    assert Path("runs/job-frontier/leaderboard.json").read_bytes() == first


def test_in_the_config(kvopt: Kvopt, tmp_path: Path) -> None:
    item = {"kind": "frontier", "tokens": [40, 60, 2], "steps": 1, "rows": 3, "exchanges": 0}
    path = write_job(tmp_path / "job", lambda config: config.update(contexts=[item]))
    code, out, err = kvopt("run", path, "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["contexts"] if row["kind"] != "text" or row.get("template")}
    assert set(rows) - {"original", "none"} >= {"short-60", "short-40", "soft-60", "soft-40", "soft-2", "kv-60", "kv-2"}
    assert "no short-2: 2 tokens wanted, but" in err
    assert "it starts from the most attended tokens of a longer text" in err
    assert (rows["soft-2"]["tokens"], rows["kv-2"]["tokens"]) == (2, 2)
    code, _, err = kvopt("validate", path, "--set", "contexts.0.tokens=[4000]")
    assert (code, "contexts.frontier.tokens: 4000 tokens wanted, the template has" in err) == (2, True)
    code, _, err = kvopt("validate", path, "--set", "contexts.0.token=[40]")
    assert (code, "did you mean 'tokens'?" in err) == (2, True)
    code, _, err = kvopt("frontier", path, "--tokens", 4000)
    assert code == 2
    assert "4000 tokens wanted, the template has" in err.splitlines()[-1]
