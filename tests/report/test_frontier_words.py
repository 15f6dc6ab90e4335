"""How short the template can get, in words."""

from __future__ import annotations

from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.report.frontier_words import as_found, in_words, shortest


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
        "100 tokens → 16 KV slots or 70 tokens of text keep 97.0% (soft: none that is this close)"
    )
    assert as_found(board, {"kv": "kv-32", "soft": None}, "a forward KL of at most 0.01") == (
        "100 tokens → 32 KV slots (kv-32: 0.0100 on validation rows), for a forward KL of at most 0.01 on the rows that"
        " decided (soft: none)"
    )
    assert as_found(board, {"soft": None}, "99.9% kept").startswith(
        "no shorter context of any kind has 99.9% kept; noth"
    )
    long = board.model_copy(update={"contexts": [row for row in board.contexts if row.kind == "text"][:2]})
    assert in_words(long, 0.97) is None
    assert as_found(long, {"kv": None}, "x") == "no shorter context of any kind has x"
    assert in_words(board, 0.999) == "nothing shorter keeps 99.9%; kv-32, with 32 KV slots, keeps 99.0%"
