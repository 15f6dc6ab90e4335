"""Targets in the model's own words (S3FT, Gupta et al. 2025): where the base's own answer to a training row is right,
it takes the place of the gold output, so that training moves the model no further than the task asks.

The base answers greedily under the original template. Checks decide what is right; rows that fail one, or whose answer
was cut, keep their gold output (the paper also tries a paraphrase of it; that step is left out).
"""

from __future__ import annotations

from dataclasses import replace

from kvopt.base.generate import answer_text, generate
from kvopt.config.metrics import Item
from kvopt.config.students import OwnAnswersConfig, StudentConfig
from kvopt.console.progress import advance
from kvopt.errors import counted
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.inputs import Inputs
from kvopt.storage.files import sha256_json
from kvopt.storage.keyed_rows import write_rows
from kvopt.task.seam import Encoded, Row
from kvopt.train.pool import Pool

VERSION = 1
"""Raise it when the same inputs give other answers."""


def check_own_answers(inputs: Inputs, config: StudentConfig) -> None:
    """Refuse, before any work, checks that cannot be made. Raises InputError."""
    if config.own_answers is not None:
        for check in config.own_answers.accept:
            check.prepared(inputs.base_dir)


def with_own_answers(task: EncodedTask, config: StudentConfig, pool: Pool, at: Workspace) -> Pool:
    """The pool with the base's answers as gold where every check passes; the pool itself without such settings."""
    if config.own_answers is None:
        return pool
    golds = _accepted(task, config.own_answers, at)
    limit = min(config.max_length or task.base.geometry.window, task.base.geometry.window)
    fitting = {
        row.example_id: golds[row.example_id]
        for i, row in enumerate(pool.contexts[0].rows)
        if row.example_id in golds
        and all(item.slots + len(item.rows[i].body) + len(golds[row.example_id]) <= limit for item in pool.contexts)
    }
    contexts = tuple(replace(item, encoded=_with_gold(item.encoded, fitting)) for item in pool.contexts)
    golds_of_pool = counted(pool.rows, "gold output")
    at.say(f"student {config.name}: {len(fitting)} of {golds_of_pool} taken from the base's own answers")
    return replace(pool, contexts=contexts, own=len(fitting))


def _with_gold(encoded: Encoded, golds: dict[str, tuple[int, ...]]) -> Encoded:
    rows: tuple[Row, ...] = tuple(replace(row, gold=golds.get(row.example_id, row.gold)) for row in encoded.rows)
    return Encoded(encoded.prefix, rows)


def _accepted(task: EncodedTask, settings: OwnAnswersConfig, at: Workspace) -> dict[str, tuple[int, ...]]:
    """Ids of the answers that pass every check, end token included, by example."""
    checks = [check.prepared(task.inputs.base_dir) for check in settings.accept]
    examples = {example.id: example for example in task.dataset.train}
    answers = {}
    for example_id, ids in _answers(task, settings.max_new_tokens, at).items():
        example = examples[example_id]
        text = answer_text(task.base, ids)
        item = Item(example_id, example.values, task.expected[example_id], text)
        if len(ids) > 1 and ids[-1] in task.answer_ends and all(check.passed(item) for check in checks):
            answers[example_id] = ids
    return answers


def _answers(task: EncodedTask, max_new_tokens: int, at: Workspace) -> dict[str, tuple[int, ...]]:
    """Greedy answers of the base to every training row, from ``own-answers.jsonl`` where it still fits."""
    rows, base = task.rows("train").rows, task.base
    context, batch_size = task.original, task.config.score.batch_size
    stream = [context.sha256(), [(row.example_id, row.body) for row in rows], max_new_tokens, sorted(task.answer_ends)]
    key = sha256_json([VERSION, base.identity, str(base.dtype), base.device.type, batch_size, stream])[:16]
    path = at.directory / "own-answers.jsonl"
    stored = at.directory.rows(path, key, len(rows))
    if stored is None:
        with at.directory.ledger("own-answers") as entry, at.progress.bar("own answers", len(rows)) as bar:
            answers = generate(
                base, context.prefix(base), [row.body for row in rows], max_new_tokens=max_new_tokens,
                stop=task.answer_ends, batch_size=batch_size, keep_stop=True, progress=advance(bar),
            )  # fmt: skip
            entry.tokens_in, entry.tokens_out = sum(len(row.body) for row in rows), sum(map(len, answers))
        entries = [{"example_id": row.example_id, "ids": list(ids)} for row, ids in zip(rows, answers, strict=True)]
        stored = write_rows(path, key, entries)
    return {row["example_id"]: tuple(row["ids"]) for row in stored}
