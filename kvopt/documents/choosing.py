"""Which context to take: chosen by the selection rows, so that the validation rows, which report it, had no part in it.

Old leaderboards have scores on selection rows for mutations alone; there the validation rows decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvopt.documents.leaderboard_file import LeaderboardDocument, LeaderboardRow

BUILT_IN = ("original", "none")
KEPT = 0.9
"""Of the way from no context to the template: what a shorter context must keep to be recommended."""
SHORTER = 0.75
"""Of the template's tokens: what counts as shorter."""


@dataclass(frozen=True)
class Choice:
    """Attributes:
    closest: the context with the lowest forward KL; None where there is none to choose from.
    shorter: the closest of the shorter ones, where it keeps enough.
    far: the closest of the shorter ones, where it does not.
    """

    closest: LeaderboardRow | None = None
    shorter: LeaderboardRow | None = None
    far: LeaderboardRow | None = None

    @property
    def recommended(self) -> str | None:
        """The name of the context to take: the shorter one, else the closest."""
        row = self.shorter or self.closest
        return row.name if row else None


def has_choice_scores(rows: Sequence[LeaderboardRow]) -> bool:
    """Whether all of these were scored on the selection rows."""
    return all(row.selection is not None for row in rows)


def choice(board: LeaderboardDocument) -> Choice:
    """The contexts that the selection rows choose; the original and "no context" take no part."""
    rows = [row for row in board.contexts if row.name not in BUILT_IN]
    if not rows:
        return Choice()
    by_selection = has_choice_scores(rows)
    ordered = sorted(rows, key=lambda row: (deciding_kl(row, by_selection), row.name))
    short = next((row for row in ordered if row.tokens <= SHORTER * board.template_tokens), None)
    kept = deciding_share(short, board) if short else None
    enough = kept is None or kept >= KEPT
    return Choice(ordered[0], short if enough else None, None if enough else short)


def deciding_kl(row: LeaderboardRow, by_selection: bool = True) -> float:
    """Forward KL on the rows that decide."""
    return (row.selection if by_selection and row.selection is not None else row).kl_forward.mean


def deciding_share(row: LeaderboardRow, board: LeaderboardDocument) -> float | None:
    """1 − KL / KL of no context, on the rows that decide; None without "no context"."""
    bare = next((one for one in board.contexts if one.name == "none"), None)
    if bare is None:
        return None
    by_selection = has_choice_scores([row, bare])
    most = deciding_kl(bare, by_selection)
    return 1 - deciding_kl(row, by_selection) / most if most > 0 else None
