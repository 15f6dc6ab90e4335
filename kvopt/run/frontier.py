"""A run that compares the three kinds of context at the same lengths, or looks for the shortest one of each kind: how
short can the template get, and what does it cost?
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from kvopt.config.contexts import ContextConfig
from kvopt.config.document import Config
from kvopt.config.frontiers import BATCH, EVERY, FRONTIER_KINDS, LEARNED, FrontierConfig, FrontierKind, learned_context
from kvopt.config.shortening import ShorteningConfig
from kvopt.documents.frontier_file import FrontierDocument
from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.documents.validated import read_document, write_document
from kvopt.errors import InputError
from kvopt.learning.descent import context_loss
from kvopt.learning.start_task import StartTask
from kvopt.run.compact import bare
from kvopt.run.run import Run
from kvopt.run.shorter_texts import write_shortened
from kvopt.run.validate import check_length

FILE = "frontier.json"
SHARES = (2, 4, 8)
"""The lengths that are taken when none is asked for: the template's, divided by these."""
CLOSE = 1.1
"""A search for the shortest context ends where the next length that failed is at most this many times shorter."""


@dataclass(frozen=True)
class Question:
    """What a frontier is asked.

    Attributes:
        tokens: lengths to compare at; none: a half, a quarter and an eighth of the template, or where ``max_kl`` or
            ``keep`` is given, whatever lengths lead to the shortest context.
        kinds: which kinds.
        steps: of each soft prompt and KV cache, at most.
        max_kl: the forward KL on selection rows that the shortest context may have.
        keep: the same as a share of the template's effect, 1 − KL / KL of no context.
        seconds: for all of it, about; steps are made fewer to fit. Texts are searched for first, whole.
        how: which rows decide of texts, and what stays.
    """

    tokens: tuple[int, ...] = ()
    kinds: tuple[FrontierKind, ...] = FRONTIER_KINDS
    steps: int = 40
    max_kl: float | None = None
    keep: float | None = None
    seconds: float | None = None
    how: ShorteningConfig = field(default_factory=ShorteningConfig)

    @property
    def searches(self) -> bool:
        """Whether the lengths are to be found."""
        return not self.tokens and (self.max_kl is not None or self.keep is not None)

    @property
    def learned_kinds(self) -> list[Literal["soft", "kv"]]:
        """Those of ``kinds`` that are learned."""
        return [kind for kind in LEARNED if kind in self.kinds]


def make_frontier(
    config: Config,
    base_dir: Path,
    out: Path,
    question: Question,
    *,
    say: Callable[[str], None] | None = None,
    shown: Callable[[LeaderboardDocument], None] | None = None,
) -> tuple[LeaderboardDocument, dict[str, str | None]]:
    """The leaderboard of texts ``short-N``, soft prompts ``soft-N`` and KV caches ``kv-N``, with the original, no
    context and the wordings of the user's own; and where lengths were looked for, the name of the shortest of each kind
    (None where none is close enough).

    A text is found as by ``kvopt shorten``, each from the longer one; a soft prompt starts from the text of its length,
    a KV cache from attention matching. A length that no text can have is left out, with a line that says why.

    Args:
        shown: called with the leaderboard after each context.

    Raises:
        InputError: a length that is not shorter than the template.
    """
    search = _Frontier(config, base_dir, out, question, say)
    return search.made(shown), search.found


class _Frontier:
    """One search, in one run directory: every step of it is a run of the contexts that are decided so far."""

    def __init__(
        self, config: Config, base_dir: Path, out: Path, question: Question, say: Callable[[str], None] | None
    ) -> None:
        self._config, self._base_dir, self._out, self._say = config, base_dir, out, say
        self._question, self._began = question, time.monotonic()
        asked = json.loads(json.dumps(asdict(question) | {"how": question.how.model_dump()}))
        self._decided = FrontierDocument(asked=asked)
        self._contexts: list[ContextConfig] = []
        self.found: dict[str, str | None] = {}
        self._run = Run(bare(config), base_dir, out, say=say)

    def made(self, shown: Callable[[LeaderboardDocument], None] | None) -> LeaderboardDocument:
        """Everything, in the order in which it is cheapest."""
        with self._run.opened():
            self._take_up()
        question = self._question
        if question.searches:
            with self._run.opened():
                limit = self._limit()
                if "text" in question.kinds:
                    self._shortest_text(limit)
            for place, kind in enumerate(question.learned_kinds):
                self._shortest_of(kind, limit, len(question.learned_kinds) - place)
            run = self._run_of(self._contexts)
        else:
            run = self._run_of([self._at_lengths()])
        with run.opened():
            return run.run(shown)

    # ---- lengths that are given

    def _at_lengths(self) -> FrontierConfig:
        question, whole = self._question, len(self._run.task().encoded.prefix)
        lengths = question.tokens or tuple(sorted({max(1, whole // share) for share in SHARES}))
        check_length(max(lengths), whole, "--tokens")
        made = {"kind": "frontier", "tokens": lengths, "kinds": question.kinds, **question.how.model_dump()}
        item = FrontierConfig.model_validate({**made, "steps": question.steps})
        if question.seconds is None:
            return item
        name = "every context"
        if name not in self._decided.steps:
            run = self._run_of([item])
            with run.opened():
                run.shorter_texts().of_frontiers()
                costs = [self._seconds_of_steps(run, context) for context in item.learned()]
            self._decide(name, self._affordable(sum(costs)))
        return item.model_copy(update={"steps": self._decided.steps[name]})

    # ---- lengths that are looked for

    def _limit(self) -> float:
        if (max_kl := self._question.max_kl) is not None:
            return max_kl
        assert self._question.keep is not None
        return (1 - self._question.keep) * self._run.score(self._run.task().none, "selection").kl_forward.mean

    def _shortest_text(self, limit: float) -> None:
        try:
            text = self._run.shortener(self._question.how).to_kl(limit)
        except InputError as error:
            self._run.at.say(f"no text: {error.what}")
            self.found["text"] = None
        else:
            self.found["text"] = text.document.name
            write_shortened(text, self._run.at)
            self._run.put_on_board([self._run.task().none, text.context(self._run.task())])

    def _shortest_of(self, kind: Literal["soft", "kv"], limit: float, kinds_left: int) -> None:
        """Halve, in proportion, the lengths between one that is too short and one that is not."""
        whole = len(self._run.task().encoded.prefix)
        fails, holds, nearest = 0, whole, math.inf
        while holds - fails > 1 and holds > CLOSE * fails:
            length = min(holds - 1, max(fails + 1, round(math.sqrt(max(1, fails) * holds))))
            probes = kinds_left * max(1, round(math.log2(max(2.0, math.log(holds / max(1, fails), CLOSE)))))
            kl = self._kl_of(kind, length, probes)
            nearest = min(nearest, kl)
            fails, holds = (fails, length) if kl <= limit else (length, holds)
            self._run.at.say(
                f"{kind}-{length}: {kl:.4f} {'holds' if kl <= limit else 'is too far'} (at most {limit:.4f})"
            )
        self.found[kind] = f"{kind}-{holds}" if holds < whole else None
        if holds == whole:
            self._run.at.say(
                f"no {kind} shorter than the template comes as close as {limit:.4f}; nearest {nearest:.4f}"
            )

    def _kl_of(self, kind: Literal["soft", "kv"], length: int, probes: int) -> float:
        """Forward KL on selection rows of a context of this length, which is learned now."""
        name = f"{kind}-{length}"
        if name not in self._decided.steps:
            steps = self._question.steps
            if self._question.seconds is not None:
                config = learned_context(kind, length, steps, self._question.how)
                run = self._run_of([*self._contexts, config])
                with run.opened():
                    steps = self._affordable(probes * self._seconds_of_steps(run, config))
            self._decide(name, steps)
        self._contexts.append(learned_context(kind, length, self._decided.steps[name], self._question.how))
        run = self._run_of(self._contexts)
        with run.opened():
            [context] = run.learned([name])
            return run.score(context, "selection").kl_forward.mean

    # ---- seconds

    def _seconds_of_steps(self, run: Run, config: ContextConfig) -> float:
        """What a step costs, with its part of the measurements between steps."""
        task, base, reference = run.task(), run.load_base(), run.descent_reference()
        rows = [row for row in task.bare_rows("train").rows if row.example_id in reference.index][:BATCH]
        tokens = config.start.text.tokens if config.start.text else config.tokens or 0
        like = StartTask(base, config.name, config.kind, tokens, task.encoded.prefix)
        tensor = like.from_ids(task.encoded.prefix[:tokens]).float().requires_grad_(True)
        began = time.monotonic()
        context_loss(base, config.kind, tensor, rows, reference).backward(inputs=[tensor])
        if base.device.type == "cuda":
            torch.cuda.synchronize(base.device)
        step = time.monotonic() - began
        return step * (1 + len(task.dataset.selection) / len(rows) / EVERY / 2)

    def _affordable(self, seconds_of_steps: float) -> int:
        assert self._question.seconds is not None
        left = self._question.seconds - self._decided.seconds - (time.monotonic() - self._began)
        return max(0, min(self._question.steps, int(left / max(seconds_of_steps, 1e-9))))

    # ---- runs, and what is kept

    def _run_of(self, contexts: Sequence[ContextConfig | FrontierConfig]) -> Run:
        run = Run(bare(self._config, contexts), self._base_dir, self._out, say=self._say)
        run.use_base(self._run.load_base())
        return run

    def _take_up(self) -> None:
        path = self._out / FILE
        stored = read_document(FrontierDocument, path) if path.is_file() else None
        if stored is not None and stored.asked == self._decided.asked:
            self._decided = stored

    def _decide(self, name: str, steps: int) -> None:
        self._decided.steps = self._decided.steps | {name: steps}
        seconds = self._decided.seconds + time.monotonic() - self._began
        write_document(self._out / FILE, self._decided.model_copy(update={"seconds": seconds}))
