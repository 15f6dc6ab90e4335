"""All stages of a run: inputs, reference, mutations, learned contexts, scores, leaderboard. Each can be killed and
taken up again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

from kvopt.completion import local_completion
from kvopt.contexts import Context, KVContext, SoftContext, TextContext, load_context, save_context
from kvopt.contexts.folder import read_record
from kvopt.contexts.initial import InitialTask, initial_tensor, split_spec
from kvopt.errors import InputError
from kvopt.files import file_name, sha256_json, write_jsonl
from kvopt.inputs import Inputs
from kvopt.mutate.generators import build_generator
from kvopt.mutate.record import Mutation, read_mutations
from kvopt.mutate.search import mutate, summary
from kvopt.optimize import ContextConfig, optimize
from kvopt.progress import advance, step_reporter
from kvopt.reference import Reference, build_reference, open_reference, reference_key
from kvopt.report.leaderboard import Entry, write_leaderboard
from kvopt.samples import samples
from kvopt.score import Score, TokenScores, score_tokens, summarize
from kvopt.stored_moments import StoredMoments, check_head, drop_moments
from kvopt.tensorfile import stored_key
from kvopt.textfile import template_from_file

MATCHING_ROWS = 64


class Run(Inputs):
    """The stages of one config in one run directory; arguments as for :class:`kvopt.inputs.Inputs`."""

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """Lock the directory, load the base, encode the data, and write what the run stands on."""
        with self.directory.locked():
            self.start()
            yield self

    # ---- stages

    @cached_property
    def reference(self) -> Reference:
        """Hidden states of the base under the original template, for every row."""
        batch_size = self.config.reference.batch_size
        if self.config.reference.storage == "moments":
            check_head(self.base.head)
        key = reference_key(self.base, self.encoded, batch_size)
        self.directory.begin("reference", key, "reference")
        with suppress(InputError):  # not there or not whole: what is missing is made now
            return open_reference(self.directory / "reference", key)
        with (
            self.directory.ledger("reference", rows=len(self.encoded.rows)) as entry,
            self.progress.bar("reference", len(self.encoded.rows)) as bar,
        ):
            prefix = self.original.prefix(self.base)
            reference = build_reference(
                self.base,
                prefix,
                self.encoded,
                self.directory / "reference",
                batch_size=batch_size,
                progress=advance(bar),
            )
            entry |= {
                "tokens_in": len(self.encoded.prefix) + sum(map(len, self.encoded.rows)),
                "gold_tokens": self.encoded.gold_tokens,
            }
        return reference

    @cached_property
    def moments(self) -> StoredMoments | None:
        """The reference's moments of the training rows, with ``reference.storage: moments``."""
        if self.config.reference.storage != "moments":
            return None
        rows = self.rows("train").rows
        moments = StoredMoments(self.reference, [row.example_id for row in rows])
        with (
            self.directory.ledger("reference/moments", rows=len(rows)) as entry,
            self.progress.bar("moments", len(rows)) as bar,
        ):
            entry |= {} if moments.build(self.base.head, advance(bar)) else {"nothing_new": True}
        return moments

    @cached_property
    def mutations(self) -> list[Mutation]:
        """Every candidate tried, accepted or not; goes on from ``mutations.jsonl``."""
        config = self.config.mutations
        if config.count == 0:
            return []
        kept = self.config.template.kept(self.base_dir)
        config = config.model_copy(update={"protect": tuple(dict.fromkeys((*config.protect, *kept)))})
        local = config.generator.kind == "local" and "paraphrase" in config.operators
        asked = config.model_dump(mode="json", exclude={"count", "max_attempts"})
        key = sha256_json(
            [self.template.to_json(), asked, self.config.template.scope, self.config.seed, self.tokens_identity]
            + ([self.base.identity, str(self.base.dtype)] if local else [])
        )
        self.directory.begin("mutations", key, "mutations.jsonl")
        journal = self.directory / "mutations.jsonl"
        before = len(read_mutations(journal))
        usage = {"model_calls": 0, "tokens_in": 0, "tokens_out": 0}
        with (
            self.directory.ledger("mutations") as entry,
            self.progress.bar("mutations", config.count, unit="mutation") as bar,
        ):
            found = mutate(
                self.template,
                config,
                scope=self.config.template.scope,
                seed=self.config.seed,
                token_ids=self.candidate_ids,
                window=self.base.geometry.window,
                generator=build_generator(
                    config.generator, self.template, complete=local_completion(self.base, usage), folder=self.base_dir
                ),
                journal=journal,
                progress=lambda mutation: advance(bar)(int(mutation.accepted)),
            )
            entry |= {"accepted": sum(m.accepted for m in found), "tried": len(found), **usage}
            entry |= {"nothing_new": True} if 0 < len(found) <= before else {}
        self.say(summary(found, config))
        return found

    @cached_property
    def mutation_contexts(self) -> list[TextContext]:
        """Accepted mutations as contexts."""
        contexts = []
        for mutation in self.mutations:
            if not mutation.accepted:
                continue
            try:
                contexts.append(self.of_mutation(mutation))
            except InputError as error:
                self.say(f"warning: {mutation.name} is left out: {error}")
        return contexts

    @cached_property
    def ranked_mutations(self) -> list[tuple[TextContext, Score]]:
        """Accepted mutations by forward KL on the selection rows, lowest first."""
        contexts = self.mutation_contexts
        scored = [
            (context, self.score(context, "selection")) for context in self.progress.over("scoring mutations", contexts)
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
        self.check_window(config.name, tokens)
        train, held_out = self.behind("train"), self.behind("selection")
        seed = self.config.seed if config.seed is None else config.seed
        settings = config.model_dump(mode="json", exclude={"name", "init"}) | {"tokens": tokens, "init": kind}
        key = sha256_json(
            [
                settings,
                list(ids),
                source and source.sha256(),
                seed,
                self.moments.key if self.moments else self.reference.key,
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
            self.progress.bar(config.name, config.steps, unit="step") as bar,
        ):
            learned = optimize(
                self.base,
                initial_tensor(config.init, task),
                config,
                train.rows,
                held_out.rows,
                self.reference,
                moments=self.moments,
                seed=seed,
                checkpoint=state,
                key=key,
                report=step_reporter(bar),
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
            "template_tokens": len(self.encoded.prefix),
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
        rows = self.rows_for(context, split)
        key = f"{self.reference.key}:{sha256_json([context.sha256(), rows.sha256(), batch_size])}"
        name = file_name(context.name)
        path = self.directory / "scores" / f"{name}.{split}.b{batch_size}.safetensors"
        if stored_key(path) == key:
            return TokenScores.read(path)
        with self.directory.ledger(f"scores/{name}.{split}", tokens_in=context.tokens + sum(map(len, rows.rows))):
            scores = score_tokens(self.base, context, rows, self.reference, batch_size=batch_size)
        scores.write(path, key)
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
            for context in self.progress.over("scoring", [self.original, self.none, *contexts])
        ]
        entries += [
            Entry.of(context, self.score(context), selection)
            for context, selection in self.progress.over("scoring best mutations", best)
        ]
        return entries

    def run(self) -> dict[str, Any]:
        """All stages; returns the leaderboard as written to ``leaderboard.json``."""
        entries = self.entries()
        unreported = [
            Entry.of(context, None, selection) for context, selection in self.ranked_mutations[self.config.score.best :]
        ]
        board = write_leaderboard(self.directory.path, entries, unreported, self.noise_floor(), self.report_facts())
        write_jsonl(self.directory / "scores.jsonl", self._score_rows(entries, unreported))
        stages = {"reference", *(f"contexts/{c.name}" for c in self.config.contexts)}
        stages |= {name for name in self.directory.manifest.get("stages", {}) if name.startswith("students/")}
        stages |= {"samples"} if samples(self) else set()
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

    def report_facts(self) -> dict[str, Any]:
        """:meth:`facts` with the template's text and a hash of each part's rows, which tell runs apart."""
        parts = {split: getattr(self.dataset, split) for split in ("train", "selection", "validation")}
        hashes = {split: sha256_json([[e.values, e.output] for e in rows]) for split, rows in parts.items()}
        return self.facts() | {"template": self.template.to_json(), "rows_sha256": hashes}

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
            if (stored_key(path) or "").partition(":")[0] != self.reference.key:
                path.unlink()
        if self.config.reference.storage == "hidden":
            drop_moments(self.directory / "reference")
        names = {context.name for context in self.config.contexts}
        folder = self.directory / "contexts"
        if folder.is_dir():
            for child in folder.iterdir():
                if child.is_dir() and child.name not in names and not child.name.startswith("."):
                    shutil.rmtree(child)
        shutil.rmtree(self.directory / ".state", ignore_errors=True)
