"""What a run does, as functions of a base and a task: for loops of your own, with no run directory.

``task = Task(template, rows)`` and ``base = Base.load(name)`` are what everything stands on; :func:`learn` gives a
context, :func:`score` says how far contexts are from the template, :func:`kl` is the loss itself. A run calls the same
functions; it only keeps what they give. Symbols: T slots, L layers, H key/value heads, d head dimension, D hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.config.calls import TemplateLike, laid_over, settings_of, template_section
from kvopt.config.contexts import ContextConfig
from kvopt.config.document import build_config
from kvopt.contexts.context import Context, KVContext, SoftContext
from kvopt.contexts.folder import TensorContext, load_context
from kvopt.errors import InputError
from kvopt.learning.descent import context_loss, prefix_loss
from kvopt.measure.reference import HeldReference, Reference, hold_reference
from kvopt.measure.score import Score, own_scores, score_tokens, summarize
from kvopt.run.descend import descend, drawn_ids
from kvopt.run.encoded_task import EncodedTask, encode_task
from kvopt.run.inputs import Inputs, read_inputs
from kvopt.task.examples import Dataset
from kvopt.task.prompt_check import nothing_to_learn
from kvopt.task.template import Template
from kvopt.task.template_files import template_from_file, template_of

Split = Literal["train", "selection", "validation"]
ContextLike = str | Template | Sequence[Mapping[str, str]] | Path | Context
"""``original``, ``none``, a wording (text or messages), a context's folder, or a context."""
SECTIONS = ("template", "data")


class Task:
    """A template and its rows, divided into training, selection and validation rows as a run divides them.

    Args:
        template: text with ``{{slots}}``, or chat messages (``{"role", "content"}``).
        rows: mappings with the slots' values and an ``output``, at least three with different values.
        validation: rows for scores; default: a part of ``rows`` is set aside, by a hash of their values.
        seed: of the rows that are set aside, of their order while learning, and of the bootstrap.
        settings: further keys of the sections ``template`` (scope, answer_prefix, …) and ``data`` (output, columns,
            limit, …) of the config, as in YAML.

    Attributes:
        inputs: config, template and rows, read and checked.

    Raises:
        InputError: something of this is wrong, in one line. What is only worth a look is a ``UserWarning``.

    Examples:
        >>> rows = [{"text": f"{i} songs, please.", "output": "music"} for i in range(20)]
        >>> task = Task("Sort it.\\nMessage: {{text}}\\nLabel:\\n", rows[:16], rows[16:])
        >>> len(task.dataset.train), len(task.dataset.selection), len(task.dataset.validation)
        (12, 4, 4)
    """

    def __init__(
        self,
        template: TemplateLike,
        rows: Iterable[Mapping[str, Any]],
        validation: Iterable[Mapping[str, Any]] | None = None,
        *,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        given = {"train": _rows(rows, "rows")}
        data: dict[str, Any] = {"train": "rows"}
        if validation is not None:
            given["validation"] = _rows(validation, "validation")
            data["validation"] = "validation"
        sections = settings_of(settings)
        if other := sorted(sections.keys() - set(SECTIONS)):
            raise InputError(f"a task has no {other[0]!r}", where="settings", fix="it has " + " and ".join(SECTIONS))
        tree = laid_over({"template": template_section(template), "data": data, "seed": seed}, sections)
        self._tree = tree
        self.inputs: Inputs = read_inputs(build_config(tree, "Task"), Path(), given)
        self._seen: tuple[EncodedTask, HeldReference | None] | None = None
        _warn(self.inputs.warnings)

    @property
    def template(self) -> Template:
        """C."""
        return self.inputs.template

    @property
    def dataset(self) -> Dataset:
        """The rows: ``train`` gives gradients, ``selection`` chooses states, ``validation`` is for scores."""
        return self.inputs.dataset

    def on(self, base: Base) -> EncodedTask:
        """Every row as token ids of a base; those of the last base are kept. Raises InputError for a row that does not
        fit.
        """
        if self._seen is None or self._seen[0].base is not base:
            encoded = encode_task(self.inputs, base)
            _warn(encoded.warnings)
            self._seen = encoded, None
        return self._seen[0]

    def reference(self, base: Base, example_ids: Collection[str]) -> Reference:
        """Hidden states of the base under the template for these examples (and those asked for before), in memory: G·D
        numbers in the base's dtype for G gold tokens.
        """
        task = self.on(base)
        assert self._seen is not None
        held = self._seen[1]
        if held is None or held.lacks(example_ids):
            size = task.config.reference.batch_size
            prefix = task.original.prefix(base)
            held = hold_reference(base, prefix, task.encoded, batch_size=size, wanted=example_ids, earlier=held)
            self._seen = task, held
        return held

    def config_of(self, base: Base, entry: Mapping[str, Any]) -> ContextConfig:
        """The settings of a context, checked with those of the task, as a config's. Raises InputError."""
        dtype = str(base.dtype).removeprefix("torch.")
        config = build_config({**self._tree, "model": {"dtype": dtype}, "contexts": [dict(entry)]}, "learn")
        return config.learned[0]


def learn(
    base: Base,
    task: Task,
    kind: Literal["kv", "soft"] = "kv",
    tokens: int | None = 64,
    start: str | dict[str, Any] | TensorContext | None = None,
    *,
    name: str | None = None,
    report: Callable[[int, float | None, float | None], None] | None = None,
    **settings: Any,
) -> TensorContext:
    """Learn a soft prompt or KV cache that makes ``base`` behave as it does under the task's template.

    Gradient descent on the forward KL per gold token to the base under the template, over the training rows; the state
    with the lowest KL on the selection rows is kept.

    Args:
        base: the frozen model.
        task: template and rows.
        kind, tokens: kv or soft, and how many slots T; None: as many as the text (or context) that it starts from has.
        start: an ``init`` of the config that needs no run (matched, strided, salient, template, random-text, random,
            ``text:FILE``, or a mapping with kind and options), or a context; default: matched for kv, salient for soft.
        name: of the context; default: ``kv-64``.
        report: called with (step, train KL, held-out KL where it was just measured) at the start and after each step.
        settings: further keys of an entry of the config's ``contexts``: steps, learning_rate, batch_size, frozen, ….

    Returns:
        ``KVContext`` with ``states`` [T, L, 2, H, d], or ``SoftContext`` with ``embeddings`` [T, D]; fp32, on the CPU.
        ``kvopt.contexts.save_context(context, folder, base)`` writes it as a PEFT adapter.

    Raises:
        InputError: a setting is wrong, the slots do not fit, or no gradients come through the base.
        KvoptError: the descent diverged.

    Examples:
        >>> context = learn(base, task, kind="kv", tokens=16, start="matched", steps=4)
        >>> tuple(context.states.shape) == (16, base.geometry.layers, 2, base.geometry.kv_heads, base.geometry.head_dim)
        True
    """
    if kind not in ("kv", "soft") or "text" in settings:
        what = "a wording is not learned" if "text" in settings else f"no kind {kind!r}"
        raise InputError(what, where="learn", fix="kind is kv or soft; give wordings to score")
    source = start if isinstance(start, KVContext | SoftContext) else None
    begin = {"init": "context:(given)"} if source else {} if start is None else {"init": start}
    entry = {"name": name or f"{kind}-{tokens or 'all'}", "kind": kind, **begin, **settings}
    config = task.config_of(base, entry if tokens is None else {**entry, "tokens": tokens})
    encoded = task.on(base)
    template, scope = task.template, encoded.config.template.scope
    if fault := nothing_to_learn(encoded.encoder, template, encoded.encoded, scope):
        raise fault
    if source is not None:
        _check_fits(base, source)
    ids = () if source else _start_ids(encoded, config)
    rows = {example.id for example in task.dataset.selection} | drawn_ids(encoded, config)
    context, _ = descend(encoded, config, ids, source, task.reference(base, rows), report=report)
    return context


def score(
    base: Base,
    task: Task,
    contexts: Mapping[str, ContextLike] | Sequence[ContextLike],
    *,
    split: Split = "validation",
    batch_size: int = 16,
    resamples: int = 2000,
) -> dict[str, Score]:
    """How far the base under each context is from the base under the task's template, on the gold tokens of a split.

    Args:
        base: the frozen model.
        task: template and rows.
        contexts: ``"original"``, ``"none"``, wordings (text or chat messages, as :func:`~kvopt.task.template_files
            .template_of` reads them: text without slots takes the place of what stands before the first slot), folders
            (``Path``) and contexts; or a mapping that names them. Wordings without a name are ``wording-1``, ….
        split: the rows to score on; nothing is learned or chosen on those of ``validation``.
        batch_size: rows in a batch.
        resamples: how many bootstrap draws over rows give a 95 % interval.

    Returns:
        By name: forward KL and gold NLL with intervals, in nats per gold token, and top-1 agreement.

    Raises:
        InputError: a wording with other slots or under which gold ids change, two contexts of one name, a context of
            another base's shape.

    Examples:
        >>> scores = score(base, task, {"template": "original", "short": "Sort the message.", "nothing": "none"})
        >>> scores["template"].kl_forward.mean, scores["nothing"].kl_forward.mean > 0
        (0.0, True)
    """
    encoded = task.on(base)
    rows = _examples(task, split)
    reference = task.reference(base, rows)
    scores: dict[str, Score] = {}
    for name, context in _named(encoded, contexts, split).items():
        original = encoded.rows_for(context, split)
        if context is encoded.original:
            tokens = own_scores(base, original.rows, reference)
        else:
            tokens = score_tokens(base, context, original, reference, batch_size=batch_size)
        scores[name] = summarize(tokens, seed=encoded.config.seed, resamples=resamples)
    return scores


def kl(
    base: Base,
    task: Task,
    context: ContextLike | Tensor,
    *,
    split: Split = "train",
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Forward KL[p(·|V,C) ‖ p(·|V,C')] in nats per gold token, exact over the whole vocabulary: what :func:`learn`
    minimises, for optimizers of your own.

    Args:
        base: the frozen model.
        task: template and rows.
        context: a tensor, kv [T, L, 2, H, d] (keys after RoPE at positions 0 … T − 1) or soft [T, D], of any float
            dtype, in which the result is differentiable; or a context as for :func:`score`.
        split: the rows to take, which are one batch.
        rows: their positions in the split; default: all of them.

    Returns:
        A scalar, fp32, on the base's device.

    Raises:
        InputError: a tensor of another shape than the base's, a row that is not there, or a base without gradients.

    Examples:
        >>> states = context.states.clone().requires_grad_(True)
        >>> kl(base, task, states, rows=[0, 1]).backward()
        >>> states.grad.shape == states.shape
        True
    """
    encoded, ids = task.on(base), _examples(task, split)
    if rows is not None:
        if not rows or not all(0 <= row < len(ids) for row in rows):
            raise InputError(f"rows {list(rows)} of {split}, which has {len(ids)}", where="kl", fix="count from 0")
        ids = [ids[row] for row in rows]
    reference = task.reference(base, ids)
    if isinstance(context, Tensor):
        kind = _check_fits(base, context)
        if context.requires_grad:
            base.check_gradients("kl")
        bodies = encoded.bare_rows(split).select(ids).rows
        return context_loss(base, kind, context.to(base.device), bodies, reference)
    (chosen,) = _named(encoded, [context], split).values()
    with torch.no_grad():
        bodies = chosen.bodies(encoded.rows_for(chosen, split).select(ids)).rows
        return prefix_loss(base, chosen.prefix(base), bodies, reference, None)


def _rows(rows: Iterable[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    if isinstance(rows, str | Path | Mapping) or not isinstance(rows, Iterable):
        fix = "read a file first, or use kvopt.optimize_context, which takes one"
        raise InputError(f"must be rows in memory, not {type(rows).__name__}", where=where, fix=fix)
    return list(rows)


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        warnings.warn(line, stacklevel=3)


def _examples(task: Task, split: Split) -> list[str]:
    """Ids of the examples of a split."""
    if split not in ("train", "selection", "validation"):
        raise InputError(f"no split {split!r}", where="split", fix="one of train, selection, validation")
    return [example.id for example in getattr(task.dataset, split)]


def _start_ids(task: EncodedTask, config: ContextConfig) -> Sequence[int]:
    """Ids of the text that a context starts from. Raises InputError for a start that only a run has."""
    source = config.start.source
    if source is not None and source.form == "text":
        wording = template_from_file(Path(source.argument), task.template)
        return task.text_context(config.name, wording).encoded.prefix
    if source is not None or config.start.text is not None:
        fix = "give the context itself, or text:FILE"
        raise InputError(f"start {config.init!r} needs what a run has made", where="learn", fix=fix)
    return task.start_ids


def _named(
    task: EncodedTask, contexts: Mapping[str, ContextLike] | Sequence[ContextLike], split: Split
) -> dict[str, Context]:
    """Contexts by name. Raises InputError."""
    if isinstance(contexts, Mapping):
        return {name: _context(task, name, context, split) for name, context in contexts.items()}
    if isinstance(contexts, str | Path) or not isinstance(contexts, Sequence):
        raise InputError("must be a list of contexts, or a mapping of names to them", where="contexts")
    named: dict[str, Context] = {}
    for context in contexts:
        if isinstance(context, Context):
            name = context.name
        elif isinstance(context, Path) or context in ("original", "none"):
            name = Path(context).name if isinstance(context, Path) else str(context)
        else:
            name = f"wording-{sum(other.startswith('wording-') for other in named) + 1}"
        if name in named:
            fix = "give a mapping of names to contexts"
            raise InputError(f"two contexts are called {name!r}", where="contexts", fix=fix)
        named[name] = _context(task, name, context, split)
    return named


def _context(task: EncodedTask, name: str, context: ContextLike, split: Split) -> Context:
    if isinstance(context, KVContext | SoftContext):
        _check_fits(task.base, context)
        return context
    if isinstance(context, Context):
        return context
    if isinstance(context, Path):
        return load_context(context, task.base, name=name)
    if context == "original":
        return task.original
    if context == "none":
        return task.none
    source = context.to_json() if isinstance(context, Template) else context
    if not isinstance(source, str | Mapping):
        source = template_section(source)
    wording = task.text_context(name, template_of(source, task.template, where=f"contexts.{name}"))
    return task.for_training(wording) if split == "train" else wording


def _check_fits(base: Base, context: TensorContext | Tensor | Any) -> Literal["kv", "soft"]:
    """The kind of a learned context, or of its tensor. Raises InputError where it is not this base's."""
    shape = tuple((context if isinstance(context, Tensor) else context.tensor).shape)
    g = base.geometry
    wanted = {"kv": (g.layers, 2, g.kv_heads, g.head_dim), "soft": (g.hidden_size,)}
    for kind, rest in wanted.items():
        if shape[1:] == rest and shape[0] > 0:
            return kind  # type: ignore[return-value]
    fix = f"kv is [T, {', '.join(map(str, wanted['kv']))}], soft is [T, {g.hidden_size}]"
    raise InputError(f"a tensor of shape {list(shape)} is no context of {base.name!r}", where="context", fix=fix)
