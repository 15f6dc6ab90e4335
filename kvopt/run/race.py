"""The race of ``score.race``: which mutations are scored on all selection rows, decided on a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch

from kvopt.config.document import Config
from kvopt.config.names import ContextName
from kvopt.contexts.context import TextContext
from kvopt.documents.leaderboard_file import RaceFacts
from kvopt.errors import InputError, KvoptError, counted
from kvopt.measure.racing import evaluations, heats, row_order
from kvopt.measure.reference import Reference
from kvopt.measure.score import Score, TokenScores, summarize
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.ranking import place
from kvopt.run.scoring import token_scores


@dataclass(frozen=True)
class RaceResult:
    """What a race left.

    Attributes:
        finalists: not scored on all rows yet, in the order in which they were given.
        dropped: the others, each with its score on the rows that it ran on; the last to be dropped first.
        facts: row evaluations, as documents hold them; None where there was no race.
    """

    finalists: list[TextContext]
    dropped: list[tuple[TextContext, Score]]
    facts: RaceFacts | None = None


def race(task: EncodedTask, reference: Reference, contexts: Sequence[TextContext], at: Workspace) -> RaceResult:
    """Run ``contexts`` against each other on the selection rows. Every part is stored as it ends, so a race that was
    interrupted goes on. Without a race that keeps within ``score.race.share``, all of them are finalists.
    """
    settings, seed = task.config.score, task.config.seed
    assert settings.race is not None
    ids = [row.example_id for row in task.rows("selection").rows]
    keep, total = settings.finalists, len(ids)
    planned = heats(len(contexts), keep, total, settings.race.share)
    if not planned:
        if len(contexts) > keep:
            why = f"{keep} of {counted(len(contexts), 'mutation')} on {counted(total, 'row')} leave no room for it"
            at.say(f"warning: no race: {why} (score.race.share {settings.race.share:g}); all are scored on every row")
        return RaceResult(list(contexts), [])
    order = [ids[i] for i in row_order(total, seed)]
    running = {context.name: context for context in contexts}
    parts: dict[str, list[TokenScores]] = {name: [] for name in running}
    dropped: list[tuple[TextContext, Score]] = []
    for heat in planned:
        only = order[heat.first : heat.last]
        for context in at.progress.over(f"race on {counted(heat.last, 'row')}", list(running.values())):
            part = f"race-{heat.first}-{heat.last}"
            parts[context.name].append(token_scores(task, reference, context, "selection", at, part=(part, only)))
        scores = {name: summarize(joined(parts[name]), seed=seed, resamples=settings.resamples) for name in running}
        by = partial(place, settings.select, no_metrics)
        ranked = sorted(running, key=lambda name: (*by(running[name], scores[name]), name))
        dropped[:0] = [(running[name], scores[name]) for name in ranked[heat.left :]]
        running = {name: context for name, context in running.items() if name in ranked[: heat.left]}
    facts = RaceFacts(
        evaluations=evaluations(planned, keep, total),
        without_race=len(contexts) * total,
        rows=[heat.last for heat in planned],
        left=[heat.left for heat in planned],
    )
    halved = ", ".join(f"{heat.left} after {counted(heat.last, 'row')}" for heat in planned)
    share = facts.evaluations / facts.without_race
    at.say(
        f"race: {len(contexts)} mutations, {halved}; {facts.evaluations:,} row evaluations with the finalists' own,"
        f" {share:.0%} of {facts.without_race:,}"
    )
    return RaceResult(list(running.values()), dropped, facts)


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """The arrays of several parts of the rows as one."""
    names = ("kl", "nll", "agree", "counts")
    return TokenScores(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def no_metrics() -> NoReturn:
    """The config refuses a race that metrics would decide."""
    raise KvoptError("a race is decided by scores")


def check_raced(config: Config, name: ContextName, where: str) -> None:
    """Refuse mutations by an order that a race leaves unknown. Raises InputError."""
    score = config.score
    if score.race is None or name.form != "counted" or name.order == "random":
        return
    if name.order in ("diverse", "spread"):
        what = f"{name.spec!r} needs every mutation's KL, and score.race drops most of them early"
        raise InputError(what, where=where, fix=f"leave score.race out, or take best-mutations:{name.count}")
    if name.count > score.finalists:
        what = f"{name.spec!r} wants more mutations than the race leaves ({score.finalists})"
        raise InputError(what, where=where, fix=f"set score.race.keep to {name.count} or more")
