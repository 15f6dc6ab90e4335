"""The search for a shorter text: from the whole template down, a share of what is left at a time; then exchanges.

Each *stage* makes several candidates that cut the same amount: the pieces (or words, phrases, sentences, messages)
that matter least by sensitivity, by attention, or by a mixture of both. Every candidate is run on a few rows, the
better half on more, and the best ones on all of them (a race); the lowest exact KL stays. At a length that was asked
for, *exchanges* follow: pieces whose return promises most come back, pieces whose absence costs least go, each tried by
its exact KL. Everything follows from the arguments and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product

import torch
from torch import Tensor

from kvopt.shorten.importance import Sensitivity
from kvopt.shorten.pieces import Pieces
from kvopt.shorten.trials import Trials

STAGE, LONG_STAGE, LONG = 0.93, 0.85, 512
"""Share of the tokens that a stage leaves; that of texts which have more than LONG tokens."""
MIXTURES = (
    *((share, "token") for share in (1.0, 0.75, 0.5, 0.25, 0.0)),
    *((share, "word") for share in (0.75, 0.4)),
    *((0.6, level) for level in ("phrase", "sentence", "message", "messages")),
)
"""Candidates of a stage: the weight of sensitivity against attention, and the smallest unit that is cut."""
NOISY = 3
"""Further candidates of a stage, with noise on their ranks."""
NOISE = 0.08
PROBES = 2
TRIED_BACK, TRIED_OUT = 6, 8
"""Pieces that an exchange tries to bring back, and to cut."""

Swap = tuple[Sequence[int], Sequence[int]]
"""Pieces that come back, and pieces that go."""
Loss = Callable[[frozenset[int], int], float]
"""What is wrong with a text, on so many rows."""
Progress = Callable[[int, float], None]
"""Called with the tokens and the forward KL of a text that was just reached."""


@dataclass(frozen=True)
class Shorter:
    """A text: the pieces ``kept``, its ``tokens``, and its forward ``kl`` on all of the deciding rows."""

    kept: frozenset[int]
    tokens: int
    kl: float


@dataclass
class CutSearch:
    """Args:
    pieces: the template, taken apart.
    trials: says how good a text is.
    attention: largest attention weight of each token of the prefix, [P].
    sensitivity: what each token is worth when these ones [P] (bool) are there, by so many probes.
    exchanges: rounds of exchanges at each length, at most.
    seed: of the noise.
    progress: told of every text that is better or shorter than the one before.

    Attributes:
        current: the text reached.
        nearest: of the texts that :meth:`down_while` refused, the one with the lowest KL.
    """

    pieces: Pieces
    trials: Trials
    attention: Tensor
    sensitivity: Callable[[Tensor, int], Sensitivity]
    exchanges: int = 6
    seed: int = 0
    progress: Progress | None = None
    nearest: Shorter | None = None

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._attention = self._per_piece(self.attention, "amax")
        self._fisher = self._attention
        everything = frozenset(range(len(self.pieces)))
        self.current = self._reached(everything)

    # ---- reaching lengths

    def down_to(self, tokens: int) -> Shorter | None:
        """The best text of at most so many tokens, from the one reached before; None where what must stay is longer."""
        while self.current.tokens > tokens:
            share = STAGE if self.current.tokens <= LONG else LONG_STAGE
            aim = max(tokens, min(self.current.tokens - 1, int(self.current.tokens * share)))
            shorter = self._stage(aim, tokens)
            if shorter is None:
                return None
            self.current = shorter
            self._tell()
        self._exchange(tokens)
        return self.current

    def down_while(self, kl: float) -> Shorter:
        """The shortest text that is found with a forward KL of at most ``kl``; the whole template where none is."""
        best, share = self.current, STAGE if self.current.tokens <= LONG else LONG_STAGE
        while True:
            aim = min(best.tokens - 1, int(best.tokens * share))
            self.current = best
            shorter = self._stage(aim, 1) if aim > 0 else None
            if shorter is not None and shorter.kl > kl:
                self.current = shorter
                self._exchange(shorter.tokens, enough=kl)
                shorter = self.current
            if shorter is not None and shorter.kl <= kl:
                best = shorter
                self._tell(best)
                continue
            if shorter is not None and (self.nearest is None or shorter.kl < self.nearest.kl):
                self.nearest = shorter
            if aim >= best.tokens - 1 or aim <= 0:
                break
            share = 1 - (1 - share) / 2
        self.current = best
        return best

    def shortest(self) -> int:
        """Tokens of the shortest text that may stand for the template."""
        left = set(range(len(self.pieces)))
        counts = self._message_counts(frozenset(left))
        for level in ("messages", "message", "token"):
            for unit in self.pieces.at(level):
                gone = [i for i in unit if i in left]
                if gone and self._may_go(left, gone, counts):
                    self._remove(gone, left, counts)
        tokens = self.trials.tokens(left)
        return len(self.pieces.prefix) if tokens is None else tokens

    # ---- one stage

    def _stage(self, aim: int, floor: int) -> Shorter | None:
        """The best of several texts with at most ``aim`` tokens, and not much less than ``floor``; None where there is
        none. The best loses the least for each token that it saves.
        """
        self._fisher = self._per_piece(self.sensitivity(self._mask(self.current.kept), PROBES).fisher, "sum")
        ranks = _ranks(self._fisher, self.current.kept), _ranks(self._attention, self.current.kept)
        candidates: dict[frozenset[int], None] = {}
        noisy = [(0.5, "token")] * NOISY
        for number, (share, level) in enumerate([*MIXTURES, *noisy]):
            score = share * ranks[0] + (1 - share) * ranks[1]
            if number >= len(MIXTURES):
                score = score + NOISE * torch.randn(len(score), generator=self._generator)
            kept = self._cut(self.current.kept, score, level, aim, floor)
            if kept is not None:
                candidates[kept] = None
        return self._race(list(candidates), self._loss_per_token)

    def _cut(self, kept: frozenset[int], score: Tensor, level: str, aim: int, floor: int) -> frozenset[int] | None:
        """Without the units of the lowest mean score, as far as it takes to be at ``aim``. A unit may be larger than
        that takes, down to ``floor``; tokens finish what coarser units leave over.
        """
        left, counts = set(kept), self._message_counts(kept)
        for step in dict.fromkeys((level, "token")):
            present = [[i for i in unit if i in kept] for unit in self.pieces.at(step)]
            for _, gone in sorted((float(score[gone].mean()), gone) for gone in present if gone):
                if self._over(left, aim) <= 0:
                    break
                size = sum(len(self.pieces.tokens[i]) for i in gone)
                if size <= max(1, self._over(left, floor)) and self._may_go(left, gone, counts):
                    self._remove(gone, left, counts)
        for _ in range(len(left)):  # what is tokenized again may be longer by some tokens than the pieces' own
            tokens = self.trials.tokens(left)
            if tokens is None:
                return None
            if tokens <= aim:
                return frozenset(left)
            order = sorted(left, key=lambda i: (float(score[i]), i))
            spare = next((i for i in order if self._may_go(left, [i], counts)), None)
            if spare is None:
                return None
            self._remove([spare], left, counts)
        return None

    def _remove(self, gone: Sequence[int], left: set[int], counts: dict[int, int]) -> None:
        left.difference_update(gone)
        for i in gone:
            counts[self.pieces.pieces[i].field] -= 1

    def _over(self, left: set[int], aim: int) -> int:
        """Tokens above ``aim``, by the pieces' own tokens."""
        fixed = len(self.pieces.prefix) - sum(map(len, self.pieces.tokens))
        return fixed + sum(len(self.pieces.tokens[i]) for i in left) - aim

    def _message_counts(self, kept: frozenset[int]) -> dict[int, int]:
        counts: dict[int, int] = {}
        for i in kept:
            f = self.pieces.pieces[i].field
            counts[f] = counts.get(f, 0) + 1
        return counts

    def _may_go(self, left: set[int], gone: Sequence[int], counts: dict[int, int]) -> bool:
        """Whether these pieces may be cut from the ones left."""
        remaining = left.difference(gone)
        if not self.pieces.allowed(remaining, gone):
            return False
        fields = {self.pieces.pieces[i].field for i in gone}
        return all(counts[f] > sum(self.pieces.pieces[i].field == f for i in gone) for f in fields) or (
            self.pieces.whole_messages(remaining)
        )

    def _race(self, candidates: Sequence[frozenset[int]], loss: Loss) -> Shorter | None:
        """The candidate with the lowest ``loss(kept, rows)``: all on a quarter of the rows, half of them on half, the
        best on all.
        """
        rows = len(self.trials.examples)
        running = list(candidates)
        for part in (max(1, rows // 4), max(1, rows // 2)):
            if len(running) > 2:
                running.sort(key=lambda kept: loss(kept, part))
                running = running[: max(2, (len(running) + 1) // 2)]
        return self._reached(min(running, key=lambda kept: loss(kept, rows))) if running else None

    def _loss_per_token(self, kept: frozenset[int], rows: int) -> float:
        """KL that is lost for each token saved since the current text."""
        saved = self.current.tokens - (self.trials.tokens(kept) or 0)
        return (self.trials.kl(kept, rows) - self.trials.kl(self.current.kept, rows)) / max(1, saved)

    def _reached(self, kept: frozenset[int]) -> Shorter:
        tokens = self.trials.tokens(kept)
        return Shorter(kept, tokens if tokens is not None else 0, self.trials.kl(kept))

    # ---- exchanges

    def _exchange(self, tokens: int, enough: float = 0.0) -> None:
        """Better texts of at most ``tokens`` tokens by exchanging pieces, until a round brings none."""
        rows = max(1, len(self.trials.examples) // 2)
        for _ in range(self.exchanges):
            if self.current.kl <= enough:
                return
            now = self.current.kept
            gain = self._per_piece(self.sensitivity(self._mask(now), 0).gain, "sum")
            worth = _ranks(self._fisher, now) + _ranks(self._attention, now)
            counts = self._message_counts(now)
            gone = [i for i in range(len(self.pieces)) if i not in now]
            back = sorted(gone, key=lambda i: float(gain[i]))[:TRIED_BACK]
            free = [i for i in sorted(now, key=lambda i: float(worth[i])) if self._may_go(set(now), [i], counts)]
            out = free[:TRIED_OUT]
            back.sort(key=lambda i: self.trials.kl(now | {i}, rows))
            out.sort(key=lambda i: self.trials.kl(now - {i}, rows))
            groups = chain([self._fills(gain, tokens)], self._swaps(back, out))
            better = next(filter(None, (self._better(swaps, tokens) for swaps in groups)), None)
            if better is None:
                return
            self.current = better
            self._tell()

    def _fills(self, gain: Tensor, tokens: int) -> list[Swap]:
        """What could come back into a text that is shorter than it has to be: pieces, and whole units."""
        now, room = self.current.kept, tokens - self.current.tokens
        if room <= 0:
            return []
        present = {self.pieces.pieces[i].field for i in now}
        gone = [i for i in range(len(self.pieces)) if i not in now and self.pieces.pieces[i].field in present]
        gone = [i for i in sorted(gone, key=lambda i: float(gain[i])) if gain[i] < 0]
        fills: list[Swap] = [(gone[:count], ()) for count in (1, 2, 4, 8, 16, 32, 64) if count <= min(room, len(gone))]
        for level in ("word", "phrase", "sentence", "message", "messages"):
            units = [[i for i in unit if i not in now] for unit in self.pieces.at(level)]
            fit = [unit for unit in units if unit and sum(len(self.pieces.tokens[i]) for i in unit) <= room]
            fills += [(unit, ()) for unit in sorted(fit, key=lambda unit: float(gain[unit].mean()))[:2]]
        return fills

    def _swaps(self, back: Sequence[int], out: Sequence[int]) -> Iterator[list[Swap]]:
        """Groups of exchanges, the most promising first."""
        first = [(back[i : i + 1], out[j : j + 1]) for i, j in product(range(2), range(3))]
        yield [*first, (back[:2], out[:2]), (back[:3], out[:3]), (back[:1], out[:2])]
        yield [(back[i : i + 1], out[j : j + 1]) for i, j in product(range(2, 4), range(3))]
        yield [(back[i : i + 1], out[j : j + 1]) for i, j in product(range(3), range(3, 6))]

    def _better(self, swaps: Sequence[Swap], tokens: int) -> Shorter | None:
        """The best text that these exchanges give, where it is better than the current one."""
        now = self.current.kept
        texts = {(now | set(back)) - set(out) for back, out in swaps if back or out}
        self._tell()
        found = self._race(sorted((text for text in texts if self._fits(text, tokens)), key=sorted), self.trials.kl)
        return found if found is not None and found.kl < self.current.kl else None

    def _fits(self, kept: frozenset[int], tokens: int) -> bool:
        length = self.trials.tokens(kept)
        fits = length is not None and length <= tokens
        return fits and self.pieces.allowed(kept) and self.pieces.whole_messages(kept)

    # ---- estimates

    def _mask(self, kept: frozenset[int]) -> Tensor:
        """Which tokens of the prefix are there, [P] bool."""
        mask = torch.ones(len(self.pieces.prefix), dtype=torch.bool)
        for i, tokens in enumerate(self.pieces.tokens):
            if i not in kept:
                mask[list(tokens)] = False
        return mask

    def _per_piece(self, values: Tensor, reduction: str) -> Tensor:
        """[pieces] from [P]."""
        parts = [values[list(tokens)] for tokens in self.pieces.tokens]
        return torch.stack([part.amax() if reduction == "amax" else part.sum() for part in parts])

    def _tell(self, text: Shorter | None = None) -> None:
        text = text or self.current
        if self.progress:
            self.progress(text.tokens, text.kl)


def _ranks(values: Tensor, kept: frozenset[int]) -> Tensor:
    """The places of the kept pieces by value, 0 (lowest) … 1; of the others 1."""
    places = sorted(kept)
    result = torch.ones(len(values))
    order = values[places].argsort(stable=True).argsort(stable=True)
    result[places] = order.float() / max(1, len(places))
    return result
