"""How short the template can get, in one sentence: the shortest context of each kind that is close enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvopt.documents.choosing import SHORTER, deciding_share
from kvopt.documents.leaderboard_file import LeaderboardDocument, LeaderboardRow
from kvopt.errors import counted
from kvopt.report.choice import number, rivals, share_kept

KEPT_IN_WORDS = 0.97
"""The share of the template's effect that is asked for where nobody says another."""
KINDS = ("kv", "soft", "text")
LENGTHS = {"text": ("token of text", "tokens of text"), "soft": ("soft slot", None), "kv": ("KV slot", None)}


def shortest(board: LeaderboardDocument, keep: float) -> dict[str, LeaderboardRow | None]:
    """Of each kind that was tried at three quarters of the template's length or less, the shortest context that keeps
    this share of its effect, by the selection rows; None where none does.
    """
    rows = _shorter(board)
    fit = [row for row in rows if (deciding_share(row, board) or 0.0) >= keep]
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    return {
        kind: min((row for row in fit if row.kind == kind), key=lambda row: row.tokens, default=None) for kind in kinds
    }


def in_words(board: LeaderboardDocument, keep: float) -> str | None:
    """``163 tokens → 24 KV slots, 64 soft slots or 70 tokens of text keep 97 %``; None where nothing is shorter."""
    found = shortest(board, keep)
    if not found:
        return None
    reached = [row for row in found.values() if row is not None]
    if not reached:
        nearest = _shorter(board)[0]
        share = share_kept(nearest, board)
        kept = f"; {nearest.name}, with {_length(nearest)}, keeps {share:.1%}" if share is not None else ""
        return f"nothing shorter keeps {keep:.1%}{kept}"
    missing = [kind for kind, row in found.items() if row is None]
    said = f"{counted(board.template_tokens, 'token')} → {_listed(map(_length, reached))} keep {keep:.1%}"
    return said + (f" ({', '.join(missing)}: none that is this close)" if missing else "")


def as_found(board: LeaderboardDocument, found: Mapping[str, str | None], limit: str) -> str:
    """The same for contexts that were looked for: chosen by the selection rows, measured on the validation rows."""
    rows = {row.name: row for row in board.contexts}
    reached = [rows[name] for name in found.values() if name is not None]
    missing = [kind for kind, name in found.items() if name is None]
    if not reached:
        near = in_words(board, 1.0)
        return f"no shorter context of any kind has {limit}" + (f"; {near}" if near else "")
    texts = [f"{_length(row)} ({row.name}: {number(row.kl_forward.mean)} on validation rows)" for row in reached]
    said = f"{counted(board.template_tokens, 'token')} → {_listed(texts)}, for {limit} on the rows that decided"
    return said + (f" ({', '.join(missing)}: none)" if missing else "")


def _shorter(board: LeaderboardDocument) -> list[LeaderboardRow]:
    return [row for row in rivals(board) if row.tokens <= SHORTER * board.template_tokens]


def _length(row: LeaderboardRow) -> str:
    return counted(row.tokens, *LENGTHS[row.kind])


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} or {last}" if first else last
