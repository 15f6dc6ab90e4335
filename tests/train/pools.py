"""Pools and jobs over the tiny sorting task, for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvopt.config.students import StudentConfig
from kvopt.contexts import Context, KVContext, NoContext, SoftContext, TextContext
from kvopt.task.seam import Encoded
from kvopt.train.job import Job
from kvopt.train.pool import Pool, PoolContext
from kvopt.train.student import Student
from tests.tasks import OTHER, Task, template_for


def context(task: Task, name: str) -> Context:
    """original, other (a rewording), none, kv (5 slots), soft (4 slots)."""
    g, base = task.base.geometry, task.base
    rng = torch.Generator().manual_seed(7)
    if name == "original":
        return task.original
    if name == "other":
        return task.text("other", template_for(base, OTHER))
    if name == "none":
        return NoContext("none", task.encoder.bos())
    if name == "kv":
        shape = (5, g.layers, 2, g.kv_heads, g.head_dim)
        return KVContext("kv", torch.randn(shape, generator=rng))
    ids = torch.tensor([7, 11, 13, 17], device=base.device)
    return SoftContext("soft", base.embed(ids).detach().cpu().clone())


def pool(task: Task, *names: str, weights: tuple[float, ...] | None = None) -> Pool:
    """A pool of such contexts over all rows of the task."""
    items = []
    for name, weight in zip(names, weights or (1.0,) * len(names), strict=True):
        made = context(task, name)
        if isinstance(made, TextContext):
            encoded = made.encoded
        else:
            encoded = Encoded(tuple(getattr(made, "bos", ())), task.encoded.rows)
        items.append(PoolContext(made, weight, encoded))
    return Pool(tuple(items))


def job(task: Task, folder: Path, contexts: Pool, *, key: str = "k", seed: int = 3, **settings: Any) -> Job:
    """A job without trackers; ``settings`` are those of a student."""
    names = [item.name for item in contexts.contexts]
    config = StudentConfig.model_validate({"name": "s", "contexts": names, "report_to": [], "batch_size": 4} | settings)
    return Job(task.base, config, contexts, seed, key, folder, folder / "logs", task.reference)


def weights(student: Student) -> dict[str, Tensor]:
    """A copy of what is trained."""
    return {
        name: p.detach().clone() for name, p in student.model.named_parameters() if "lora" in name or not student.peft
    }


def plain_logits(model: Any, task: Task, item: PoolContext, row: int) -> Tensor:
    """Logits [gold tokens, V] of one row under one context by plain transformers: no batch, no padding, nothing
    shared."""
    line = item.encoded.rows[row]
    gold, body = list(line.gold), list(line.body)
    if isinstance(item.context, KVContext):
        states = item.context.states
        cache = DynamicCache()
        for layer in range(states.shape[1]):
            keys, values = (states[:, layer, i].transpose(0, 1)[None] for i in (0, 1))
            cache.update(keys, values, layer)
        output = model(input_ids=torch.tensor([body + gold]), past_key_values=cache)
    elif isinstance(item.context, SoftContext):
        embedded = model.get_input_embeddings()(torch.tensor([body + gold]))
        output = model(inputs_embeds=torch.cat([item.context.embeddings[None], embedded], 1))
    else:
        output = model(input_ids=torch.tensor([[*item.encoded.prefix, *body, *gold]]))
    return output.logits[0, -len(gold) - 1 : -1]


def plain_nll(model: Any, task: Task, item: PoolContext, row: int) -> Tensor:
    """Σ −log p(gold) of :func:`plain_logits`."""
    gold = torch.tensor(item.encoded.rows[row].gold)
    return -plain_logits(model, task, item, row).log_softmax(-1).gather(-1, gold[:, None]).sum()
