"""What changes while a context is learned, each tensor once, and the checkpoints that a descent goes on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvopt.base.devices import is_out_of_memory
from kvopt.config.contexts import ContextConfig
from kvopt.storage.tensors import read_tensors, stored_key, write_tensors

OPTIMIZER = "optimizer."
"""Before the names of an optimizer's tensors in a checkpoint."""
SECONDS_BETWEEN_CHECKPOINTS = 60.0
"""What a killed process loses at most, beside the step that it was in."""
WRITES_BETWEEN_CHECKPOINTS = 10.0
"""The same in the time that writing one takes, where that is longer."""


@dataclass
class DescentState:
    """All that changes while training; what a checkpoint holds.

    On the device are the trainable slots, their gradient and the optimizer's moments, each once; the best state is on
    the CPU.

    A checkpoint's tensors are the trainable slots, those of the optimizer (AdamW's moments and steps, or Muon's
    momentum), and the best state; its numbers are those of NUMBERS, as JSON.
    """

    trainable: Tensor
    optimizer: torch.optim.Optimizer
    best: Tensor
    step: int = 0
    best_step: int = 0
    best_kl: float = math.inf
    best_value: float = math.inf
    since_best: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    NUMBERS = ("step", "best_step", "best_kl", "best_value", "since_best", "history", "recent")

    @classmethod
    def begin(cls, trainable: Tensor, best: Tensor, config: ContextConfig) -> DescentState:
        """The state before the first step."""
        trainable = trainable.detach().requires_grad_(True)
        return cls(trainable, make_optimizer(trainable, config), best)

    def save(self, path: Path, key: str) -> None:
        numbers = json.dumps({name: getattr(self, name) for name in self.NUMBERS}).encode()
        inner = self.optimizer.state_dict()["state"].get(0, {})
        tensors = {
            "trainable": self.trainable,
            **{OPTIMIZER + name: torch.as_tensor(value) for name, value in inner.items()},
            "best": self.best,
            "numbers": torch.frombuffer(bytearray(numbers), dtype=torch.uint8),
        }
        write_tensors(path, tensors, key)

    @classmethod
    def load(cls, path: Path, key: str, config: ContextConfig, device: torch.device) -> DescentState | None:
        """The checkpoint at ``path``, None when there is none, it is damaged, or it belongs to another job."""
        if stored_key(path) != key:
            return None
        tensors = read_tensors(path)
        numbers = json.loads(bytes(tensors.pop("numbers").tolist()))
        best = tensors.pop("best")
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        state = cls.begin(on_device["trainable"], best, config)
        inner = {name.removeprefix(OPTIMIZER): t for name, t in on_device.items() if name.startswith(OPTIMIZER)}
        if "first_moment" in on_device:  # 0.1.0
            step, moments = (
                torch.tensor(float(numbers["step"])),
                (on_device["first_moment"], on_device["second_moment"]),
            )
            inner = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": {0: inner} if inner else {}, "param_groups": groups})
        for name in cls.NUMBERS:
            setattr(state, name, numbers.get(name, numbers["best_kl"]))  # 0.1.0 had no best_value: it was the KL
        return state


def make_optimizer(trainable: Tensor, config: ContextConfig) -> torch.optim.Optimizer:
    """AdamW, or for soft prompts Muon: each step moves all slots together along an orthogonalized momentum [T, D]
    (Jordan et al. 2024), its size that of an AdamW step with the same learning rate (arXiv 2502.16982).
    """
    if config.optimizer == "muon":
        return torch.optim.Muon(
            [trainable], lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
    return torch.optim.AdamW([trainable], weight_decay=config.weight_decay)


class CheckpointKeeper:
    """Writes checkpoints: as often as a lost minute is worth, and before what would lose the work since the last."""

    def __init__(self, state: DescentState, path: Path | None, key: str) -> None:
        self.state, self.path, self.key = state, path, key
        self.due = time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS

    def now_and_then(self) -> None:
        """A checkpoint where it is due."""
        if self.path is not None and time.monotonic() >= self.due:
            self.save()

    def save(self) -> None:
        """A checkpoint of the state, which must be between two steps; nothing without a path."""
        if self.path is None:
            return
        began = time.monotonic()
        self.state.save(self.path, self.key)
        ended = time.monotonic()
        self.due = ended + max(SECONDS_BETWEEN_CHECKPOINTS, WRITES_BETWEEN_CHECKPOINTS * (ended - began))

    @contextmanager
    def of_memory(self) -> Iterator[None]:
        """Around what changes nothing of the state: where memory runs out in it, what was done until then is kept."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                self.state.optimizer.zero_grad(set_to_none=True)
                self.save()
            raise
