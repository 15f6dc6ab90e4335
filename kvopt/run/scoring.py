"""Scores of contexts on a split, kept in ``scores/`` and taken from there when nothing changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvopt.console.progress import advance
from kvopt.contexts.context import Context
from kvopt.documents.leaderboard_file import NoiseFloor
from kvopt.errors import InputError
from kvopt.measure.reference import Reference
from kvopt.measure.score import SCORES_VERSION, Score, TokenScores, own_scores, score_tokens, summarize
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.storage.files import file_name, key_of
from kvopt.storage.tensors import stored_key


def token_scores(
    task: EncodedTask,
    reference: Reference,
    context: Context,
    split: str,
    at: Workspace,
    batch_size: int | None = None,
    *,
    part: tuple[str, Sequence[str]] | None = None,
) -> TokenScores:
    """A context's numbers on every gold token of a split (``train``, ``selection`` or ``validation``); with ``part``, a
    name and example ids, on these rows of it alone.
    """
    own = context is task.original and batch_size is None  # the reference holds all that these scores need
    batch_size = batch_size or task.config.score.batch_size
    rows = task.rows_for(context, split)
    if part is not None:
        split, rows = part[0], rows.select(part[1])
    key = f"{reference.key}:{key_of(SCORES_VERSION, [context.sha256(), rows.sha256(), batch_size])}"
    name, path = file_name(context.name), _path(context.name, split, batch_size, at)
    if stored_key(path) == key:
        try:
            return TokenScores.read(path)
        except InputError as damage:
            at.say(f"warning: {damage.where}: {damage.what}; it is measured again")
    with (
        at.directory.ledger(f"scores/{name}.{split}") as entry,
        at.progress.bar(f"scoring {context.name}", len(rows.rows)) as bar,
    ):
        if own:
            scores = own_scores(task.base, rows.rows, reference)
        else:
            entry.tokens_in = context.tokens + sum(map(len, rows.rows))
            scores = score_tokens(task.base, context, rows, reference, batch_size=batch_size, progress=advance(bar))
    scores.write(path, key)
    return scores


def _path(name: str, split: str, batch_size: int, at: Workspace) -> Path:
    return at.directory / "scores" / f"{file_name(name)}.{split}.b{batch_size}.safetensors"


def stored_scores(name: str, split: str, at: Workspace, batch_size: int) -> TokenScores | None:
    """What :func:`token_scores` left of a context, whatever it was measured against; None where there is nothing,
    or a damaged file, which is told.
    """
    path = _path(name, split, batch_size, at)
    try:
        return TokenScores.read(path) if stored_key(path) else None
    except InputError as damage:
        at.say(f"warning: {damage.where}: {damage.what}; pairs with {name} are not compared")
        return None


def score(task: EncodedTask, reference: Reference, context: Context, split: str, at: Workspace) -> Score:
    """A context's score on a split: means per gold token, with intervals over rows."""
    scores = token_scores(task, reference, context, split, at)
    return summarize(scores, seed=task.config.seed, resamples=task.config.score.resamples)


def noise_floor(task: EncodedTask, reference: Reference, at: Workspace) -> NoiseFloor:
    """Forward KL of the original against itself through another batching: nothing below it means anything."""
    first = task.config.reference.batch_size
    other = max(1, task.config.score.batch_size // 3)
    sizes = [first, other if other != first else first + 1]
    scores = token_scores(task, reference, task.original, "validation", at, sizes[1])
    kl = summarize(scores, resamples=task.config.score.resamples).kl_forward
    return NoiseFloor(kl_forward=abs(kl.mean), batch_sizes=sizes, dtype=str(task.base.dtype).removeprefix("torch."))


def drop_other_scores(reference: Reference, at: Workspace) -> None:
    """Remove scores against another reference."""
    for path in (at.directory / "scores").glob("*.safetensors"):
        if (stored_key(path) or "").partition(":")[0] != reference.key:
            path.unlink()
