"""The cards of the page's first screen: the context to take, the closest one, and the user's own prompt."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvopt.documents.choosing import KEPT
from kvopt.documents.leaderboard_file import LeaderboardDocument, LeaderboardRow
from kvopt.report.choice import advice, own_prompt, recommended, share_kept

EXPORTED_AS = {"text": "text", "soft": "peft", "kv": "peft"}
"""The format of ``kvopt export --to`` by kind of context."""


@dataclass(frozen=True)
class Card:
    """One context of the first screen.

    Attributes:
        title: which of the three it is; of several, the first.
        also: what else it is, as whole sentences.
        kept: share of the template's effect, 0 to 1; None where the board has no "no context".
        command: what exports it.
        saved: tokens fewer than the template's in each request; negative where it is longer.
        pays_after: requests after which that has paid for finding it (:func:`kvopt.report.costs.pays_after`).
    """

    title: str
    also: Sequence[str]
    row: LeaderboardRow
    kept: float | None
    command: str
    saved: int
    pays_after: int | None = None


def cards(board: LeaderboardDocument, folder: Path, pays_after: Mapping[str, int | None] | None = None) -> list[Card]:
    """At most three cards, no context on two of them. Empty where there is nothing to choose from."""
    rows = {row.name: row for row in board.contexts}
    found, own = advice(board), own_prompt(board)
    picked: list[tuple[str, str, str | None]] = [
        ("Take this one", "", recommended(board)),
        ("The closest", "It is also the closest to the template.", found["closest"]),
    ]
    if own is not None:
        shorter = "shorter " if own.tokens < board.template_tokens else ""
        picked.append((f"Your own {shorter}prompt", f"It is your own {shorter}prompt.", own.name))
    titles: dict[str, str] = {}
    also: dict[str, list[str]] = {}
    for title, sentence, name in picked:
        if name in titles:
            also[name].append(sentence)
        elif name is not None:
            titles[name], also[name] = title, []
    if found["shorter"] is None and found["closest"] is not None:
        name = found["closest"]
        also[name] = [f"Nothing much shorter keeps {KEPT:.0%} of the template's effect.", *also[name]]
        if (kept := share_kept(rows[name], board)) is not None and kept < KEPT:
            also[name].append("It does not either: the template itself is the safer choice.")
    return [
        Card(
            title,
            also[name],
            rows[name],
            share_kept(rows[name], board),
            export_command(rows[name], folder),
            board.template_tokens - rows[name].tokens,
            (pays_after or {}).get(name),
        )
        for name, title in titles.items()
    ]


def export_command(row: LeaderboardRow, folder: Path) -> str:
    """``kvopt export RUN#NAME --to FORMAT``, quoted for a shell; a folder below the current one is named from there."""
    place = Path(os.path.relpath(folder)) if folder.resolve().is_relative_to(Path.cwd()) else folder
    plain = all(shlex.quote(part) == part for part in (str(place), row.name))
    spec = f"{place}#{row.name}"
    return f"kvopt export {spec if plain else shlex.quote(spec)} --to {EXPORTED_AS[row.kind]}"
