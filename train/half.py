"""Half Fine-Tuning (Hui et al. 2024): each epoch trains a random half of the matrices of each kind, the rest is frozen.

A kind is one name across the layers (``self_attn.q_proj.weight``, …). The paper draws its halves inside each layer,
among attention, feed-forward and norm parameters; drawing them across layers needs no list of architectures and
freezes exactly half of every kind. What stands outside the layers (embeddings, final norm, head) is trained in every
epoch. The frozen half is a function of seed and epoch alone, so a resumed run freezes what an uninterrupted one
freezes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from random import Random
from typing import Any

from torch import nn
from transformers import TrainerCallback

from kvopt.train.student import layer_of

_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


def frozen_half(names: Iterable[str], seed: int, epoch: int) -> frozenset[str]:
    """The parameters that stay as they are in an epoch: of n with the same name in different layers n/2, the odd one by
    a coin.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if layer_of(name) is not None:
            kinds[_NUMBER.sub(r"\1#", name)].append(name)
    frozen: set[str] = set()
    for kind, members in sorted(kinds.items()):
        chance = Random(f"{seed}/{epoch}/{kind}")
        count = len(members) // 2 + (len(members) % 2 and chance.randrange(2))
        frozen.update(chance.sample(sorted(members), count))
    return frozenset(frozen)


class HalfFineTuning(TrainerCallback):
    """Freezes another half at the start of each epoch; at the end of training everything can be trained again.

    The optimizer must have been made before (as ``transformers.Trainer`` does), so that it knows all parameters; a
    frozen one has no gradient and is left alone, weight decay included. Under DistributedDataParallel parameters that
    change between frozen and trained need ``ddp_find_unused_parameters=True``.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_epoch_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        epoch = math.floor((state.epoch or 0.0) + 1e-6)
        parameters = _trainable(model)
        frozen = frozen_half(parameters, self.seed, epoch)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name not in frozen)
            if name in frozen:
                parameter.grad = None

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        for parameter in _trainable(model).values():
            parameter.requires_grad_(True)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's float parameters by name, without the ``module.`` of a wrapper."""
    return {
        name.removeprefix("module."): parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }
