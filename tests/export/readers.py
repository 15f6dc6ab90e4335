"""Contexts to export, and what our own path says of them: the logits and greedy text that every reader must give."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from kvopt.base.generate import generate, stop_ids
from kvopt.base.loading import Base
from kvopt.base.prefix import run_bodies
from kvopt.config.contexts import Init
from kvopt.contexts import KVContext, SoftContext, save_context
from kvopt.contexts.folder import TensorContext
from kvopt.documents.context_record import ContextFacts
from kvopt.learning.start_task import StartTask, initial_tensor
from kvopt.task.seam import Row, make_batch
from tests.tasks import Task

Kind = Literal["kv", "soft"]
BODIES = [[40, 41, 42], [50], [60, 61, 62, 63, 64, 65, 66], [70, 71], [80, 81, 82], [90, 91]]
NEW_TOKENS = 10
MLX_PYTHON = os.environ.get("KVOPT_MLX_PYTHON") or (sys.executable if importlib.util.find_spec("mlx_lm") else None)
"""A Python with mlx-lm; it and torch need not be in one environment."""
NO_MLX = "mlx-lm is not installed, and KVOPT_MLX_PYTHON names no Python with it"


def perturbed(task: Task, kind: Kind, tokens: int) -> TensorContext:
    """Slots spread over the template's text with some noise on them: no text has exactly these."""
    ids = task.encoded.prefix
    start = initial_tensor(Init("strided").start, StartTask(task.base, "c", kind, tokens, ids, task.encoded.rows))
    tensor = start + 0.05 * torch.randn(start.shape, generator=torch.Generator().manual_seed(tokens))
    return KVContext("c", tensor) if kind == "kv" else SoftContext("c", tensor)


def saved(task: Task, kind: Kind, folder: Path, tokens: int = 6) -> TensorContext:
    """A context of that kind in ``folder``."""
    context = perturbed(task, kind, tokens)
    save_context(context, folder, task.base, frozen=1, record=ContextFacts(template_tokens=len(task.encoded.prefix)))
    return context


def our_logits(base: Base, context: TensorContext, bodies: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [tokens, vocabulary] of each body behind the context."""
    rows = [Row(str(i), tuple(body), (0,)) for i, body in enumerate(bodies)]
    with torch.no_grad():
        hidden = run_bodies(base, context.prefix(base), make_batch(rows, range(len(rows))))
        return [base.model.lm_head(hidden[i, : len(body)]) for i, body in enumerate(bodies)]


def our_text(base: Base, context: TensorContext, bodies: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy answers of kvopt's own generation."""
    return [list(a) for a in generate(base, context.prefix(base), bodies, max_new_tokens=NEW_TOKENS)]


def batches_for(base: Base, equal: bool = False) -> list[list[list[int]]]:
    """Batches of mixed lengths; of equal lengths where asked, and where sliding windows count padding as distance."""
    if base.geometry.sliding_window is None and not equal:
        return [BODIES[:4], BODIES[4:]]
    return [[body for body in BODIES if len(body) == n] for n in sorted({len(body) for body in BODIES})]


def left_padded(bodies: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, n] of bodies padded on the left."""
    width = max(map(len, bodies))
    ids = torch.tensor([[0] * (width - len(body)) + list(body) for body in bodies])
    mask = torch.tensor([[0] * (width - len(body)) + [1] * len(body) for body in bodies])
    return ids, mask


def right_padded(bodies: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, n] of bodies padded on the right."""
    width = max(map(len, bodies))
    ids = torch.tensor([list(body) + [0] * (width - len(body)) for body in bodies])
    mask = torch.tensor([[1] * len(body) + [0] * (width - len(body)) for body in bodies])
    return ids, mask


def until_stop(base: Base, rows: Tensor) -> list[list[int]]:
    """Generated ids before the first one that ends an answer."""
    ends = stop_ids(base)
    answers = []
    for row in rows.tolist():
        answers.append(next((row[:i] for i, token in enumerate(row) if token in ends), row))
    return answers


def assert_same_logits(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> None:
    for their, our in zip(theirs, ours, strict=True):
        torch.testing.assert_close(their, our, rtol=1e-4, atol=1e-4)


def module_of(script: Path) -> ModuleType:
    """A script of an export, imported from its own folder."""
    name = f"exported_{script.stem}_{abs(hash(script))}"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
