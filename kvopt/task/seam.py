"""The token seam: every example as context | body | gold token ids, and batches of bodies.

The prompt is tokenized as production does. The context is the longest token prefix that all examples share and that
ends before the first slot character; a token that straddles the seam belongs to the body. Gold ids are what follows
the prompt's ids when prompt and output are tokenized together, and must not depend on the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvopt.config.sections import TemplateConfig
from kvopt.errors import InputError, counted
from kvopt.storage.files import sha256_json
from kvopt.task.examples import Example
from kvopt.task.plain_tokens import PlainTokens, Span
from kvopt.task.render import Rendered, Renderer
from kvopt.task.template import Template


class SeamError(InputError):
    """The prompt's ids are not a prefix of prompt + gold, or gold ids differ from the original's: the template does
    not fit the row.
    """


@dataclass(frozen=True)
class Row:
    """One example after the seam: ``body`` ids end where the answer begins; ``gold`` ids are the answer with its end
    token.
    """

    example_id: str
    body: tuple[int, ...]
    gold: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.body) + len(self.gold)


@dataclass(frozen=True)
class Encoded:
    """All examples under one text context: shared ``prefix`` ids and a row for each example, in order."""

    prefix: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def gold_tokens(self) -> int:
        return sum(len(row.gold) for row in self.rows)

    def sha256(self) -> str:
        """Identity of the token stream."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return sha256_json([self.prefix, [(row.example_id, row.body, row.gold) for row in self.rows]])

    def select(self, example_ids: Sequence[str]) -> Encoded:
        """The same context with these examples only, in the order given."""
        by_id = {row.example_id: row for row in self.rows}
        return Encoded(self.prefix, tuple(by_id[i] for i in example_ids))


@dataclass
class Encoder:
    """Encodes templates and examples for one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        chat_kwargs: further arguments of ``apply_chat_template``.
        end_token: whether gold ends with the end-of-turn (or EOS) token, so that stopping is scored and learned too;
            or that token's name.
        answer_prefix: text between a prompt and every output, part of the body; None for none.
        now: what the chat template's clock says; None: the time of the call.
    """

    tokenizer: Any
    chat_kwargs: Mapping[str, Any] = field(default_factory=dict)
    end_token: bool | str = True
    answer_prefix: str | None = None
    now: datetime | None = None

    @classmethod
    def of(cls, tokenizer: Any, section: TemplateConfig, now: datetime | None = None) -> Encoder:
        """The encoder that a config's ``template`` section describes."""
        return cls(tokenizer, section.chat_kwargs, section.end_token, section.answer_prefix, now)

    def __post_init__(self) -> None:
        self.renderer = Renderer(self.tokenizer, self.chat_kwargs, self.answer_prefix, self.now)
        self.plain = PlainTokens(self.tokenizer)
        if isinstance(self.end_token, str) and self.tokenizer.get_vocab().get(self.end_token) not in self.plain.control:
            raise InputError(
                f"{self.end_token!r} is no control token of this base",
                where="template.end_token",
                fix="true takes the end of a turn, or EOS",
            )

    def prompt_and_gold(self, template: Template, example: Example) -> tuple[list[int], int, tuple[int, ...]]:
        """The prompt's ids (an answer prefix among them), how many of them end before the first slot character, and the
        ids of the output (with its end token) after them. A token that straddles answer prefix and output belongs to
        the output: the model has to say it.

        Raises SeamError when the prompt's ids change with the output after them.
        """
        rendered = self.renderer.render(template, example.values, where=example.source)
        prompt, offsets = self._tokenize(template, rendered.text, rendered.slots)
        leading = 0
        while leading < len(prompt) and offsets[leading][1] <= rendered.first_slot:
            leading += 1
        end = self.end_of_answer(template)
        text = rendered.text + (self.answer_prefix or "")
        full, spans = self._tokenize(template, text + example.output + end, rendered.slots)
        if full[: len(prompt)] != prompt:
            raise self._merged(template, example)
        cut = len(prompt)
        while self.answer_prefix and cut < len(full) and spans[cut][1] <= len(text):
            cut += 1
        return full[:cut], leading, tuple(full[cut:])

    def end_of_answer(self, template: Template) -> str:
        """What is put behind every output; empty for nothing."""
        if isinstance(self.end_token, str):
            return self.end_token
        return self.renderer.end_of_answer(template) if self.end_token else ""

    def _merged(self, template: Template, example: Example) -> SeamError:
        fix = "end the template with a newline or use chat messages; start no output with a space or newline"
        if template.is_chat:
            fix = self.renderer.check(template).fix or fix
        return SeamError(
            "the prompt's last token merges with the output's first characters", where=example.source, fix=fix
        )

    def encode(
        self,
        template: Template,
        examples: Sequence[Example],
        *,
        gold: Mapping[str, tuple[int, ...]] | None = None,
        window: int | None = None,
    ) -> Encoded:
        """All examples under ``template``.

        Args:
            template: what the prompts are rendered from.
            examples: at least one.
            gold: the gold ids by example id that must result (those under the original template), where known.
            window: the model's context window in tokens; longer rows are an error.

        Raises:
            SeamError: gold ids do not come out right under this template.
            InputError: no gold tokens, or a row over the window.
        """
        prompts, golds, leading = [], [], []
        for example in examples:
            ids, n, target = self.prompt_and_gold(template, example)
            if gold is not None and target != gold[example.id]:
                raise SeamError("the output's token ids change under this template", where=example.source)
            if not target:
                raise InputError("the output has no tokens", where=example.source)
            prompts.append(ids)
            golds.append(target)
            leading.append(n)
        # A body keeps at least one token: something has to predict the first gold token.
        shared = min(min(leading), min(map(len, prompts)) - 1)
        shared = common_prefix(prompts, shared)
        rows = tuple(
            Row(example.id, tuple(ids[shared:]), target)
            for example, ids, target in zip(examples, prompts, golds, strict=True)
        )
        if window is not None:
            _check_window(rows, shared, examples, window)
        return Encoded(tuple(prompts[0][:shared]), rows)

    def without_end(self, gold: tuple[int, ...]) -> tuple[int, ...]:
        """The ids of an output without the end token behind them."""
        return gold[:-1] if self.end_token and gold[-1] in self.plain.control else gold

    def gold_texts(self, encoded: Encoded) -> list[str]:
        """The outputs as they come back from their ids, special tokens left out: what an answer is compared with."""
        answers = [list(self.without_end(row.gold)) for row in encoded.rows]
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def bos(self) -> tuple[int, ...]:
        """The ids that the tokenizer puts in front of any text (BOS), empty where it puts none."""
        ids = self.tokenizer("x", add_special_tokens=True)["input_ids"]
        bare = self.tokenizer("x", add_special_tokens=False)["input_ids"]
        return tuple(ids[: len(ids) - len(bare)]) if ids[-len(bare) :] == bare else ()

    def tokenized(self, template: Template, rendered: Rendered) -> tuple[list[int], list[Span]]:
        """A rendered prompt's token ids, and the (start, end) characters of each."""
        return self._tokenize(template, rendered.text, rendered.slots)

    def _tokenize(self, template: Template, text: str, data: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Ids and offsets of a rendered text. An EOS that the tokenizer itself appends (add_eos_token) is dropped:
        no prompt has it in production.
        """
        ids, offsets = self.plain.encode(text, data, add_special_tokens=not template.is_chat)
        if not template.is_chat and self.appends_eos and ids and ids[-1] == self.tokenizer.eos_token_id:
            return ids[:-1], offsets[:-1]
        return ids, offsets

    @cached_property
    def appends_eos(self) -> bool:
        """Whether the tokenizer itself puts an EOS behind any text."""
        eos = self.tokenizer.eos_token_id
        return eos is not None and self.tokenizer("x", add_special_tokens=True)["input_ids"][-1] == eos


def common_prefix(sequences: Sequence[Sequence[int]], limit: int) -> int:
    """How many leading ids, at most ``limit``, all sequences share."""
    first = sequences[0]
    for ids in sequences:
        limit = next((i for i in range(limit) if ids[i] != first[i]), limit)
    return limit


def _check_window(rows: Sequence[Row], prefix: int, examples: Sequence[Example], window: int) -> None:
    too_long = [
        (example.source, prefix + len(row))
        for example, row in zip(examples, rows, strict=True)
        if prefix + len(row) > window
    ]
    if too_long:
        more = f"; {counted(len(too_long) - 1, 'more row')} too long" if len(too_long) > 1 else ""
        raise InputError(
            f"{counted(too_long[0][1], 'token')} with the template, more than the context window of {window}{more}",
            where=too_long[0][0],
            fix="shorten or drop these rows",
        )


@dataclass(frozen=True)
class Batch:
    """Bodies and gold outputs of some rows, padded on the right.

    Attributes:
        index: positions of the rows in the list that the batch was made from.
        ids: [B, n] int64, body + gold without the last gold token (it predicts nothing).
        mask: [B, n] bool, true for real tokens.
        predicts: [G, 2] int64, (row, column) of every position that predicts a gold token, row by row.
        gold: [G] int64, the token that each of them predicts.
        lengths: real tokens of each row, known without a look at the device.
    """

    index: tuple[int, ...]
    ids: Tensor
    mask: Tensor
    predicts: Tensor
    gold: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.index,
            self.ids.to(device),
            self.mask.to(device),
            self.predicts.to(device),
            self.gold.to(device),
            self.lengths,
        )

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def make_batch(rows: Sequence[Row], index: Sequence[int], pad_id: int = 0) -> Batch:
    """The batch of ``rows[i] for i in index``."""
    chosen = [rows[i] for i in index]
    width = max(len(row) - 1 for row in chosen)
    ids = torch.full((len(chosen), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(chosen), width, dtype=torch.bool)
    predicts: list[tuple[int, int]] = []
    gold: list[int] = []
    for r, row in enumerate(chosen):
        tokens = [*row.body, *row.gold][:-1]
        ids[r, : len(tokens)] = torch.tensor(tokens)
        mask[r, : len(tokens)] = True
        predicts += [(r, column) for column in range(len(row.body) - 1, len(tokens))]
        gold += row.gold
    lengths = tuple(len(row) - 1 for row in chosen)
    return Batch(tuple(index), ids, mask, torch.tensor(predicts), torch.tensor(gold), lengths)


def length_buckets(rows: Sequence[Row], batch_size: int) -> list[list[int]]:
    """Row positions in batches of similar length (shortest first), so that little is spent on padding."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
