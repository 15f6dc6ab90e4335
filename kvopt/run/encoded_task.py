"""A task as one base sees it: every row as token ids, and contexts encoded for its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from kvopt.base.generate import stop_ids
from kvopt.base.loading import Base
from kvopt.config.document import Config
from kvopt.contexts.context import Context, NoContext, TextContext
from kvopt.documents.leaderboard_file import MutationLineage
from kvopt.documents.part import StandsOn
from kvopt.errors import InputError, counted
from kvopt.mutate.mutation import Mutation
from kvopt.run.inputs import Inputs
from kvopt.task.examples import Dataset
from kvopt.task.prompt_check import nothing_to_learn, prompt_warnings, start_ids
from kvopt.task.seam import Encoded, Encoder
from kvopt.task.template import Template


@dataclass(frozen=True)
class EncodedTask:
    """Inputs and a base, joined at the token seam.

    Attributes:
        inputs: config, template and data.
        base: the frozen model.
        encoder: for the base's tokenizer and the config's chat template arguments.
        encoded: all examples under the original template, train, selection and validation in this order. With
            ``scope: all`` the bodies of learned contexts keep the slots alone; the reference still sees the whole
            template.
        warnings: what the user should know about what the base sees, one line each.
    """

    inputs: Inputs
    base: Base
    encoder: Encoder
    encoded: Encoded
    warnings: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def template(self) -> Template:
        return self.inputs.template

    @property
    def dataset(self) -> Dataset:
        return self.inputs.dataset

    @cached_property
    def gold(self) -> dict[str, tuple[int, ...]]:
        """Gold ids by example; the same under every context."""
        return {row.example_id: row.gold for row in self.encoded.rows}

    @cached_property
    def expected(self) -> dict[str, str]:
        """What the answer to each example is compared with: its output, after the tokenizer's own normalisation where
        that changes it, since answers have gone through that too.
        """
        texts = self.encoder.gold_texts(self.encoded)
        pairs = zip(self.inputs.examples, texts, strict=True)
        return {e.id: e.output if text.strip() == e.output.strip() else text for e, text in pairs}

    # ---- rows

    def rows(self, split: str) -> Encoded:
        """The original's rows of ``train``, ``selection`` or ``validation``."""
        return self._split(self.encoded, split)

    def bare_rows(self, split: str) -> Encoded:
        """The rows that soft and KV contexts (and ``none``) stand in front of: the original's, or with ``scope: all``
        the slots' own.
        """
        return self._split(self._bare, split)

    def _split(self, encoded: Encoded, split: str) -> Encoded:
        """Always the same object for a split, so that its hash is computed once."""
        key = id(encoded), split
        if key not in self._splits:
            self._splits[key] = encoded.select([example.id for example in getattr(self.dataset, split)])
        return self._splits[key]

    @cached_property
    def _splits(self) -> dict[tuple[int, str], Encoded]:
        return {}

    def rows_for(self, context: Context, split: str) -> Encoded:
        """The rows of a split as a context's ``bodies`` takes them: those of :meth:`rows` for text, else
        :meth:`bare_rows`.
        """
        return self.rows(split) if isinstance(context, TextContext) else self.bare_rows(split)

    @cached_property
    def _bare(self) -> Encoded:
        if self.config.template.scope == "leading":
            return self.encoded
        bare = self.template.without_trailing_static()
        return self.encoder.encode(bare, self.inputs.examples, gold=self.gold, window=self.base.geometry.window)

    @property
    def start_ids(self) -> tuple[int, ...]:
        """The ids of the template that a context can start from."""
        return start_ids(self.encoder, self.template, self.encoded, self.config.template.scope)

    @property
    def longest(self) -> int:
        """Tokens of the longest row after a learned context."""
        return max(len(row) for row in self._bare.rows)

    def check_window(self, name: str, tokens: int) -> None:
        """Raises InputError where so many slots and the longest row do not fit the window."""
        window, longest = self.base.geometry.window, self.longest
        if tokens + longest > window:
            raise InputError(
                f"{counted(tokens, 'slot')} and the longest row ({counted(longest, 'token')}) do not fit the window of"
                f" {window} tokens",
                where=f"contexts.{name}.tokens",
                fix=f"at most {window - longest} fit",
            )

    @cached_property
    def answer_ends(self) -> frozenset[int]:
        """Ids that end a generated answer: the base's own and the one that gold outputs end with."""
        ends = {row.gold[-1] for row in self.encoded.rows} if self.config.template.end_token else set()
        return stop_ids(self.base) | (ends if len(ends) == 1 else set())

    @property
    def tokens_identity(self) -> list[Any]:
        """What token ids depend on beside the template: tokenizer, chat template, data."""
        section, now = self.config.template, self.encoder.now
        given = [section.chat_kwargs, section.answer_prefix, now.isoformat() if now else None]
        more = [given] if any(given) else []  # none of them: the identity that earlier versions wrote
        return [self.base.identity["tokenizer"], self.base.identity["chat_template"], self.dataset.sha256, *more]

    @cached_property
    def stands_on(self) -> StandsOn:
        """What everything that is measured of this task stands on."""
        return StandsOn(
            base=self.base.document,
            template_sha256=self.template.sha256,
            data_sha256=self.dataset.sha256,
            tokens_sha256=self.encoded.sha256(),
        )

    # ---- contexts

    @cached_property
    def original(self) -> TextContext:
        """The template itself."""
        return TextContext("original", self.template, self.encoded)

    @cached_property
    def none(self) -> NoContext:
        """No template at all."""
        return NoContext("none", self.encoder.bos())

    def text_context(self, name: str, template: Template, lineage: MutationLineage | None = None) -> TextContext:
        """A text context, encoded for selection and validation rows. Raises SeamError when gold ids change under it."""
        scored = (*self.dataset.selection, *self.dataset.validation)
        gold = {example.id: self.gold[example.id] for example in scored}
        encoded = self.encoder.encode(template, scored, gold=gold, window=self.base.geometry.window)
        return TextContext(name, template, encoded, lineage)

    def mutation_context(self, mutation: Mutation) -> TextContext:
        """An accepted mutation as a context. Raises SeamError as :meth:`text_context`."""
        if mutation.template is None or mutation.name is None:
            raise ValueError("a rejected mutation is no context")
        lineage = MutationLineage(
            id=mutation.id,
            family=mutation.family,
            operators=list(mutation.operators),
            parents=list(mutation.lineage),
            seed=mutation.seed,
        )
        return self.text_context(mutation.name, mutation.template, lineage)

    def for_training(self, context: TextContext) -> TextContext:
        """The same text context, encoded for the training rows, however long they get. Raises SeamError when gold ids
        change under it.
        """
        train = self.dataset.train
        encoded = self.encoder.encode(context.template, train, gold={e.id: self.gold[e.id] for e in train})
        return replace(context, encoded=encoded)

    def candidate_ids(self, template: Template) -> tuple[int, ...]:
        """All token ids of a candidate on the first few rows; raises SeamError when their gold ids change under it."""
        probes = self.dataset.selection[:4] or self.dataset.train[:4]
        encoded = self.encoder.encode(template, probes, gold={e.id: self.gold[e.id] for e in probes})
        return (*encoded.prefix, *(token for row in encoded.rows for token in row.body))


def encode_task(inputs: Inputs, base: Base, now: datetime | None = None) -> EncodedTask:
    """Encode all rows for a base; where its chat template looks at the clock, that says ``now`` (None: the time).
    Raises SeamError or InputError for the first row that cannot be.
    """
    encoder = Encoder.of(base.tokenizer, inputs.config.template)
    if inputs.template.is_chat and encoder.renderer.check(inputs.template).uses_clock:
        encoder = Encoder.of(base.tokenizer, inputs.config.template, now or datetime.now().replace(microsecond=0))
    encoded = encoder.encode(inputs.template, inputs.examples, window=base.geometry.window)
    if inputs.config.learned and (
        fault := nothing_to_learn(encoder, inputs.template, encoded, inputs.config.template.scope)
    ):
        raise fault
    warnings = prompt_warnings(encoder, inputs.template, inputs.examples, encoded)
    return EncodedTask(inputs, base, encoder, encoded, (*warnings, *_short_windows(base, encoded)))


def _short_windows(base: Base, encoded: Encoded) -> list[str]:
    """Sliding windows that the template and its longest row outgrow."""
    sliding = base.geometry.sliding_window
    end = len(encoded.prefix) + max(len(row) for row in encoded.rows)
    if sliding is None or end <= sliding:
        return []
    return [
        f"sliding-window layers see only the last {sliding} tokens; the longest row ends {end} tokens after the"
        " template's start, so its last tokens do not see all of the template"
    ]
