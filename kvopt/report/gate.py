"""A gate for CI: whether a context of a run is close enough to the template, and its metric high enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvopt.documents.leaderboard_file import LeaderboardRow
from kvopt.errors import InputError
from kvopt.report.choice import recommended
from kvopt.report.reading import RunFiles


@dataclass(frozen=True)
class Gate:
    """What must hold of a context.

    Attributes:
        fail_above: the highest mean forward KL that passes, in nats per gold token; None: KL is not checked.
        metric: the name of a metric's quantity on the board, and ``fail_below`` its lowest mean that passes.
        context: which context is checked; None: the recommended one of each run.
    """

    fail_above: float | None = None
    metric: str | None = None
    fail_below: float | None = None
    context: str | None = None

    def __post_init__(self) -> None:
        if (self.metric is None) != (self.fail_below is None):
            given, absent = ("--metric", "--fail-below") if self.metric is not None else ("--fail-below", "--metric")
            raise InputError(f"needs {absent}", where=given, fix="--metric NAME --fail-below VALUE")
        for option, limit in (("--fail-above", self.fail_above), ("--fail-below", self.fail_below)):
            if limit is not None and not math.isfinite(limit):
                raise InputError(f"{limit} is not a limit", where=option, fix="give a finite number")
        if self.context is not None and self.fail_above is None and self.metric is None:
            raise InputError(
                "needs a limit", where="--context", fix="--fail-above KL, or --metric NAME --fail-below VALUE"
            )

    @property
    def checks_something(self) -> bool:
        """Whether there is any limit."""
        return self.fail_above is not None or self.metric is not None

    def check(self, runs: Sequence[RunFiles]) -> tuple[list[str], list[str]]:
        """What fails and what passes, each in words with context, value and limit.

        Raises:
            InputError: no such context, a metric that the run does not have or that has no value there, or a run that
                still goes, whose recommended context may change.
        """
        fails: list[str] = []
        passes: list[str] = []
        for run in runs:
            row, start = self._row(run), f"{run.label}: " if len(runs) > 1 else ""
            if self.fail_above is not None:
                kl = row.kl_forward.mean
                words = f"{start}{row.name}: forward KL {kl:.4g} (limit: at most {self.fail_above:g})"
                (fails if not kl <= self.fail_above else passes).append(words)
            if self.metric is not None and self.fail_below is not None:
                value = self._metric(run, row, self.metric)
                words = f"{start}{row.name}: {self.metric} {value:.4g} (limit: at least {self.fail_below:g})"
                (fails if not value >= self.fail_below else passes).append(words)
        return fails, passes

    def _row(self, run: RunFiles) -> LeaderboardRow:
        board = run.board
        if self.context is None and not board.complete:
            raise InputError(
                "the run still goes, so the context to take may change",
                where=str(run.folder),
                fix="give --context NAME",
            )
        name = self.context or recommended(board)
        found = next((row for row in board.contexts if row.name == name), None)
        if found is None:
            what = f"no context {name!r}" if name else "no context to choose"
            known = ", ".join(row.name for row in board.contexts)
            raise InputError(what, where=str(run.folder), fix=f"it has {known}")
        return found

    def _metric(self, run: RunFiles, row: LeaderboardRow, metric: str) -> float:
        known = row.metrics or {}
        value = known[metric].mean if metric in known else None
        if value is not None:
            return value
        if metric in known:
            raise InputError(
                f"{metric} is not defined for {row.name}", where=str(run.folder), fix="check another metric"
            )
        has = f"it has {', '.join(known)}" if known else "it has none: set evaluate.metrics in the config and run again"
        raise InputError(f"no metric {metric!r} for {row.name}", where=str(run.folder), fix=has)
