"""The stages that come before scores: each makes one artefact of its inputs, in a run directory.

What is there and belongs to the same inputs is taken from there, so an interrupted stage goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from kvopt.base.completion import local_completion
from kvopt.base.prefix import Prefix
from kvopt.config.contexts import ContextConfig
from kvopt.config.mutations import GeneratorConfig
from kvopt.config.shortening import ExtractGenerator
from kvopt.console.progress import advance, step_reporter
from kvopt.contexts.adapter import read_record
from kvopt.contexts.context import TextContext
from kvopt.contexts.folder import TensorContext, load_context, save_context
from kvopt.documents.context_record import ContextFacts, LearningPoint
from kvopt.errors import InputError, counted
from kvopt.learning.descent import DESCENT_VERSION, batch_at
from kvopt.measure.moments import StoredMoments, check_head, drop_moments
from kvopt.measure.reference import Reference, build_reference, make_shard, open_reference, reference_key
from kvopt.measure.score import TokenScores
from kvopt.mutate.generators import build_generator
from kvopt.mutate.generators.endpoint import EndpointParaphraser
from kvopt.mutate.generators.file import FileVariants
from kvopt.mutate.generators.wordings import EndpointWordings
from kvopt.mutate.meaning import MeaningJudge
from kvopt.mutate.mutation import REST, Mutation, read_mutations
from kvopt.mutate.orders import wordings_report
from kvopt.mutate.search import RULES_VERSION, mutate, summary
from kvopt.mutate.validity import REQUEST_FAILED
from kvopt.run.descend import descend, drawn_ids, seed_of, slots_of
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.scoring import drop_other_scores
from kvopt.run.shorter_texts import ShorterTexts
from kvopt.storage.files import key_of
from kvopt.storage.tensors import check_tensors
from kvopt.task.seam import Row
from kvopt.task.template import Template

MUTATION_PATHS = ("mutations.jsonl", REST.format("mutations.jsonl"))


# ---- reference


def read_reference(task: EncodedTask, at: Workspace) -> Reference:
    """The stored reference of this task. Raises InputError where it is not there, not whole, or another's."""
    key = reference_key(task.base, task.encoded, task.config.reference.batch_size)
    return open_reference(at.directory / "reference", key)


def make_reference(task: EncodedTask, at: Workspace, wanted: Collection[str] | None = None) -> Reference:
    """Hidden states of the base under the original template; what is there already is kept.

    Args:
        wanted: ids of the examples that are needed now; default: every row.
    """
    batch_size = task.config.reference.batch_size
    if task.config.reference.storage == "moments":
        check_head(task.base.head)
    key = reference_key(task.base, task.encoded, batch_size)
    at.directory.begin("reference", key, "scores", remade=["reference"])
    stored: set[str] = set()
    with suppress(InputError):  # not there or not whole: what is missing is computed now
        reference = _mended(task, read_reference(task, at), at)
        stored = set(reference.index)
    asked = [row for row in task.encoded.rows if wanted is None or row.example_id in wanted]
    rows = [row for row in asked if row.example_id not in stored]
    if not rows:
        return reference
    with at.directory.ledger("reference") as entry, at.progress.bar("reference", len(asked)) as bar:
        entry.rows = len(rows)
        reference = build_reference(
            task.base,
            task.original.prefix(task.base),
            task.encoded,
            at.directory / "reference",
            batch_size=batch_size,
            wanted=wanted,
            progress=advance(bar),
            stored=bar.take_over,
            say=at.say,
        )
        entry.tokens_in = len(task.encoded.prefix) + sum(map(len, rows))
        entry.gold_tokens = sum(len(row.gold) for row in rows)
    return _mended(task, reference, at)


def _mended(task: EncodedTask, reference: Reference, at: Workspace) -> Reference:
    """The reference, which makes a damaged shard again when it is read."""

    def make_again(shard: int, damage: InputError) -> None:
        at.say(f"warning: {damage.where}: {damage.what}; it is made again")
        prefix = task.original.prefix(task.base)
        make_shard(task.base, prefix, task.encoded, reference, shard, task.config.reference.batch_size)

    reference.make_again = make_again
    return reference


def make_moments(task: EncodedTask, reference: Reference, at: Workspace) -> StoredMoments | None:
    """The reference's moments of the training rows; None without ``reference.storage: moments``."""
    if task.config.reference.storage != "moments":
        return None
    rows = task.rows("train").rows
    moments = StoredMoments(reference, [row.example_id for row in rows])
    with (
        at.directory.ledger("reference/moments") as entry,
        at.progress.bar("moments", len(rows)) as bar,
    ):
        entry.rows = len(rows)
        if not moments.build(task.base.head, advance(bar), bar.take_over, at.say):
            entry.leave_out()
    return moments


# ---- mutations


def make_mutations(task: EncodedTask, at: Workspace, shorter: ShorterTexts) -> list[Mutation]:
    """Every candidate tried, accepted or not; goes on from ``mutations.jsonl``.

    Args:
        shorter: the shorter texts of the template, for ``generator.kind: extract``.
    """
    section, base = task.inputs.mutations, task.base
    if section.count == 0:
        return []
    by_base = section.generator.kind in ("local", "extract") and "paraphrase" in section.operators
    scope, seed = task.config.template.scope, task.config.seed
    usage = {"model_calls": 0, "tokens_in": 0, "tokens_out": 0}
    generator = build_generator(
        section.generator,
        task.template,
        complete=local_completion(task.encoder.renderer.chat, base, usage),
        shorten=lengths_of(section.generator, shorter),
        folder=task.inputs.base_dir,
        say=at.say,
    )
    key = key_of(
        RULES_VERSION,
        [task.template.to_json(), section.identity(), scope, seed, task.tokens_identity]
        + ([base.identity, str(base.dtype)] if by_base else [])
        + ([generator.sha256()] if isinstance(generator, FileVariants) else []),
    )
    at.directory.begin("mutations", key, *MUTATION_PATHS)
    journal = at.directory / MUTATION_PATHS[0]
    before = len(read_mutations(journal))
    with at.directory.ledger("mutations") as entry, at.progress.bar("mutations", section.count, "mutation") as bar:
        seen = count()

        def progress(mutation: Mutation) -> None:
            (bar.take_over if next(seen) < before else bar.update)(int(mutation.accepted))

        tried = mutate(
            task.template,
            section,
            scope=scope,
            seed=seed,
            token_ids=task.candidate_ids,
            window=base.geometry.window,
            generator=generator,
            meaning=MeaningJudge(section.check, say=at.say) if section.check else None,
            journal=journal,
            progress=progress,
        )
        bought = generator.chat.usage if isinstance(generator, EndpointParaphraser | EndpointWordings) else {}
        usage["tokens_in"] += bought.get("prompt_tokens", 0)
        usage["tokens_out"] += bought.get("completion_tokens", 0)
        entry.accepted, entry.tried = sum(m.accepted for m in tried), len(tried)
        entry.model_calls, entry.tokens_in, entry.tokens_out = (
            usage[name] for name in ("model_calls", "tokens_in", "tokens_out")
        )
        if 0 < len(tried) <= before:
            entry.leave_out()
    at.say(summary(tried, section))
    if told := wordings_report(task.template, tried, bought):
        at.say(told)
    if failed := [m for m in tried if m.reason == REQUEST_FAILED]:
        what = f"warning: {counted(len(failed), 'request')} failed, the first because of: {failed[0].detail}"
        at.say(f"{what}; the same command asks again where mutations are wanted")
    return tried


def lengths_of(generator: GeneratorConfig, shorter: ShorterTexts) -> Callable[[int], Template]:
    """The template at most so many tokens long; the search begins at the first call."""

    def shortened(tokens: int) -> Template:
        assert isinstance(generator, ExtractGenerator)
        return shorter.text(generator.how, tokens, "mutations.generator.tokens").template

    return shortened


def mutation_contexts(task: EncodedTask, mutations: Sequence[Mutation], at: Workspace) -> dict[str, TextContext]:
    """Accepted mutations as contexts by name; those under which gold ids change are left out, with a warning."""
    contexts: dict[str, TextContext] = {}
    for mutation in mutations:
        if not mutation.accepted:
            continue
        try:
            context = task.mutation_context(mutation)
        except InputError as error:
            at.say(f"warning: {mutation.name} is left out: {error}")
        else:
            contexts[context.name] = context
    return contexts


# ---- learned contexts


def by_cost(task: EncodedTask) -> tuple[list[ContextConfig], list[ContextConfig]]:
    """The config's contexts that need no step and no search for texts, and the others by the tokens that their steps
    take in: each after the context that it starts from.
    """
    cost: dict[str, int] = {}
    for config in task.config.learned:
        source = config.start.source
        searched = config.start.text is not None or (source is not None and source.form in ("counted", "mutation"))
        before = cost.get(source.argument, 0) if source is not None else 0
        rows = min(config.batch_size, len(task.dataset.train))
        cost[config.name] = before + config.steps * rows * task.longest + (1 if searched else 0)
    ordered = sorted(task.config.learned, key=lambda config: cost[config.name])
    return [c for c in ordered if cost[c.name] == 0], [c for c in ordered if cost[c.name] > 0]


def drawn_rows(task: EncodedTask) -> set[str]:
    """Ids of the training rows that the steps of the config's contexts draw; all of them with stored moments."""
    if task.config.reference.storage == "moments":
        return {example.id for example in task.dataset.train}
    return {example_id for config in task.config.learned for example_id in drawn_ids(task, config)}


def drawn_tokens(rows: Sequence[Row], batch_size: int, steps: int, seed: int) -> int:
    """Tokens of all the rows that so many steps of a descent draw."""
    return sum(len(rows[i]) for step in range(steps) for i in batch_at(step, len(rows), batch_size, seed))


def make_learned(
    task: EncodedTask,
    config: ContextConfig,
    ids: Sequence[int],
    source: TensorContext | None,
    reference: Reference,
    moments: StoredMoments | None,
    at: Workspace,
    choose: Callable[[Prefix, TokenScores], float] | None = None,
) -> TensorContext:
    """One soft prompt or KV cache in ``contexts/NAME``: as it was learned, or learned now.

    Args:
        ids: token ids of the text that it starts from.
        source: the context that it starts from, in place of a text.
        reference, moments: what the descent is measured against.
        choose: chooses the checkpoint, as ``score.select`` says; None: the KL does.

    Raises:
        InputError: the slots do not fit. KvoptError: the descent diverged.
    """
    init = config.start
    tokens, seed = slots_of(task, config, ids, source), seed_of(task, config)
    train, held_out = task.bare_rows("train"), task.bare_rows("selection")
    settings = config.model_dump(mode="json", exclude={"name", "init", "text", "micro_batch_size", "optimizer"}) | {
        "tokens": tokens,
        "init": init.settings,
    }
    if config.optimizer != "adamw":
        settings["optimizer"] = config.optimizer
    if (select := task.config.score.select) != "kl":
        settings["select"] = select
    key = key_of(
        DESCENT_VERSION,
        [
            settings,
            list(ids),
            source and source.sha256(),
            seed,
            moments.key if moments else reference.key,
            train.sha256(),
            held_out.sha256(),
        ],
    )
    folder = at.directory / "contexts" / config.name
    checkpoint = at.directory / ".state" / f"{config.name}.safetensors"
    at.directory.begin(f"contexts/{config.name}", key, *context_paths(config.name))
    record = read_record(folder) if folder.is_dir() else None
    if record is not None and record.key == key:
        checkpoint.unlink(missing_ok=True)
        return load_context(folder, task.base)
    _drop_damaged(checkpoint, at)
    with (
        at.directory.ledger(f"contexts/{config.name}") as entry,
        at.progress.bar(config.name, config.steps, unit="step") as bar,
    ):
        context, descent = descend(
            task,
            config,
            ids,
            source,
            reference,
            moments=moments,
            choose=choose,
            checkpoint=checkpoint,
            key=key,
            report=step_reporter(bar),
        )
        entry.steps = descent.steps
        read = drawn_tokens(train.rows, config.batch_size, descent.steps, seed)
        entry.tokens_back = read + (descent.steps * tokens if config.kind == "soft" else 0)
        entry.tokens_in = entry.tokens_back + len(descent.history) * sum(map(len, held_out.rows))
    facts = ContextFacts(
        key=key,
        template_sha256=task.template.sha256,
        data_sha256=task.dataset.sha256,
        reference_key=reference.key,
        scope=task.config.template.scope,
        template_tokens=len(task.encoded.prefix),
        replaced_ids=len(held_out.prefix),
        objective="forward KL[p(.|V,C) || p(.|V,C')] per gold token",
        settings=settings | {"seed": seed, "init": config.init},
        best_step=descent.step,
        history=[LearningPoint.model_validate(point) for point in descent.history],
    )
    save_context(context, folder, task.base, frozen=min(config.frozen, tokens), record=facts)
    checkpoint.unlink(missing_ok=True)
    return context


def _drop_damaged(checkpoint: Path, at: Workspace) -> None:
    """Remove the state of a descent that is not as it was written: it begins anew."""
    try:
        if checkpoint.is_file():
            check_tensors(checkpoint)
    except InputError as damage:
        at.say(f"warning: {damage.where}: {damage.what}; the descent begins anew")
        checkpoint.unlink()


def context_paths(name: str) -> tuple[str, str]:
    """Where a learned context and the state of its descent are in a run directory."""
    return f"contexts/{name}", f".state/{name}.safetensors"


def learning_history(name: str, at: Workspace) -> list[LearningPoint]:
    """Train and held-out KL by step of a learned context, as its folder says."""
    record = read_record(at.directory / "contexts" / name)
    return record.history if record else []


def set_aside_others(task: EncodedTask, reference: Reference, at: Workspace) -> None:
    """Put aside what the config does not name: contexts, mutations. What one pass makes again is deleted: scores
    against another reference, moments.
    """
    folder, states = at.directory / "contexts", at.directory / ".state"
    there = [child.name for child in folder.iterdir() if child.is_dir()] if folder.is_dir() else []
    begun = [child.stem for child in states.glob("*.safetensors")]
    for name in sorted({*there, *begun}):
        if name not in task.inputs.context_names and not name.startswith("."):
            at.directory.set_aside(f"contexts/{name}", *context_paths(name))
    if task.config.mutations.count == 0:
        at.directory.set_aside("mutations", *MUTATION_PATHS)
    drop_other_scores(reference, at)
    if task.config.reference.storage == "hidden":
        drop_moments(at.directory / "reference")
    if states.is_dir() and not any(states.iterdir()):
        states.rmdir()
