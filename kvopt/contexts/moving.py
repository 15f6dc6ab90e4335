"""Moving, joining and shortening KV contexts: keys are stored after RoPE, and rotations add up, so keys computed at one
position become those of another without the text they came from.

Inside kvopt every context starts at position 0 and bodies at T, so a move is undone when its folder is read
(:func:`kvopt.contexts.folder.load_context`); it is for consumers that put something else in front. Symbols: T slots, L
layers, H key/value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, prefill
from kvopt.contexts.compaction import fewer_slots
from kvopt.contexts.context import KVContext, SoftContext
from kvopt.contexts.folder import TensorContext, rotated
from kvopt.errors import InputError, counted
from kvopt.task.seam import Row

Way = Literal["refitted", "attention", "first", "last"]
"""Which slots a shorter context keeps.

refitted: per layer and head, those whose loss would change most of what the bodies' queries read, values refitted so
    that attention reads what it read before (attention matching).
attention: slots chosen in the same way, with their own values.
first, last: the first K, or slot 0 (the attention sink) and the last K − 1.
"""
WAYS: tuple[Way, ...] = get_args(Way)
WITH_ROWS: tuple[Way, ...] = ("refitted", "attention")

_CHANGING = {"dynamic": "its angles change with the length", "longrope": "its angles change with the length"}


def moved(context: KVContext, offset: int, base: Base) -> KVContext:
    """The context with its first slot at position ``offset`` instead of 0; bodies then start at ``offset`` + T.

    Exact to fp32 rounding: the logits of bodies moved equally stay. Raises InputError where the base's RoPE is not one
    rotation that far out.
    """
    check_positions(base, offset, context.tokens, context.name)
    return KVContext(context.name, rotated(context.states, offset, base.rope))


def check_positions(base: Base, offset: int, tokens: int, name: str) -> None:
    """Raise InputError unless slots at ``offset`` … ``offset`` + ``tokens`` − 1 lie in the base's window, where RoPE is
    one fixed rotation.
    """
    window = base.geometry.window
    if offset < 0:
        raise InputError(f"position {offset} is before the start", where=name, fix="give an offset of 0 or more")
    if offset + tokens >= window:
        kind = rope_type(base)
        reason = f" and its RoPE is {kind!r}: {_CHANGING[kind]} beyond it" if kind in _CHANGING else ""
        raise InputError(
            f"slots at {offset} to {offset + tokens - 1} leave no room in the window of {window} positions{reason}",
            where=name,
            fix=f"an offset of at most {max(0, window - tokens - 1)} fits",
        )


def rope_type(base: Base) -> str:
    """The name of the base's RoPE variant in its configuration ("default" where it has none)."""
    config = base.model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    variants = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    names = {variant.get("rope_type", "default") for variant in variants}
    return next((name for name in names if name in _CHANGING), sorted(names)[0])


def joined(first: TensorContext, second: TensorContext, base: Base, name: str) -> TensorContext:
    """``first``, then ``second`` after it, as one context.

    Two soft prompts are put end to end, and the second will see the first. Otherwise both become KV caches (a soft
    prompt by a prefill) and the second's keys move on by the first's length; its slots were computed without the
    first, so measure what the pair does.
    """
    total = first.tokens + second.tokens
    check_positions(base, 0, total, name)
    if isinstance(first, SoftContext) and isinstance(second, SoftContext):
        return SoftContext(name, torch.cat([first.embeddings, second.embeddings]))
    head, tail = states_of(first, base), states_of(second, base)
    return KVContext(name, torch.cat([head, rotated(tail, first.tokens, base.rope)]))


def states_of(context: TensorContext, base: Base) -> Tensor:
    """Keys and values [T, L, 2, H, d] in fp32 on the CPU: a KV context's own, or those that a soft prompt leaves."""
    if isinstance(context, KVContext):
        return context.states
    with torch.no_grad():
        prefix = prefill(base, embeddings=context.embeddings.to(base.device, base.dtype))
    return prefix.stack().float().cpu()


def shortened(
    context: KVContext, tokens: int, way: Way, base: Base, rows: Sequence[Row] = (), name: str | None = None
) -> KVContext:
    """The context with ``tokens`` slots.

    Kept keys keep their distance to the bodies (they are rotated by ``tokens`` − T); those of ``first`` stay where they
    are.

    Args:
        way: which slots stay.
        rows: training rows, whose bodies give the queries of the ways in WITH_ROWS.

    Raises:
        InputError: as many slots as before, or more.
    """
    name = name or f"{context.name}-{tokens}"
    if not 1 <= tokens < context.tokens:
        raise InputError(
            f"{tokens} of {counted(context.tokens, 'slot')} wanted",
            where=context.name,
            fix=f"give 1 to {context.tokens - 1}",
        )
    if way in WITH_ROWS:
        prefix = Prefix.unstack(context.states.to(base.device), torch.float32)
        slots = fewer_slots(base, prefix, tokens, rows, refit=way == "refitted")
        return KVContext(name, slots.float().cpu())
    if way == "first":
        return KVContext(name, context.states[:tokens].clone())
    keep = torch.tensor([0, *range(context.tokens - tokens + 1, context.tokens)])
    return KVContext(name, rotated(context.states[keep], tokens - context.tokens, base.rope))
