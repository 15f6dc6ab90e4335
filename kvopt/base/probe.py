r"""What a loaded model can do, found by running it: nothing here asks which class it is.

A context is only its keys and values, so a base must satisfy, on a few tokens: it is causal; ``inputs_embeds`` stands
in for ids; keys and values are its whole state; moving positions by s rotates every key by s; the head applied to the
backbone's output gives the logits; gradients reach the input. What fails is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvopt.base.packing import by_layer, pack
from kvopt.base.quantization import no_gradient
from kvopt.base.rope import Pairing, Rope, find_rotary, shift_angles, turn
from kvopt.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED_LAYERS = ("full_attention", "sliding_attention")
UNBOUNDED = 2**31 - 1  # positions of a configuration that names no longest one
PREFIX, LENGTH, SHIFT = 3, 5, 37
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE = 0.1  # bf16 and fp16: rounding stays near 0.02, a wrong path is near 1


@dataclass(frozen=True)
class Geometry:
    """Sizes of a base; ``window`` is the context window and ``sliding_window`` that of its sliding layers, in
    tokens."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    window: int
    sliding_window: int | None
    layer_types: tuple[str, ...]


@dataclass(frozen=True)
class Capability:
    """What :func:`probe` found: sizes, the head's scale and softcap, how keys rotate, and whether rows may be packed.

    packs: it follows a mask of any form. added: its attention adds masks to the logits, and does not select by them.
    flex: FlexAttention passed its check on this device. no_gradient: why no gradient comes through a quantized base
    (None where it does).
    """

    geometry: Geometry
    scale: float
    softcap: float | None
    rope: Rope
    packs: bool = False
    no_gradient: str | None = None
    added: bool = False
    flex: bool = False

    def mask(self, allowed: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask in the form that the model's attention takes, from booleans."""
        if not self.added:
            return allowed
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def refuse(name: str, reason: str) -> InputError:
    """The error for a base that kvopt cannot run."""
    return InputError(f"not supported: {reason}", where=f"model.base {name}", fix="use a causal decoder with RoPE")


def text_config(config: Any) -> Any:
    """The text part of a configuration (itself unless the model is multimodal)."""
    return config.get_text_config(decoder=True)


def check_config(config: Any, name: str) -> None:
    """Refuse by name what the configuration alone rules out. Raises InputError."""
    text = text_config(config)
    if getattr(config, "is_encoder_decoder", False):
        raise refuse(name, f"{config.model_type} is an encoder-decoder model")
    types = set(layer_types(text))
    for field in ("layers_block_type", "block_types"):
        types.update(kind for kind in getattr(text, field, None) or () if kind not in ("attention", "full_attention"))
    if foreign := sorted(types - set(SUPPORTED_LAYERS)):
        raise refuse(
            name, f"{config.model_type} has {', '.join(foreign)} layers, whose state is not only keys and values"
        )
    if not _has_rope(text):
        raise refuse(name, f"the positions of {config.model_type} are not rotary (RoPE), so a prefix cannot be moved")
    if getattr(text, "num_kv_shared_layers", 0):
        raise refuse(name, f"{config.model_type} shares keys and values between layers")
    if getattr(text, "hidden_size_per_layer_input", 0):
        raise refuse(name, f"{config.model_type} has per-layer embeddings, which a soft prompt cannot give")


def _has_rope(text: Any) -> bool:
    """Whether a configuration says how positions rotate; ALiBi, learned and sinusoidal positions have nothing to say
    there.
    """
    attention = getattr(text, "attn_config", None)
    if getattr(text, "alibi", False) or getattr(attention, "alibi", False):
        return False
    return any(getattr(text, field, None) for field in ("rope_parameters", "rope_theta", "rope_scaling"))


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """The list of a transformers model's decoder layers, None where it has none."""
    count = text_config(model.config).num_hidden_layers
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), None)


def layer_types(text: Any) -> tuple[str, ...]:
    """The attention kind of each layer; configurations that do not list them have one kind, sliding when they set a
    window."""
    listed = getattr(text, "layer_types", None)
    if listed:
        return tuple(listed)
    sliding = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    return ("sliding_attention" if sliding else "full_attention",) * text.num_hidden_layers


def context_window(text: Any) -> int:
    """Positions for which RoPE stays one fixed rotation: the trained length, or the original one where longer inputs
    change the angles. One that says no length has no end."""
    window = int(getattr(text, "max_position_embeddings", None) or UNBOUNDED)
    rope = getattr(text, "rope_parameters", None) or {}
    variants = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    for variant in variants:
        if variant.get("rope_type") == "longrope":
            window = min(window, int(variant.get("original_max_position_embeddings") or window))
    return window


class _Probe:
    """A model with a few token ids, and its outputs on them."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], name: str):
        self.model, self.name = model, name
        self.backbone: nn.Module = model.get_decoder()
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.get_input_embeddings().weight.dtype
        self.ids = torch.tensor([list(ids[:LENGTH])], device=self.device)
        self.tolerance = TOLERANCE.get(self.dtype, COARSE)

    def run(self, cache: Any = None, start: int = 0, **inputs: Tensor) -> Tensor:
        """Last hidden state [1, n, H] of ids or embeddings at positions from ``start``."""
        n = next(iter(inputs.values())).shape[1]
        positions = torch.arange(start, start + n, device=self.device)[None]
        past = {"past_key_values": cache, "use_cache": True} if cache is not None else {"use_cache": False}
        return self.backbone(**inputs, position_ids=positions, **past).last_hidden_state

    def differs(self, ours: Tensor, theirs: Tensor) -> bool:
        return _relative(ours, theirs) > self.tolerance or not bool(torch.isfinite(ours).all())


def _relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def probe(model: PreTrainedModel, ids: Sequence[int], name: str) -> Capability:
    """Run ``model`` on at least five ordinary token ``ids`` and say what it can do. Raises InputError with the reason
    it cannot be used.

    About nine forward passes of five tokens and one backward pass.
    """
    at = _Probe(model, ids, name)
    with torch.no_grad():
        try:
            cache = DynamicCache()
            full = at.run(cache, input_ids=at.ids)
        except Exception as error:  # foreign architectures fail in their own ways; the reason is kept
            raise refuse(name, f"a plain forward pass fails: {_one_line(error)}") from error
        keys = _read_keys(at, cache)
        _check_causal(at, full)
        _check_state(at, full)
        rope = _check_rope(at, keys)
        scale, softcap = _check_head(at, full)
    reason = no_gradient(model)
    _check_embeddings(at, full, backward=reason is None)
    text = text_config(model.config)
    types = layer_types(text)
    geometry = Geometry(
        layers=len(keys),
        kv_heads=keys[0].shape[1],
        head_dim=keys[0].shape[3],
        hidden_size=full.shape[-1],
        vocab_size=model.get_output_embeddings().weight.shape[0],
        window=context_window(text),
        sliding_window=text.sliding_window if "sliding_attention" in types else None,
        layer_types=types,
    )
    added = model.config._attn_implementation == "eager"
    found = Capability(geometry, scale, softcap, rope, no_gradient=reason, added=added)
    return replace(found, packs=_packs(at, full, found))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _read_keys(at: _Probe, cache: Any) -> list[Tensor]:
    expected = text_config(at.model.config).num_hidden_layers
    keys = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
    values = [layer.values for layer in cache.layers if getattr(layer, "values", None) is not None]
    if len(keys) != expected or len(values) != expected:
        raise refuse(at.name, f"{len(keys)} of its {expected} layers keep keys and values")
    if len({tensor.shape for tensor in keys}) > 1:
        raise refuse(at.name, "its layers have different key shapes")
    if keys[0].shape != values[0].shape or keys[0].shape[2] != LENGTH:
        raise refuse(at.name, f"keys {tuple(keys[0].shape)} and values {tuple(values[0].shape)} differ in shape")
    return keys


def _check_causal(at: _Probe, full: Tensor) -> None:
    if at.differs(at.run(input_ids=at.ids[:, :PREFIX]), full[:, :PREFIX]):
        raise refuse(at.name, "it is not causal (later tokens change earlier outputs)")


def _check_state(at: _Probe, full: Tensor) -> None:
    prefix = DynamicCache()
    at.run(prefix, input_ids=at.ids[:, :PREFIX])
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in prefix.layers])
    if at.differs(at.run(rebuilt, PREFIX, input_ids=at.ids[:, PREFIX:]), full[:, PREFIX:]):
        raise refuse(at.name, "its state is more than keys and values (recurrent or convolution layers)")


def _check_rope(at: _Probe, keys: list[Tensor]) -> Rope:
    rotary = find_rotary(at.backbone)
    if rotary is None:
        raise refuse(at.name, "its positions are not rotary (RoPE), so a prefix cannot be moved")
    text = text_config(at.model.config)
    shift = min(SHIFT, context_window(text) - LENGTH)
    moved = DynamicCache()
    at.run(moved, shift, input_ids=at.ids)
    pairings: list[Pairing] = []
    for index, kind in enumerate(layer_types(text)):
        try:
            cos, sin = shift_angles(rotary, shift, kind, at.device)
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            raise refuse(at.name, f"its rotary embedding cannot be read: {_one_line(error)}") from error
        candidates: tuple[Pairing, ...] = ("half", "interleaved", "none")
        errors = {how: _relative(turn(keys[index], cos, sin, how), moved.layers[index].keys) for how in candidates}
        best = min(candidates, key=lambda how: errors[how])
        if errors[best] > at.tolerance:
            raise refuse(
                at.name, f"the keys of layer {index} do not move by one rotation (relative error {errors[best]:.2g})"
            )
        pairings.append(best)
    return Rope(rotary, layer_types(text), tuple(pairings))


def _check_head(at: _Probe, full: Tensor) -> tuple[float, float | None]:
    head = at.model.get_output_embeddings()
    if (
        not isinstance(head, nn.Module)
        or not getattr(head, "weight", torch.zeros(1, dtype=torch.int)).is_floating_point()
    ):
        raise refuse(at.name, "its output head is not a plain floating-point matrix")
    theirs = at.model(input_ids=at.ids, use_cache=False).logits.float()
    text = text_config(at.model.config)
    softcap = getattr(text, "final_logit_softcapping", None)
    bias = getattr(head, "bias", None)
    plain = nn.functional.linear(full, head.weight.to(full.dtype), bias).float()
    for scale in _scales(text):
        ours = plain * scale
        ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
        if not at.differs(ours, theirs):
            return scale, softcap
    raise refuse(at.name, "its logits are not its head applied to the last hidden state")


def _scales(text: Any) -> list[float]:
    """Factors on the logits that configurations name; which one holds is found by trying."""
    factors = [1.0]
    for field in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        factor = getattr(text, field, None)
        if isinstance(factor, (int, float)) and factor > 0:
            factors += [float(factor), 1.0 / float(factor)]
    return factors


@torch.no_grad()
def _packs(at: _Probe, full: Tensor, found: Capability) -> bool:
    """Whether two rows in one line, with a mask of their own, give what each gives alone.

    Only "sdpa" and "eager" are asked, whose masks may have any form.
    """
    if at.model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    two = pack([LENGTH, PREFIX], 0)
    assert two is not None
    ids = torch.cat([at.ids, at.ids])
    geometry = found.geometry

    def make(window: int | None) -> Tensor:
        return found.mask(two.mask(0, window).to(at.device), at.dtype)

    try:
        hidden = at.backbone(
            input_ids=two.packed(ids),
            attention_mask=by_layer(geometry.layer_types, geometry.sliding_window, make),
            position_ids=two.positions(0).to(at.device),
            use_cache=False,
        ).last_hidden_state
    except Exception:  # a foreign architecture may take only the masks that it knows; it is padded then
        return False
    return not any(
        at.differs(hidden[line, column : column + n], full[0, :n])
        for line, column, n in zip(two.line.tolist(), two.column.tolist(), (LENGTH, PREFIX), strict=True)
    )


def _check_embeddings(at: _Probe, full: Tensor, backward: bool) -> None:
    embeddings = at.model.get_input_embeddings()(at.ids).detach().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        try:
            hidden = at.run(inputs_embeds=embeddings)
            if backward:
                hidden.float().square().mean().backward()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise refuse(at.name, f"no gradient reaches its input: {_one_line(error)}") from error
    if at.differs(hidden, full):
        raise refuse(at.name, "input embeddings do not stand in for token ids (per-layer embeddings)")
    if backward and (embeddings.grad is None or not bool(torch.isfinite(embeddings.grad).all())):
        raise refuse(at.name, "no finite gradient reaches its input")
