"""A base whose decoder layers are shared out over the processes of a launch (``model.shard: fsdp2``).

torch's ``fully_shard`` keeps a W-th of each layer in each process; embeddings, final norm and head are whole in each.
All processes gather a layer together, and hold one at a time: a process asks for the layer that it computes, and gets
it when the processes before it in rank ask for no other. So each may compute something else, such as a longer answer,
and where they compute batches alike, one gathering serves all. One that has done its part helps until all have.
Gathered weights are the same bits as whole ones, so results are those of a base that is whole in each process.

Symbols: W processes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard

from kvopt.base.launch import LAUNCH
from kvopt.base.probe import decoder_layers
from kvopt.errors import InputError

DEVICES = ("cpu", "cuda")


def check_sharding(device: torch.device, quantized: bool) -> None:
    """Raises InputError where a base cannot be sharded: in one process, on another device, with quantized weights."""
    where = "model.shard fsdp2"
    if LAUNCH.count == 1:
        raise InputError(
            "shares the base out over the processes of a launch, and this is one process alone",
            where=where,
            fix="start a command that runs in several with accelerate launch or torchrun, or set model.shard: null",
        )
    if device.type not in DEVICES:
        raise InputError(f"works on {' and '.join(DEVICES)}, not on {device.type}", where=where)
    if quantized:
        raise InputError("the base is stored quantized", where=where, fix="give a base with 16-bit or 32-bit weights")
    if Shards.made:
        raise InputError("another base of this run is sharded already", where=where)


class Shards:
    """The decoder layers of a model, of which this process keeps its part.

    Args:
        model: frozen, on a CPU; its layers go to the device and are sharded one after the other, then the rest follows.

    Raises InputError for a model whose decoder layers are in no list.
    """

    made: ClassVar[bool] = False

    def __init__(self, model: Any, device: torch.device) -> None:
        decoder, layers = model.get_decoder(), decoder_layers(model)
        if layers is None:
            raise InputError(f"the layers of a {type(model).__name__} are not found", where="model.shard fsdp2")
        mesh = DeviceMesh.from_group(torch.distributed.group.WORLD, device.type)
        self._parts: list[Any] = []
        for place, layer in enumerate(layers):
            self._parts.append(fully_shard(_Part(layer), mesh=mesh))
            for module in layer.modules():  # a layer that is computed again for its way back is not called itself
                module.register_forward_pre_hook(partial(self._before_layer, place))
        of_layers = {id(t) for part in self._parts for t in (*part.parameters(), *part.buffers())}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in of_layers:
                tensor.data = tensor.data.to(device)
        decoder.register_forward_pre_hook(self._before_pass)
        decoder.register_forward_hook(self._after_pass, always_call=True)
        self._held: int | None = None
        self._storages: frozenset[int] = frozenset()
        self._hooks: list[saved_tensors_hooks] = []
        Shards.made = True
        LAUNCH.owns(shards=self)

    def need(self, layer: int) -> None:
        """Have this layer's weights whole in this process; all processes gather them."""
        while self._held != layer:
            if LAUNCH.busy:
                self.hold(LAUNCH.wished(layer))
            else:  # the others wait for an order
                LAUNCH.together(_need, self, layer)

    def hold(self, layer: int) -> None:
        """Gather a layer, in all processes at once, in place of the one before."""
        if self._held is not None:
            self._parts[self._held].reshard()
            self._held = None
        self._parts[layer].unshard()
        pointers = (parameter.untyped_storage().data_ptr() for parameter in self._parts[layer].parameters())
        self._held, self._storages = layer, frozenset(pointers) - {0}

    # ---- the weights that a pass keeps for its way back: their storage is filled again when they are needed

    def _before_layer(self, layer: int, *_: Any) -> None:
        self.need(layer)

    def _before_pass(self, *_: Any) -> None:
        self._hooks.append(saved_tensors_hooks(self._kept, self._wanted))
        self._hooks[-1].__enter__()

    def _after_pass(self, *_: Any) -> None:
        self._hooks.pop().__exit__()

    def _kept(self, tensor: Tensor) -> Any:
        plain = type(tensor) in (Tensor, nn.Parameter)  # a compiler's stand-ins have no storage
        if plain and tensor.untyped_storage().data_ptr() in self._storages:
            return self._held, tensor
        return tensor

    def _wanted(self, kept: Any) -> Tensor:
        if not isinstance(kept, tuple):
            return kept
        layer, weight = kept
        self.need(layer)
        return weight


class _Part(nn.Module):
    """A layer as fully_shard is given it: its parameters, and none of the hooks on a pass, which gather unasked."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def _need(shards: Shards, layer: int) -> None:
    shards.need(layer)
