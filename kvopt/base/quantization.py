"""Bases with fewer bits a weight: ``model.quantization`` as transformers' own configuration of it, and whether
gradients come through what transformers made of it.

Which weights are packed is transformers' affair; the output head and the embeddings stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvopt.errors import InputError
from kvopt.storage.files import canonical_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT_NAMES: dict[str, dict[str, Any]] = {
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}
"""What ``quantization: nf4`` (QLoRA, arXiv 2305.14314) and ``int8`` (LLM.int8(), arXiv 2208.07339) stand for."""
EXACT_ENOUGH = 0.1
"""Relative error of a gradient, above which a method is not taken to give one: 8-bit activations stay near 0.02."""


def settings_of(quantization: str | Mapping[str, Any]) -> dict[str, Any]:
    """``model.quantization`` in transformers' own words."""
    return dict(SHORT_NAMES[quantization] if isinstance(quantization, str) else quantization)


def identity_of(quantization: str | Mapping[str, Any]) -> str:
    """What the base's identity says of it: a short name and what it stands for are the same."""
    return canonical_json(settings_of(quantization))


def quantization_config(quantization: str | Mapping[str, Any], dtype: torch.dtype) -> Any:
    """transformers' configuration; bitsandbytes computes in ``dtype`` unless told otherwise. Raises InputError for a
    method or an option that transformers does not know.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    settings, where = settings_of(quantization), "model.quantization"
    if settings.get("load_in_4bit"):
        settings.setdefault("bnb_4bit_compute_dtype", str(dtype).removeprefix("torch."))
    unknown: list[str] = []
    try:
        if isinstance(settings.get("quant_type"), str) and settings["quant_method"] == "torchao":
            settings["quant_type"] = _torchao_type(settings["quant_type"])
        config = AutoQuantizationConfig.from_dict(settings)
        unknown = [name for name in settings if not hasattr(config, name)]
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise InputError(f"transformers takes no such method: {_one_line(error)}", where=where) from error
    if unknown:
        raise InputError(
            f"{type(config).__name__} has no {', '.join(unknown)}", where=where, fix="see transformers' documentation"
        )
    return config


def _torchao_type(name: str) -> dict[str, Any]:
    """A configuration of torchao with its defaults, such as ``Int8WeightOnlyConfig``, as transformers reads it."""
    from torchao import quantization
    from torchao.core.config import AOBaseConfig, config_to_dict

    kind = getattr(quantization, name, None)
    if not (isinstance(kind, type) and issubclass(kind, AOBaseConfig)):
        raise ValueError(f"torchao.quantization has no configuration {name}")
    return {"default": config_to_dict(kind())}


def method_of(model: PreTrainedModel) -> str | None:
    """The name of the method that a model was quantized with, None for plain weights."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights, at the first pass without gradients on a CPU, for a kernel that has
    no backward.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def no_gradient(model: PreTrainedModel) -> str | None:
    """Why no gradients come through a quantized model, None where they do (as through any other model).

    What a layer's outputs hide cannot be seen from the model's: past a layer without a gradient the residual stream
    still gives one, which is finite and wrong. So one layer of each kind is asked: for a linear map y = W x, the
    gradient of ½ |y|² along x is |y|².
    """
    method = method_of(model)
    if method is None:
        return None
    if not model.hf_quantizer.is_trainable:
        return f"transformers does not train through {method}"
    for name, layer in _one_of_each(model):
        if (error := _gradient_error(layer, _dtype_of(model))) > EXACT_ENOUGH:
            return f"{method} gives no gradient by the input of {name} (relative error {error:.2g})"
    return None


def _one_of_each(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The first linear layer of each class and kind of weight, without the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    seen = set()
    for name, layer in model.named_modules():
        if layer is head or not (hasattr(layer, "in_features") and hasattr(layer, "out_features")):
            continue
        weight = getattr(layer, "weight", None)
        kind = type(layer), type(weight), type(getattr(weight, "data", None))
        if kind not in seen:
            seen.add(kind)
            yield name, layer


def _dtype_of(model: PreTrainedModel) -> torch.dtype:
    return model.get_input_embeddings().weight.dtype


def _gradient_error(layer: nn.Module, dtype: torch.dtype) -> float:
    """| ∂ ½|y|² / ∂x · x − |y|² | / |y|² of y = layer(x) − layer(0) at a fixed x; infinite without a gradient."""
    width, device = int(layer.in_features), _device_of(layer)  # type: ignore[arg-type]
    x = torch.linspace(-1.0, 1.0, width).cos().mul(torch.arange(width) % 7 - 3.0)[None].to(device, dtype)
    with torch.no_grad():
        offset: Tensor = layer(torch.zeros_like(x))
        y = (layer(x) - offset).float()
    with torch.enable_grad():
        leaf = x.clone().requires_grad_(True)
        out = layer(leaf)
        if not out.requires_grad:
            return float("inf")
        try:
            (gradient,) = torch.autograd.grad(out, leaf, grad_outputs=y.to(out.dtype), allow_unused=True)
        except (RuntimeError, NotImplementedError):
            return float("inf")
    size = y.square().sum()
    if gradient is None or not bool(torch.isfinite(gradient).all()) or not float(size):
        return float("inf")
    return float(((gradient.float() * x.float()).sum() - size).abs() / size)


def _device_of(layer: nn.Module) -> torch.device:
    tensors = [*layer.parameters(), *layer.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
