"""The search for mutations: attempt after attempt, each decided by the seed, its number and what came before, written
down before the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from kvopt.config.mutations import FAMILIES, MutationsConfig
from kvopt.errors import KvoptError, counted
from kvopt.mutate.generators.rules import compose
from kvopt.mutate.meaning import Opinion
from kvopt.mutate.mutation import Journal, Mutation, counts_by_reason
from kvopt.mutate.operator import RULE_FAMILIES, Operator, operators
from kvopt.mutate.proposals import Generator, Proposal, Request
from kvopt.mutate.spans import compile_protect
from kvopt.mutate.validity import REQUEST_FAILED, Checker, Rejection, Scope, TokenIds
from kvopt.storage.files import sha256_json
from kvopt.task.template import Template

RULES_VERSION = 1
"""Raise it when operators or the search change what a seed gives."""
LARGE_STEP_EVERY = 8
CHILD_SHARE = 0.35
DEEPEST_LINEAGE = 3
GIVES_UP_AFTER = 5
"""Failures of the generator in a row after which the search goes on without it; of requests, after which it ends."""


@dataclass
class Search:
    """The state of one search; everything in it follows from the arguments and the attempts so far."""

    template: Template
    config: MutationsConfig
    scope: Scope
    seed: int
    checker: Checker
    generator: Generator | None
    chosen: list[Operator]
    meaning: Callable[[Template, Template], Opinion] | None = None
    attempts: list[Mutation] = field(default_factory=list)
    accepted: list[Mutation] = field(default_factory=list)
    _ahead: dict[int, Proposal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.protect = compile_protect(self.config.protect)
        self.families = [f for f in RULE_FAMILIES if any(o.family == f for o in self.chosen)]
        self._failures = 0
        self._unanswered = 0
        self._answered = False
        self.failed = False

    def lead(self, attempt: int) -> tuple[str, int]:
        """The family that an attempt begins with, and how many paraphrases or rules began before it."""
        if self.generator is None:
            return self._rule_family(attempt), attempt
        if self.generator.limit is not None:
            limit = self.generator.limit
            return ("paraphrase", attempt) if attempt < limit else (self._rule_family(attempt - limit), attempt - limit)
        share = self.config.paraphrase_share
        share = 1 / (1 + len(self.families)) if share is None else share if self.families else 1.0
        before, after = int(attempt * share + 1e-9), int((attempt + 1) * share + 1e-9)
        return ("paraphrase", before) if after > before else (self._rule_family(attempt - before), attempt - before)

    def _rule_family(self, turn: int) -> str:
        return self.families[turn % len(self.families)] if self.families else "none"

    def take(self, mutation: Mutation) -> None:
        """Count an attempt in, made now or found in the journal."""
        self.attempts.append(mutation)
        self._count(mutation)

    def take_again(self, mutation: Mutation) -> None:
        """Count in an attempt in the place of one that an endpoint did not answer."""
        self.attempts[mutation.attempt] = mutation
        self._count(mutation)

    def _count(self, mutation: Mutation) -> None:
        if mutation.reason == REQUEST_FAILED:
            self._unanswered += 1
        elif mutation.family == "paraphrase":
            self._answered, self._unanswered = True, 0
            self._failures = self._failures + 1 if mutation.reason == "generation-failed" else 0
        if mutation.accepted and mutation.template:
            self.accepted.append(mutation)
            self.checker.remember(mutation.template, mutation.name or mutation.id)

    def go_on(self) -> list[int]:
        """Give an endpoint that failed before a new chance; returns the attempts that it did not answer."""
        self._unanswered, self._answered = 0, False
        return [m.attempt for m in self.attempts if m.reason == REQUEST_FAILED]

    def leave_out_unanswered(self) -> int:
        """Forget the last attempts that an endpoint did not answer: they decided nothing. Returns how many are left."""
        while self.attempts and self.attempts[-1].reason == REQUEST_FAILED:
            self.attempts.pop()
        return len(self.attempts)

    def check_endpoint(self, ended: bool = False) -> None:
        """Raises KvoptError where the endpoint answers nothing any more: the last requests failed, or, where the search
        has ``ended`` without all that was wanted, all of them.
        """
        dead = self._unanswered >= GIVES_UP_AFTER or (ended and self._unanswered and not self._answered)
        if dead and len(self.accepted) < self.config.count:
            self.failed = True
            last = next(m for m in reversed(self.attempts) if m.reason == REQUEST_FAILED)
            where = "generator" if self.generator is not None and self.generator.name == "endpoint" else "check"
            raise KvoptError(
                f"mutations.{where}: the endpoint answered none of the last {counted(self._unanswered, 'request')}:"
                f" {last.detail}; {counted(len(self.accepted), 'accepted mutation')} of {self.config.count} are kept,"
                " and the same command asks again"
            )

    @property
    def done(self) -> bool:
        if len(self.accepted) >= self.config.count or len(self.attempts) >= self.config.attempts:
            return True
        family, _ = self.lead(len(self.attempts))
        return family == "none" or (family == "paraphrase" and self._gave_up and not self.families)

    @property
    def _gave_up(self) -> bool:
        return self._failures >= GIVES_UP_AFTER

    def attempt(self) -> Mutation:
        """The next attempt; :meth:`take` counts it in."""
        number = len(self.attempts)
        seed = attempt_seed(self.seed, number)
        rng = Random(seed)
        family, turn = self.lead(number)
        if family == "paraphrase" and self._gave_up:
            family = self._rule_family(turn)
        if family == "paraphrase":
            return self._paraphrase(number, turn, seed, rng)
        parent = self._parent(rng)
        template, lineage = (parent.template, (*parent.lineage, parent.id)) if parent else (self.template, ())
        assert template is not None
        candidate, names = compose(
            template, self.chosen, family, self._depth(number, rng), self.scope, self.protect, rng
        )
        return self._judged(number, seed, family, candidate if names else None, names, lineage, None)

    def attempt_again(self, number: int, unanswered: Sequence[int]) -> Mutation:
        """An attempt that an endpoint did not answer, with the same request; ``unanswered`` are all such attempts."""
        seed = attempt_seed(self.seed, number)
        return self._paraphrase(number, self.lead(number)[1], seed, Random(seed), unanswered)

    def _parent(self, rng: Random) -> Mutation | None:
        """An accepted mutation to go on from, or None for the original."""
        fit = [m for m in self.accepted if len(m.lineage) < DEEPEST_LINEAGE]
        return rng.choice(fit) if fit and rng.random() < CHILD_SHARE else None

    def _depth(self, number: int, rng: Random) -> int:
        if number % LARGE_STEP_EVERY == LARGE_STEP_EVERY - 1:
            return rng.randint(self.config.max_depth, 2 * self.config.max_depth)
        return rng.randint(1, self.config.max_depth)

    def _paraphrase(
        self, number: int, turn: int, seed: int, rng: Random, among: Sequence[int] | None = None
    ) -> Mutation:
        assert self.generator is not None
        proposal = self._proposed(number, range(self.config.attempts) if among is None else among)
        family = self.generator.family
        names: tuple[str, ...] = proposal.operators or (self.generator.name,)
        if proposal.template is None:
            why = proposal.rejection or Rejection("generation-failed")
            return self._judged(number, seed, family, None, names, (), why)
        candidate = proposal.template
        plain = self.generator.limit is not None or not self.chosen or rng.random() < 0.5
        rejection = self.checker.check(candidate, cut=proposal.cut, written=proposal.written)
        if rejection is None and not plain:
            depth = rng.randint(1, self.config.max_depth)
            candidate, more = compose(candidate, self.chosen, None, depth, self.scope, self.protect, rng)
            names = (*names, *more)
        return self._judged(
            number, seed, family, candidate, names, (), None, proposal.detail, proposal.cut, proposal.written
        )

    def _proposed(self, number: int, among: Sequence[int]) -> Proposal:
        """The generator's proposal for an attempt; when it likes batches, it is asked for several of those ``among`` at
        once.
        """
        assert self.generator is not None
        if number not in self._ahead:
            wanted = max(1, min(self.generator.batch, self.config.count - len(self.accepted)))
            numbers = [n for n in among if n >= number and self.lead(n)[0] == "paraphrase"][:wanted]
            there = tuple(m.template for m in self.accepted if m.template is not None)
            seeds = {n: attempt_seed(self.seed, n) for n in numbers}
            requests = [
                Request(self.template, self.scope, self.protect, seeds[n], self.seed, self.lead(n)[1], there)
                for n in numbers
            ]
            self._ahead.update(zip(numbers, self.generator.propose(requests), strict=True))
        return self._ahead.pop(number)

    def _judged(
        self,
        number: int,
        seed: int,
        family: str,
        candidate: Template | None,
        names: tuple[str, ...],
        lineage: tuple[str, ...],
        rejection: Rejection | None,
        note: str = "",
        cut: bool = False,
        written: bool = False,
    ) -> Mutation:
        if candidate is None:
            rejection = rejection or Rejection("not-applicable", "no operator found anything to change")
        else:
            rejection = rejection or self.checker.check(candidate, cut=cut, written=written)
        opinion = None
        if candidate is not None and rejection is None and family == "paraphrase" and self.meaning is not None:
            opinion = self.meaning(self.template, candidate)
            rejection = self._rejection_of(opinion)
        identity = candidate.sha256 if candidate else sha256_json([self.seed, number])
        return Mutation(
            id=identity[:12],
            name=None if rejection else self._next_name(),
            attempt=number,
            template=candidate,
            operators=names,
            lineage=lineage,
            family=family,
            seed=seed,
            accepted=rejection is None,
            reason=rejection.reason if rejection else None,
            detail=(rejection.detail if rejection else note) or None,
            search=identity_of(self.template, self.config, self.scope, self.seed, self.generator),
            check=opinion.to_json() if opinion and opinion.asked else None,
        )

    def _rejection_of(self, opinion: Opinion) -> Rejection | None:
        if not opinion.asked:
            return Rejection(REQUEST_FAILED, opinion.reason)
        if opinion.same is None:
            return Rejection("meaning-unread", opinion.reason)
        flags = self.config.check is not None and self.config.check.faults == "flag"
        return None if opinion.same or flags else Rejection("meaning", opinion.reason or "the judge finds a difference")

    def _next_name(self) -> str:
        """After the last name that was given: an attempt that was made again stands before later ones."""
        return f"m{1 + max((int((m.name or 'm0')[1:]) for m in self.accepted), default=0):03d}"


def attempt_seed(seed: int, number: int) -> int:
    """The seed of attempt ``number``."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:6], "big")


def chosen_operators(names: Sequence[str]) -> list[Operator]:
    """The rule operators that families and names stand for."""
    return [o for o in operators().values() if o.name in names or o.family in names]


def identity_of(
    template: Template, config: MutationsConfig, scope: Scope, seed: int, generator: Generator | None
) -> str:
    """What the attempts depend on, as 12 hex digits: not how many are wanted, nor how an endpoint is asked."""
    return sha256_json(
        [template.to_json(), config.identity(), scope, seed, generator.name if generator else None, RULES_VERSION]
    )[:12]


def mutate(
    template: Template,
    config: MutationsConfig,
    *,
    scope: Scope = "leading",
    seed: int = 0,
    token_ids: TokenIds | None = None,
    window: int | None = None,
    generator: Generator | None = None,
    meaning: Callable[[Template, Template], Opinion] | None = None,
    journal: Path,
    progress: Callable[[Mutation], None] | None = None,
) -> list[Mutation]:
    """Search until ``config.count`` mutations are accepted or the attempts are used up, and return every attempt.

    Args:
        template: the original.
        config: how many and how.
        scope: ``leading`` (text before the first slot) or ``all``.
        seed: of the whole search.
        token_ids: the ids that a template would be run with, to refuse duplicates and too long ones.
        window: the most of them.
        generator: the paraphraser (:func:`kvopt.mutate.generators.build_generator`); None leaves the paraphrase family
            out.
        meaning: says whether a paraphrase demands the same as the template (:mod:`kvopt.mutate.meaning`).
        journal: ``mutations.jsonl``; attempts in it are taken over when they belong to the same search.
        progress: called with each attempt, those taken over too.

    With rules, a file or a deterministic model the journal's bytes depend on the other arguments alone, however often
    the search was interrupted. What an endpoint did not answer before is asked again.

    Raises:
        KvoptError: an endpoint answers nothing; what it answered so far is in the journal.
    """
    if "paraphrase" not in config.operators:
        generator = None
    checker = Checker(template, scope, compile_protect(config.protect), token_ids, window)
    search = Search(template, config, scope, seed, checker, generator, chosen_operators(config.operators), meaning)
    with Journal(journal, identity_of(template, config, scope, seed, generator)) as file:
        for mutation in _attempts(search, file):
            if progress:
                progress(mutation)
    return search.attempts


def _attempts(search: Search, journal: Journal) -> Iterator[Mutation]:
    for mutation in journal.attempts:
        if search.done:
            break
        search.take(mutation)
        yield mutation
    journal.keep(len(search.attempts))
    try:
        yield from _asked_again(search, journal)
        while not search.done:
            mutation = search.attempt()
            journal.append(mutation)
            search.take(mutation)
            search.check_endpoint()
            yield mutation
        search.check_endpoint(ended=True)
    finally:
        if search.failed or len(search.accepted) >= search.config.count:
            journal.leave_out(search.leave_out_unanswered())


def _asked_again(search: Search, journal: Journal) -> Iterator[Mutation]:
    """The attempts that an endpoint did not answer before, as long as mutations are wanted."""
    unanswered = search.go_on()
    for number in unanswered:
        if len(search.accepted) >= search.config.count:
            break
        mutation = search.attempt_again(number, unanswered)
        if mutation.reason != REQUEST_FAILED:
            journal.replace(mutation)
        search.take_again(mutation)
        search.check_endpoint()
        yield mutation


def accepted(mutations: Sequence[Mutation]) -> list[Mutation]:
    """Those that may be used, in order."""
    return [m for m in mutations if m.accepted]


def summary(mutations: Sequence[Mutation], config: MutationsConfig) -> str:
    """One line: how many were accepted and rejected, and why there are fewer than wanted."""
    counts = counts_by_reason(mutations)
    done = counts.pop("accepted")
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    line = f"{counted(done, 'mutation')} accepted, {len(mutations) - done} rejected" + (
        f" ({reasons})" if reasons else ""
    )
    if flagged := sum(m.accepted and m.check is not None and m.check["same"] is False for m in mutations):
        line += f"; the judge finds that {flagged} of the accepted ask for something else (see mutations.jsonl)"
    if done >= config.count:
        return line
    used_up = len(mutations) >= config.attempts
    why = (
        f"all {config.attempts} attempts were used"
        if used_up
        else "there is nothing more to try: the generator failed or ran out and no rule operators are on"
    )
    return f"{line}; {config.count} were wanted, but {why}"


__all__ = ["FAMILIES", "Search", "accepted", "mutate", "summary"]
