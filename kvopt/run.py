"""All stages of a run: inputs, reference, mutations, learned contexts, scores, leaderboard. Each can be killed and
taken up again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from kvopt.completion import local_completion
from kvopt.config import Config
from kvopt.contexts import Context, KVContext, NoContext, SoftContext, TextContext, load_context, save_context
from kvopt.contexts.folder import read_record
from kvopt.contexts.initial import InitialTask, initial_tensor, split_spec
from kvopt.dataset import Dataset, Example, load_dataset
from kvopt.encoding import Encoded, Encoder
from kvopt.errors import InputError
from kvopt.files import sha256_json, write_bytes, write_jsonl, write_text
from kvopt.model import Base, load_base
from kvopt.mutate.generators import build_generator
from kvopt.mutate.record import Mutation, read_mutations
from kvopt.mutate.search import mutate, summary
from kvopt.optimize import ContextConfig, optimize
from kvopt.reference import Reference, build_reference, open_reference, reference_key
from kvopt.report.leaderboard import Entry, write_leaderboard
from kvopt.rundir import RunDirectory
from kvopt.score import Score, TokenScores, score_tokens, summarize
from kvopt.template import Template
from kvopt.textfile import template_from_file

MATCHING_ROWS = 64


class Run:
    """One config in one run directory.

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
        self.bars = bars
        self.template: Template = config.template.build(base_dir)
        self.dataset: Dataset = load_dataset(config.data, self.template, base_dir, config.seed)
        for warning in self.dataset.warnings:
            self.say(f"warning: {warning}")

    # ---- inputs

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """Lock the directory, load the base, encode the data, and write what the run stands on."""
        with self.directory.locked():
            self._start()
            yield self

    def _start(self) -> None:
        """Check everything that is known before the first stage, then write it down: a fault leaves what was there."""
        self._check_windows()
        self._warn()
        resolved = self.config.model_dump(mode="json")
        write_text(self.directory / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        self.directory.describe(
            seed=self.config.seed,
            device=str(self.base.device),
            dtype=str(self.base.dtype).removeprefix("torch."),
            base={"name": self.base.name, **self.base.identity},
            template_sha256=self.template.sha256,
            data_sha256=self.dataset.sha256,
            tokens_sha256=self.encoded.sha256(),
        )

    def _check_windows(self) -> None:
        for context in self.config.contexts:
            self._check_window(context.name, context.tokens or 0)

    def _check_window(self, name: str, tokens: int) -> None:
        window, longest = self.base.geometry.window, max(len(row) for row in self._bare.rows)
        if tokens + longest > window:
            raise InputError(
                f"{tokens} slots and the longest row ({longest} tokens) do not fit the window of {window} tokens",
                where=f"contexts.{name}.tokens",
                mend=f"at most {window - longest} fit",
            )

    def _warn(self) -> None:
        if self.config.students:
            self.say("warning: students are checked but not trained by this version")
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

    @cached_property
    def _bare(self) -> Encoded:
        if self.config.template.scope == "leading":
            return self.encoded
        return self.encoder.encode(
            self.template.without_trailing_static(), self.examples, gold=self.gold, window=self.base.geometry.window
        )

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
            contexts = [self._of_mutation(m) for m in read_mutations(path) if m.accepted]
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
                    return [self._of_mutation(mutation)]
        if Path(spec).exists():
            return [load_context(Path(spec), self.base)]
        if spec in known:
            raise InputError("is not learned yet", where=spec, mend="kvopt run or kvopt optimize learns it")
        raise InputError(
            f"no context {spec!r}",
            where="--context",
            mend="original, none, text:FILE, mutations:FILE, a mutation's name, a context folder"
            + (", or " + ", ".join(known) if known else ""),
        )

    def _of_mutation(self, mutation: Mutation) -> TextContext:
        if mutation.template is None or mutation.name is None:
            raise ValueError("a rejected mutation is no context")
        lineage = {
            "id": mutation.id, "family": mutation.family, "operators": list(mutation.operators),
            "parents": list(mutation.lineage), "seed": mutation.seed,
        }  # fmt: skip
        return self.text_context(mutation.name, mutation.template, lineage)

    # ---- stages

    @cached_property
    def reference(self) -> Reference:
        """Hidden states of the base under the original template, for every row."""
        batch_size = self.config.reference.batch_size
        key = reference_key(self.base, self.encoded, batch_size)
        self.directory.begin("reference", key, "reference")
        with suppress(InputError):  # not there or not whole: what is missing is made now
            return open_reference(self.directory / "reference", key)
        with (
            self.directory.ledger("reference", rows=len(self.encoded.rows)) as entry,
            self._bar("reference", len(self.encoded.rows)) as bar,
        ):
            prefix = self.original.prefix(self.base)
            reference = build_reference(
                self.base,
                prefix,
                self.encoded,
                self.directory / "reference",
                batch_size=batch_size,
                progress=lambda rows: _advance(bar, rows),
            )
            entry |= {
                "tokens_in": len(self.encoded.prefix) + sum(map(len, self.encoded.rows)),
                "gold_tokens": self.encoded.gold_tokens,
            }
        return reference

    @cached_property
    def mutations(self) -> list[Mutation]:
        """Every candidate tried, accepted or not; goes on from ``mutations.jsonl``."""
        config = self.config.mutations
        if config.count == 0:
            return []
        local = config.generator.kind == "local" and "paraphrase" in config.operators
        asked = config.model_dump(mode="json", exclude={"count", "max_attempts"})
        key = sha256_json(
            [self.template.to_json(), asked, self.config.template.scope, self.config.seed, self._tokens_identity]
            + ([self.base.identity, str(self.base.dtype)] if local else [])
        )
        self.directory.begin("mutations", key, "mutations.jsonl")
        journal = self.directory / "mutations.jsonl"
        before = len(read_mutations(journal))
        usage = {"model_calls": 0, "tokens_in": 0, "tokens_out": 0}
        with self.directory.ledger("mutations") as entry, self._bar("mutations", config.count, unit="mutation") as bar:
            found = mutate(
                self.template,
                config,
                scope=self.config.template.scope,
                seed=self.config.seed,
                token_ids=self._candidate_ids,
                window=self.base.geometry.window,
                generator=build_generator(
                    config.generator, self.template, complete=local_completion(self.base, usage), folder=self.base_dir
                ),
                journal=journal,
                progress=lambda mutation: _advance(bar, int(mutation.accepted)),
            )
            entry |= {"accepted": sum(m.accepted for m in found), "tried": len(found), **usage}
            entry |= {"nothing_new": True} if 0 < len(found) <= before else {}
        self.say(summary(found, config))
        return found

    @cached_property
    def _tokens_identity(self) -> list[Any]:
        return [self.base.identity["tokenizer"], self.base.identity["chat_template"], self.dataset.sha256]

    def _candidate_ids(self, template: Template) -> tuple[int, ...]:
        """All token ids of a candidate on the first few rows; raises SeamError when their gold ids change under it."""
        probes = self.dataset.selection[:4] or self.dataset.train[:4]
        encoded = self.encoder.encode(template, probes, gold={e.id: self.gold[e.id] for e in probes})
        return (*encoded.prefix, *(token for row in encoded.rows for token in row.body))

    @cached_property
    def mutation_contexts(self) -> list[TextContext]:
        """Accepted mutations as contexts."""
        contexts = []
        for mutation in self.mutations:
            if not mutation.accepted:
                continue
            try:
                contexts.append(self._of_mutation(mutation))
            except InputError as error:
                self.say(f"warning: {mutation.name} is left out: {error}")
        return contexts

    @cached_property
    def ranked_mutations(self) -> list[tuple[TextContext, Score]]:
        """Accepted mutations by forward KL on the selection rows, lowest first."""
        contexts = self.mutation_contexts
        scored = [
            (context, self.score(context, "selection")) for context in self._bar_over("scoring mutations", contexts)
        ]
        return sorted(scored, key=lambda pair: (pair[1].kl_forward.mean, pair[0].name))

    def learned(self, only: Sequence[str] = ()) -> list[KVContext | SoftContext]:
        """The contexts of the config, learned in order (or those named in ``only``, with what they start from)."""
        wanted = list(only) or [c.name for c in self.config.contexts]
        known = {c.name: c for c in self.config.contexts}
        for name in wanted:
            if name not in known:
                raise InputError(f"no context {name!r} in the config", mend="known: " + (", ".join(known) or "none"))
        return [self._learn(known[name]) for name in wanted]

    def history(self, context: Context) -> list[dict[str, Any]]:
        """Train and held-out KL by step of a context that this run learned."""
        return (read_record(self.directory / "contexts" / context.name) or {}).get("history", [])

    def _learn(self, config: ContextConfig) -> KVContext | SoftContext:
        kind, argument = split_spec(config.init, config.name)
        ids, source = self._start_of(kind, argument)
        tokens = config.tokens or (source.tokens if source else len(ids))
        self._check_window(config.name, tokens)
        train, held_out = self.behind("train"), self.behind("selection")
        seed = self.config.seed if config.seed is None else config.seed
        settings = config.model_dump(mode="json", exclude={"name", "init"}) | {"tokens": tokens, "init": kind}
        key = sha256_json(
            [
                settings,
                list(ids),
                source and source.sha256(),
                seed,
                self.reference.key,
                train.sha256(),
                held_out.sha256(),
            ]
        )
        folder = self.directory / "contexts" / config.name
        record = read_record(folder) if folder.is_dir() else None
        if record is not None and record.get("key") == key:
            return load_context(folder, self.base)
        state = self.directory / ".state" / f"{config.name}.safetensors"
        self.directory.begin(f"contexts/{config.name}", key, f"contexts/{config.name}")
        task = InitialTask(self.base, config.name, config.kind, tokens, ids, train.rows[:MATCHING_ROWS], source, seed)
        with (
            self.directory.ledger(f"contexts/{config.name}") as entry,
            self._bar(config.name, config.steps, unit="step") as bar,
        ):
            learned = optimize(
                self.base,
                initial_tensor(config.init, task),
                config,
                train.rows,
                held_out.rows,
                self.reference,
                seed=seed,
                checkpoint=state,
                key=key,
                report=_reporter(bar),
            )
            entry |= {
                "steps": learned.steps,
                "tokens_in": learned.steps * config.batch_size * sum(map(len, train.rows)) // len(train.rows),
            }
        context: KVContext | SoftContext = (
            KVContext(config.name, learned.tensor) if config.kind == "kv" else SoftContext(config.name, learned.tensor)
        )
        facts = {
            "key": key,
            "template_sha256": self.template.sha256,
            "data_sha256": self.dataset.sha256,
            "reference_key": self.reference.key,
            "scope": self.config.template.scope,
            "objective": "forward KL[p(.|V,C) || p(.|V,C')] per gold token",
            "settings": settings | {"seed": seed, "init": config.init},
            "best_step": learned.step,
            "history": learned.history,
        }
        save_context(context, folder, self.base, frozen=min(config.frozen, tokens), record=facts)
        state.unlink(missing_ok=True)
        return context

    def _start_of(self, kind: str, argument: str) -> tuple[Sequence[int], KVContext | SoftContext | None]:
        """Token ids of the text that a context starts from, and the context where it starts from one."""
        if kind == "context":
            known = {c.name: c for c in self.config.contexts}
            if argument in known:
                return (), self._learn(known[argument])
            return (), load_context(self.base_dir / argument, self.base)
        if kind == "text":
            template = template_from_file(self.base_dir / argument, self.template)
            return self.text_context(argument, template).encoded.prefix, None
        if kind == "best-mutation":
            if not self.ranked_mutations:
                raise InputError("no mutation was accepted", where="init: best-mutation", mend="raise mutations.count")
            return self.ranked_mutations[0][0].encoded.prefix, None
        if kind == "mutation":
            for context in self.mutation_contexts:
                if context.name == argument:
                    return context.encoded.prefix, None
            raise InputError(f"no accepted mutation {argument!r}", where="init", mend="see mutations.jsonl for names")
        return self.encoded.prefix, None

    # ---- scores

    def score(self, context: Context, split: str = "validation") -> Score:
        """A context's score on a split; per-token arrays are kept in ``scores/`` and taken from there when nothing
        changed.
        """
        return summarize(
            self.token_scores(context, split, self.config.score.batch_size),
            seed=self.config.seed,
            resamples=self.config.score.resamples,
        )

    def token_scores(self, context: Context, split: str, batch_size: int) -> TokenScores:
        """Per-token arrays of :meth:`score`."""
        rows = self.rows(split) if isinstance(context, TextContext) else self.behind(split)
        key = f"{self.reference.key}:{sha256_json([context.sha256(), rows.sha256(), batch_size])}"
        name = "".join(c if c.isalnum() or c in "-._" else "_" for c in context.name)
        path = self.directory / "scores" / f"{name}.{split}.b{batch_size}.safetensors"
        if _scores_key(path) == key:
            return _read_scores(path)
        with self.directory.ledger(f"scores/{name}.{split}", tokens_in=context.tokens + sum(map(len, rows.rows))):
            scores = score_tokens(self.base, context, rows, self.reference, batch_size=batch_size)
        tensors = {"kl": scores.kl, "nll": scores.nll, "agree": scores.agree, "counts": scores.counts}
        write_bytes(path, save(tensors, metadata={"key": key}))
        return scores

    def noise_floor(self) -> dict[str, Any]:
        """Forward KL of the original against itself through another batching: nothing below it means anything."""
        sizes = [self.config.reference.batch_size, max(1, self.config.score.batch_size // 3)]
        scores = summarize(
            self.token_scores(self.original, "validation", sizes[1]), resamples=self.config.score.resamples
        )
        return {
            "kl_forward": abs(scores.kl_forward.mean),
            "batch_sizes": sizes,
            "dtype": str(self.base.dtype).removeprefix("torch."),
        }

    def entries(self) -> list[Entry]:
        """Every context of the run with its scores: original, none, mutations, learned contexts."""
        contexts = self.learned()
        best = self.ranked_mutations[: self.config.score.best]
        entries = [
            Entry.of(context, self.score(context))
            for context in self._bar_over("scoring", [self.original, self.none, *contexts])
        ]
        entries += [
            Entry.of(context, self.score(context), selection)
            for context, selection in self._bar_over("scoring best mutations", best)
        ]
        return entries

    def run(self) -> dict[str, Any]:
        """All stages; returns the leaderboard as written to ``leaderboard.json``."""
        entries = self.entries()
        unreported = [
            Entry.of(context, None, selection) for context, selection in self.ranked_mutations[self.config.score.best :]
        ]
        board = write_leaderboard(self.directory.path, entries, unreported, self.noise_floor(), self.facts())
        write_jsonl(self.directory / "scores.jsonl", self._score_rows(entries, unreported))
        stages = {"reference", *(f"contexts/{c.name}" for c in self.config.contexts)}
        self.directory.keep_stages(stages | ({"mutations"} if self.config.mutations.count else set()))
        self._drop_stale()
        return board

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.config.name,
            "base": self.base.name,
            "template_tokens": len(self.encoded.prefix),
            "rows": {split: len(getattr(self.dataset, split)) for split in ("train", "selection", "validation")},
            "split": "validation",
            "selected_on": "selection",
        }

    @staticmethod
    def _score_rows(entries: Sequence[Entry], unreported: Sequence[Entry]) -> list[dict[str, Any]]:
        rows = []
        for entry in [*entries, *unreported]:
            for split, score in (("validation", entry.score), ("selection", entry.selection)):
                if score is not None:
                    rows.append(
                        {
                            "context": entry.name,
                            "kind": entry.kind,
                            "tokens": entry.tokens,
                            "split": split,
                            **score.to_json(),
                        }
                    )
        return rows

    def _drop_stale(self) -> None:
        """Remove what this config does not give: contexts, scores against another reference, states, mutations."""
        if self.config.mutations.count == 0:
            (self.directory / "mutations.jsonl").unlink(missing_ok=True)
        for path in (self.directory / "scores").glob("*.safetensors"):
            if (_scores_key(path) or "").partition(":")[0] != self.reference.key:
                path.unlink()
        names = {context.name for context in self.config.contexts}
        folder = self.directory / "contexts"
        if folder.is_dir():
            for child in folder.iterdir():
                if child.is_dir() and child.name not in names and not child.name.startswith("."):
                    shutil.rmtree(child)
        shutil.rmtree(self.directory / ".state", ignore_errors=True)

    # ---- progress

    def _bar(self, title: str, total: int, unit: str = "row") -> tqdm:
        disable = None if self.bars is None else not self.bars
        return tqdm(
            total=total, desc=title, unit=unit, disable=disable, file=sys.stderr, leave=False, dynamic_ncols=True
        )

    def _bar_over(self, title: str, items: Sequence[Any]) -> Iterator[Any]:
        if items:
            self.say(f"{title}: {len(items)}")
        with self._bar(title, len(items), unit="context") as bar:
            for item in items:
                yield item
                bar.update(1)


def _advance(bar: tqdm, by: int) -> None:
    bar.update(by)


def _reporter(bar: tqdm) -> Callable[[int, float | None, float | None], None]:
    shown: dict[str, str] = {}

    def report(step: int, train: float | None, held_out: float | None) -> None:
        if train is not None:
            shown["train"] = f"{train:.4f}"
        if held_out is not None:
            shown["held-out"] = f"{held_out:.4f}"
        bar.set_postfix(shown)
        bar.update(step - bar.n)

    return report


def _scores_key(path: Path) -> str | None:
    """What the per-token arrays in a file belong to (the reference's key first); None for no or a damaged file."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("key")
    except (SafetensorError, OSError):
        return None


def _read_scores(path: Path) -> TokenScores:
    with safe_open(str(path), framework="pt") as file:
        return TokenScores(*(file.get_tensor(name) for name in ("kl", "nll", "agree", "counts")))
