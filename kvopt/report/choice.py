"""Which context to take and why, in words: the closest one, the best shorter one, and what cannot be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvopt.config.names import MUTATION
from kvopt.documents.choosing import BUILT_IN, choice
from kvopt.documents.leaderboard_file import LeaderboardDocument, LeaderboardRow
from kvopt.documents.scores_file import SplitScores

DUST = 1e-9  # widths of intervals, by the size of their ends, that are rounding errors


def rivals(board: LeaderboardDocument) -> list[LeaderboardRow]:
    """The contexts that are compared (not the original, nor "no context"), lowest forward KL first."""
    rows = [row for row in board.contexts if row.name not in BUILT_IN]
    return sorted(rows, key=lambda row: (row.kl_forward.mean, row.name))


def on_selection(board: LeaderboardDocument) -> list[tuple[str, SplitScores]]:
    """Every mutation with its numbers on the rows that it was chosen by."""
    reported = [(row.name, row.selection) for row in board.contexts if is_mutation(row) and row.selection is not None]
    return [*reported, *((row.name, row.selection) for row in board.other_mutations)]


def pareto_front(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Those that no other beats in both tokens and KL, shortest first."""
    front: list[LeaderboardRow] = []
    for row in sorted(rows, key=lambda row: (row.tokens, row.kl_forward.mean, row.name)):
        if not front or row.kl_forward.mean < front[-1].kl_forward.mean:
            front.append(row)
    return front


def share_kept(row: LeaderboardRow, board: LeaderboardDocument) -> float | None:
    """1 − KL / KL of no context: how much of the template's effect a context keeps; None without "no context"."""
    bare = next((r.kl_forward.mean for r in board.contexts if r.name == "none"), None)
    return 1 - row.kl_forward.mean / bare if bare and bare > 0 else None


def is_mutation(row: LeaderboardRow) -> bool:
    """Whether a row is another wording that a search made of the original."""
    return bool(row.lineage.id) or MUTATION.fullmatch(row.name) is not None


def is_shortened(row: LeaderboardRow) -> bool:
    """Whether a row is the template's own text, shortened by kvopt."""
    return row.lineage.family == "extract"


def own_prompt(board: LeaderboardDocument) -> LeaderboardRow | None:
    """The user's own wording that is closest to the original, of those that are shorter where there are such; None
    where the board has no text context but the original, no context and mutations.
    """
    written = [row for row in rivals(board) if row.kind == "text" and row.template is not None]
    own = [row for row in written if not is_mutation(row) and not is_shortened(row)]
    return min(own, key=lambda row: row.tokens >= board.template_tokens, default=None)


def recommended(board: LeaderboardDocument) -> str | None:
    """The name of the context to take: the best shorter one, or the closest where no shorter one is advised."""
    return choice(board).recommended


def advice(board: LeaderboardDocument) -> dict[str, Any]:
    """``closest`` and ``shorter`` (names or None), ``ties`` (names not separable from the closest), ``sentences``."""
    rows = rivals(board)
    if not rows:
        return {
            "closest": None,
            "shorter": None,
            "ties": [],
            "sentences": ["This run has no contexts to choose from: only the original template and no context at all."],
        }
    chosen = choice(board)
    closest, advised, worse = chosen.closest or rows[0], chosen.shorter, chosen.far
    ties = [row for row in rows if row is not closest and row.separable_from_best is False]
    sentences = [_lead(advised, closest, board)]
    if advised is not None and advised is not closest:
        sentences.append(f"{_is_closest(closest, ties)}: {_distance(closest)} with {_tokens(closest)}.")
    elif ties:
        sentences.append(_not_separable(closest, ties))
    if rows[0] is not closest:
        lower = f"{rows[0].name} has {number(rows[0].kl_forward.mean)} on the rows reported here"
        sentences.append(f"{lower}; contexts are chosen by other rows, the selection rows.")
    if worse is not None:
        kept = share_kept(worse, board)
        share = f", {kept:.0%} of the template's effect" if kept is not None and kept > 0 else ""
        what = f"{worse.name} with {_tokens(worse)} at {_distance(worse)}{share}"
        sentences.append(f"Nothing much shorter comes close: the best is {what}.")
    if len(rows) > 1 and closest.kl_forward.ci95 is None:
        sentences.append("A single validation row gives no intervals: these contexts cannot be told apart by it.")
    floor = board.noise_floor.kl_forward
    if closest.kl_forward.mean <= floor:
        sentences.append(f"{closest.name} is within the noise floor of {number(floor)}: as close as can be measured.")
    return {
        "closest": closest.name,
        "shorter": advised.name if advised else None,
        "ties": [row.name for row in ties],
        "sentences": sentences,
    }


def _lead(advised: LeaderboardRow | None, closest: LeaderboardRow, board: LeaderboardDocument) -> str:
    if advised is None:
        return f"{closest.name} is closest to the template: {_distance(closest)} with {_tokens(closest)}."
    kept = share_kept(advised, board)
    bare = f" ({kept:.1%} of the template's effect)" if kept is not None else ""
    words = f"{advised.tokens} of {board.template_tokens} tokens"
    return f"{advised.name} keeps the template's behaviour to {_distance(advised)} with {words}{bare}."


def _is_closest(closest: LeaderboardRow, ties: Sequence[LeaderboardRow]) -> str:
    if not ties:
        return f"{closest.name} is closest"
    return f"{closest.name} is closest, though not separable from {_list(ties)}"


def _not_separable(closest: LeaderboardRow, ties: Sequence[LeaderboardRow]) -> str:
    verb = "is" if len(ties) == 1 else "are"
    return f"{_list(ties)} {verb} not separable from {closest.name} by a paired test on these rows."


def _list(rows: Sequence[LeaderboardRow], most: int = 3) -> str:
    names = [row.name for row in rows]
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _distance(row: LeaderboardRow) -> str:
    interval = shown_interval(row.kl_forward.ci95)
    spread = f" (95 % interval {number(interval[0])}–{number(interval[1])})" if interval else ""
    return f"{number(row.kl_forward.mean)} nats per gold token{spread}"


def _tokens(row: LeaderboardRow) -> str:
    return f"{row.tokens} token" + ("" if row.tokens == 1 else "s")


def shown_interval(interval: Sequence[float] | None) -> tuple[float, float] | None:
    """An interval that says something; None where it is as narrow as rounding errors (all rows or seeds are equal)."""
    if interval is None:
        return None
    low, high = interval
    return None if high - low <= DUST * max(1.0, abs(low), abs(high)) else (low, high)


def signed(value: float, digits: int = 3) -> str:
    """``+0.120`` or ``−0.120``; what rounds to nothing has no sign."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def number(value: float) -> str:
    """Four decimals, five below 0.001, and two significant digits where these would show nothing."""
    if value == 0 or abs(value) >= 0.00095:
        return f"{value:.4f}"
    return f"{value:.5f}" if abs(value) >= 0.000095 else f"{value:.1e}"
