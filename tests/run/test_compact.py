"""``kvopt compact``: a short KV cache at once, without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.jobs import write_job

Kvopt = Callable[..., tuple[int, str, str]]


def test_a_quarter_of_the_template_at_once(kvopt: Kvopt, tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", lambda config: config["contexts"].append({"name": "short", "text": "short.txt"}))
    (tmp_path / "job/short.txt").write_text("Sort the message: weather, music or book.", "utf-8")
    code, out, err = kvopt("compact", path, "--json")
    assert code == 0, err
    board = json.loads(out)
    quarter = board["template_tokens"] // 4
    rows = {row["name"]: row for row in board["contexts"]}
    assert set(rows) == {"original", "none", "short", f"compact-{quarter}"}
    assert rows[f"compact-{quarter}"]["tokens"] == quarter
    assert rows[f"compact-{quarter}"]["kind"] == "kv"
    ledger = [json.loads(line) for line in Path("runs/job-compact/ledger.jsonl").read_text("utf-8").splitlines()]
    assert not [entry for entry in ledger if entry["stage"] in ("mutations", "contexts/kv-8")]
    assert Path("runs/job-compact/report.html").is_file()
    code, _, err = kvopt("export", f"runs/job-compact#compact-{quarter}", "--to", "peft", "--out", "exported")
    assert code == 0, err


def test_lengths_that_were_asked_for_and_one_that_is_too_long(kvopt: Kvopt, tmp_path: Path) -> None:
    path = write_job(tmp_path / "job")
    code, out, err = kvopt("compact", path, "--tokens", 8, "--tokens", 16, "--out", "here")
    assert code == 0, err
    assert "compact-16" in out
    assert "next: kvopt export 'here#compact-" in err
    code, _, err = kvopt("compact", path, "--tokens", 4000)
    assert code == 2
    assert "--tokens: 4000 slots wanted, the template has" in err.splitlines()[-1]
