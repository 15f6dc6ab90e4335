"""The leaderboard as a table on a terminal: what is left of it where the terminal is narrow."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.report.board_table import board_lines, board_table
from kvopt.report.choice import recommended

LONG = "a-context-whose-name-is-longer-than-anybody-would-choose"


def row(name: str, tokens: int, kl: float, kind: str = "text", **more: Any) -> dict[str, Any]:
    interval = more.pop("ci95", [kl * 0.9, kl * 1.1])
    return {
        "name": name, "kind": kind, "tokens": tokens, "gold_nll": 1.5, "top1_agreement": 0.9, "examples": 24,
        "gold_tokens": 200, "kl_forward": {"mean": kl, "ci95": interval, "p95": kl * 4}, **more,
    }  # fmt: skip


def board(**more: Any) -> LeaderboardDocument:
    rows = [
        row("original", 86, 0.0, ci95=[0.0, 1e-12]),
        row("m003", 84, 0.01),
        row("kv-32", 32, 0.02, "kv", separable_from_best=False),
        row(LONG, 12, 0.5, "soft", separable_from_best=True),
        row("none", 0, 1.0),
    ]
    document = {
        "name": "job", "base": "tiny", "template_tokens": 86, "contexts": rows,
        "rows": {"train": 10, "selection": 4, "validation": 24},
        "noise_floor": {"kl_forward": 1e-7, "dtype": "float32"},
    }  # fmt: skip
    return LeaderboardDocument.model_validate(document | more)


def printed(document: LeaderboardDocument, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(board_table(document))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def flat(text: str) -> str:
    return " ".join(text.split())


def heading(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(" context"))


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (40, ["context", "tokens", "forward KL"]),
        (60, ["context", "tokens", "forward KL", "kept %"]),
        (80, ["context", "tokens", "forward KL", "kept %", "95 % interval", "top-1"]),
        (100, ["context", "tokens", "forward KL", "kept %", "95 % interval", "top-1", "gold NLL", "p95", "kind"]),
        (140, ["context", "tokens", "forward KL", "kept %", "95 % interval", "top-1", "gold NLL", "p95", "kind"]),
    ],
)
def test_columns_fall_away_from_the_right(width: int, columns: list[str]) -> None:
    text = printed(board(), width)
    assert heading(text).split() == " ".join(columns).split()
    assert max(map(len, text.splitlines())) <= width
    for name in ("original", "m003", "kv-32 *", "none", LONG[:8]):
        assert any(line.startswith(f" {name}") for line in text.splitlines()), name
    assert LONG in "".join(line.split()[0] for line in text.splitlines() if line.strip())
    assert ("in a wider terminal: " in flat(text)) is (len(columns) < 9)


def test_a_name_takes_the_room_that_is_left() -> None:
    assert LONG in printed(board(), 140)


def test_what_a_context_keeps_is_shown() -> None:
    (line,) = [line for line in printed(board(), 140).splitlines() if line.startswith(" kv-32")]
    assert "98.0" in line.split()


def test_the_metric_of_the_task_stands_before_the_interval() -> None:
    rows = [row("original", 86, 0.0), row("kv-32", 32, 0.02, "kv", metrics={"exact-match": {"mean": 0.75}})]
    document = board(contexts=rows, headlines=["exact-match"], answered=16)
    text = printed(document, 140)
    assert heading(text).index("exact-match") < heading(text).index("95 %")
    assert "0.750" in text
    assert "exact-match: of 16 answers" in text
    assert "exact-match 0.750" in board_lines(document)["kv-32"]
    assert "–" in next(line for line in text.splitlines() if line.startswith(" original"))


def test_the_recommended_context_has_a_mark() -> None:
    assert recommended(board()) == "kv-32"
    closest = board(contexts=[row("original", 86, 0.0), row("m003", 84, 0.01), row("none", 0, 1.0)])
    assert recommended(closest) == "m003"
    assert "m003 *" in printed(closest, 80)
    assert "* recommended" in flat(printed(closest, 80))
    alone = board(contexts=[row("original", 86, 0.0), row("none", 0, 1.0)])
    assert recommended(alone) is None
    assert "*" not in printed(alone, 80)


def test_rounding_is_no_interval() -> None:
    (line,) = [line for line in printed(board(), 140).splitlines() if line.startswith(" original")]
    assert "0.0000–0.0000" not in line


def test_names_are_not_read_as_markup() -> None:
    assert "[red]x" in printed(board(contexts=[row("[red]x", 3, 0.5)]), 80)


def test_an_unfinished_board_says_so() -> None:
    assert "not complete yet" in printed(board(complete=False), 140)
    assert "not complete yet" not in printed(board(), 140)


def test_each_context_is_a_line_in_a_log() -> None:
    assert board_lines(board())["kv-32"] == "kv-32: 32 tokens, forward KL 0.0200, top-1 90.0%, kept 98.0 %"
