"""``samples.json``: single validation examples under the contexts that the report shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from kvopt.console.progress import advance
from kvopt.contexts.context import Context, TextContext
from kvopt.contexts.folder import TensorContext
from kvopt.documents.samples_file import SamplesDocument
from kvopt.documents.validated import read_document, write_document
from kvopt.errors import InputError
from kvopt.measure.reference import Reference
from kvopt.measure.samples import GOLD_LIMIT, SAMPLES_VERSION, SampleLimits, Shown, collect
from kvopt.measure.score import TokenScores
from kvopt.run.answers import TaskMetrics
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.storage.files import key_of, sha256_json

SAMPLES = "samples.json"


def read_samples(at: Workspace) -> SamplesDocument | None:
    """The stored samples with their key; None where there are none that can be read."""
    with suppress(InputError):
        return read_document(SamplesDocument, at.directory / SAMPLES)
    return None


def make_samples(
    task: EncodedTask,
    reference: Reference,
    best: Sequence[TextContext],
    learned: Sequence[TensorContext],
    scores: Callable[[Context], TokenScores],
    metrics: TaskMetrics,
    at: Workspace,
) -> SamplesDocument | None:
    """Samples of the original, the ``best`` mutations, the learned contexts with the lowest KL, and no context at all;
    as they are stored where nothing changed, None when the config wants none.

    Args:
        scores: gives a context's numbers on the validation rows.
        metrics: has the answers to these rows where the config has metrics; else they are generated now.
    """
    config = task.config.report
    if config.examples == 0:
        (at.directory / SAMPLES).unlink(missing_ok=True)
        at.directory.forget("samples")
        return None

    def shown(context: Context) -> Shown:
        answers = metrics.answers(context).texts if metrics else ()
        return Shown(context, context.bodies(task.rows_for(context, "validation")), scores(context), answers)

    trained = [shown(context) for context in learned]
    closest = sorted(range(len(trained)), key=lambda i: float(trained[i].scores.kl.mean()))[: config.contexts]
    original = shown(task.original)
    others = [*(shown(c) for c in best), *(trained[i] for i in sorted(closest)), shown(task.none)]
    cut = task.config.evaluate.max_new_tokens if metrics else config.max_new_tokens
    limits = SampleLimits(config.examples, config.top_k, cut)
    facts = [(s.context.name, s.context.kind, s.context.sha256(), s.bodies.sha256()) for s in (original, *others)]
    size, ends = task.config.score.batch_size, task.answer_ends
    key = key_of(
        SAMPLES_VERSION, [reference.key, task.dataset.sha256, vars(limits), facts, size, sorted(ends), GOLD_LIMIT]
    )
    if metrics:
        key = sha256_json([key, task.config.evaluate.rows])
    at.directory.begin("samples", key, remade=[SAMPLES])
    stored = read_samples(at)
    if stored is not None and stored.key == key:
        return stored
    with at.directory.ledger("samples") as entry, at.progress.bar("samples", 1 + len(others), "context") as bar:
        document = collect(
            task.base, reference, original, others, task.dataset.validation, limits, stop=ends, progress=advance(bar)
        )
        fed = [s.context.tokens + sum(map(len, s.bodies.rows)) // len(s.bodies.rows) for s in (original, *others)]
        entry.tokens_in, entry.contexts = sum(fed) * len(document.examples), len(fed)
    document.key, document.stands_on = key, task.stands_on
    write_document(at.directory / SAMPLES, document)
    return document
