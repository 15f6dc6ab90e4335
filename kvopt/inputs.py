"""What a run stands on: template, data, base, token ids, and the contexts that can be named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from kvopt.config import Config
from kvopt.contexts import Context, NoContext, TextContext, load_context
from kvopt.contexts.adapter import adapter_config, read_record
from kvopt.dataset import Dataset, Example, load_dataset
from kvopt.encoding import Encoded, Encoder
from kvopt.errors import InputError
from kvopt.files import RELATIVE, read_text, write_text
from kvopt.generate import stop_ids
from kvopt.model import Base, load_base
from kvopt.mutate.record import Mutation, read_mutations
from kvopt.progress import Progress
from kvopt.rundir import RunDirectory
from kvopt.template import Template
from kvopt.textfile import template_from_file

RESOLVED = "# Every setting of this run; relative paths start at the folder of the config file that it was given.\n"


class Inputs:
    """What one config in one run directory stands on, loaded when it is first asked for.

    Args:
        config: as read by ``load_config``; ``base_dir`` is the folder that its paths are relative to.
        out: the run directory.
        say: gets a line for each stage; default: stderr.
        bars: whether progress bars are shown (None: only on a terminal).
    """

    def __init__(
        self,
        config: Config,
        base_dir: Path,
        out: Path,
        *,
        say: Callable[[str], None] | None = None,
        bars: bool | None = None,
    ) -> None:
        self.config, self.base_dir = config, base_dir
        self.directory = RunDirectory(out)
        self.say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self.progress = Progress(self.say, bars)
        self.template: Template = config.template.build(base_dir)
        self.dataset: Dataset = load_dataset(config.data, self.template, base_dir, config.seed)
        for warning in self.dataset.warnings:
            self.say(f"warning: {warning}")

    def start(self) -> None:
        """Check everything that is known before the first stage, then write it down: a fault leaves what was there."""
        self.check_windows()
        self._warn()
        resolved = yaml.safe_dump(self._resolved(), sort_keys=False, allow_unicode=True)
        write_text(self.directory / "config.yaml", RESOLVED + resolved)
        self.directory.describe(
            seed=self.config.seed,
            device=str(self.base.device),
            threads=torch.get_num_threads(),
            dtype=str(self.base.dtype).removeprefix("torch."),
            base={"name": self.base.name, **self.base.identity},
            template_sha256=self.template.sha256,
            data_sha256=self.dataset.sha256,
            tokens_sha256=self.encoded.sha256(),
        )

    def _resolved(self) -> dict[str, Any]:
        """The config as it is written down: whole, with the text of a template file in place of its path."""
        tree = self.config.model_dump(mode="json")
        if (file := self.config.template.file) is not None:
            tree["template"] |= {"file": None, "text": read_text(self.base_dir / file, RELATIVE)}
        return tree

    def check_windows(self) -> None:
        for context in self.config.contexts:
            self.check_window(context.name, context.tokens or 0)

    def check_window(self, name: str, tokens: int) -> None:
        window, longest = self.base.geometry.window, max(len(row) for row in self._bare.rows)
        if tokens + longest > window:
            raise InputError(
                f"{tokens} slots and the longest row ({longest} tokens) do not fit the window of {window} tokens",
                where=f"contexts.{name}.tokens",
                mend=f"at most {window - longest} fit",
            )

    def _warn(self) -> None:
        sliding = self.base.geometry.sliding_window
        longest = max(len(row) for row in self.encoded.rows)
        if sliding is not None and len(self.encoded.prefix) + longest > sliding:
            self.say(
                f"warning: sliding-window layers see {sliding} tokens back; the longest row ends"
                f" {len(self.encoded.prefix) + longest} tokens behind the template's start, so they forget part of it"
            )

    @cached_property
    def base(self) -> Base:
        self.say(f"base: {self.config.model.base}")
        return load_base(self.config.model)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.base.tokenizer, self.config.template.chat_kwargs, self.config.template.end_token)

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        return (*self.dataset.train, *self.dataset.selection, *self.dataset.validation)

    @cached_property
    def encoded(self) -> Encoded:
        """All examples under the original template, train, selection and validation in this order.

        With ``scope: all`` the bodies of learned contexts keep the slots alone; the reference still sees the whole
            template.
        """
        return self.encoder.encode(self.template, self.examples, window=self.base.geometry.window)

    @cached_property
    def gold(self) -> dict[str, tuple[int, ...]]:
        return {row.example_id: row.gold for row in self.encoded.rows}

    def rows(self, split: str) -> Encoded:
        """The original's rows of ``train``, ``selection`` or ``validation``."""
        return self.encoded.select([example.id for example in getattr(self.dataset, split)])

    def behind(self, split: str) -> Encoded:
        """The rows that soft and KV contexts (and ``none``) stand in front of: the original's, or with ``scope: all``
        the slots' own.
        """
        return self._bare.select([example.id for example in getattr(self.dataset, split)])

    def rows_for(self, context: Context, split: str) -> Encoded:
        """The rows of a split as a context's ``bodies`` takes them: those of :meth:`rows` for text, else
        :meth:`behind`.
        """
        return self.rows(split) if isinstance(context, TextContext) else self.behind(split)

    @cached_property
    def _bare(self) -> Encoded:
        if self.config.template.scope == "leading":
            return self.encoded
        return self.encoder.encode(
            self.template.without_trailing_static(), self.examples, gold=self.gold, window=self.base.geometry.window
        )

    @cached_property
    def answer_ends(self) -> frozenset[int]:
        """Ids that end a generated answer: the base's own and the one that gold outputs end with."""
        ends = {row.gold[-1] for row in self.encoded.rows} if self.config.template.end_token else set()
        return stop_ids(self.base) | (ends if len(ends) == 1 else set())

    # ---- contexts

    @cached_property
    def original(self) -> TextContext:
        return TextContext("original", self.template, self.encoded)

    @cached_property
    def none(self) -> NoContext:
        return NoContext("none", self.encoder.bos())

    def text_context(self, name: str, template: Template, lineage: dict[str, Any] | None = None) -> TextContext:
        """A text context, encoded for selection and validation rows. Raises SeamError when gold ids change under it."""
        scored = (*self.dataset.selection, *self.dataset.validation)
        gold = {example.id: self.gold[example.id] for example in scored}
        return TextContext(
            name,
            template,
            self.encoder.encode(template, scored, gold=gold, window=self.base.geometry.window),
            lineage or {},
        )

    def for_training(self, context: TextContext) -> TextContext:
        """The same text context, encoded for the training rows, however long they get. Raises SeamError when gold ids
        change under it.
        """
        train = self.dataset.train
        encoded = self.encoder.encode(context.template, train, gold={e.id: self.gold[e.id] for e in train})
        return replace(context, encoded=encoded)

    def named_context(self, spec: str) -> list[Context]:
        """The contexts that a ``--context`` names: original, none, text:FILE, mutations:FILE, a mutation, a learned
        context, or a folder.
        """
        if spec == "original":
            return [self.original]
        if spec == "none":
            return [self.none]
        kind, _, argument = spec.partition(":")
        if kind == "text":
            name = Path(argument).stem
            name = argument if name in ("original", "none") else name
            return [self.text_context(name, template_from_file(Path(argument), self.template))]
        if kind == "mutations":
            path = Path(argument)
            if not path.is_file():
                raise InputError("no such file", where=str(path), mend="give a mutations.jsonl")
            contexts = [self.of_mutation(m) for m in read_mutations(path) if m.accepted]
            if not contexts:
                raise InputError("holds no accepted mutation", where=str(path))
            return list(contexts)
        known = [context.name for context in self.config.contexts]
        folder = self.directory / "contexts" / spec
        if spec in known and folder.is_dir():
            return [load_context(folder, self.base, name=spec)]
        stored = self.directory / "mutations.jsonl"
        if stored.is_file():
            for mutation in read_mutations(stored):
                if mutation.accepted and mutation.name == spec:
                    return [self.of_mutation(mutation)]
        if Path(spec).exists():
            context = load_context(Path(spec), self.base)
            if read_record(Path(spec)) is None:
                named = adapter_config(Path(spec)).get("base_model_name_or_path")
                self.say(f"warning: {spec} carries no hashes; whether its base, {named}, is this one cannot be checked")
            return [context]
        if spec in known:
            raise InputError("is not learned yet", where=spec, mend="kvopt run or kvopt optimize learns it")
        raise InputError(
            f"no context {spec!r}",
            where="--context",
            mend="original, none, text:FILE, mutations:FILE, a mutation's name, a context folder"
            + (", or " + ", ".join(known) if known else ""),
        )

    def of_mutation(self, mutation: Mutation) -> TextContext:
        if mutation.template is None or mutation.name is None:
            raise ValueError("a rejected mutation is no context")
        lineage = {
            "id": mutation.id, "family": mutation.family, "operators": list(mutation.operators),
            "parents": list(mutation.lineage), "seed": mutation.seed,
        }  # fmt: skip
        return self.text_context(mutation.name, mutation.template, lineage)

    @cached_property
    def tokens_identity(self) -> list[Any]:
        return [self.base.identity["tokenizer"], self.base.identity["chat_template"], self.dataset.sha256]

    def candidate_ids(self, template: Template) -> tuple[int, ...]:
        """All token ids of a candidate on the first few rows; raises SeamError when their gold ids change under it."""
        probes = self.dataset.selection[:4] or self.dataset.train[:4]
        encoded = self.encoder.encode(template, probes, gold={e.id: self.gold[e.id] for e in probes})
        return (*encoded.prefix, *(token for row in encoded.rows for token in row.body))
