"""``model.quantization``: what transformers is handed, what the identity says, and methods without gradients by name.

The methods' libraries are not among kvopt's own: layers that behave as theirs do stand in for them here, and
tests/gpu/test_quantized.py runs the real ones where they are installed.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from kvopt.base.identity import check_base
from kvopt.base.loading import Base, load_base
from kvopt.base.probe import probe
from kvopt.base.quantization import identity_of, no_gradient, quantization_config
from kvopt.config.contexts import ContextConfig
from kvopt.config.document import build_config
from kvopt.config.model import ModelConfig
from kvopt.config.students import StudentConfig
from kvopt.documents.part import BaseIdentity, StandsOn
from kvopt.errors import InputError
from kvopt.learning.descent import optimize
from kvopt.train.trainer import make_student
from tests.tiny import save_tiny, tiny_folder

IDS = [11, 12, 13, 14, 15]


class _Rounded(nn.Linear):
    """Weights of 8 bits, as exact in its gradient as QLoRA's."""

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight.abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear(input, (self.weight / scale).round() * scale, self.bias)


class _Detached(_Rounded):
    """A kernel without a backward: the residual stream around it still has a gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).detach()


class _StraightThrough(_Rounded):
    """A backward that takes another matrix than the forward."""

    def forward(self, input: Tensor) -> Tensor:
        wrong = nn.functional.linear(input, self.weight.flip(0))
        return wrong + (super().forward(input) - wrong).detach()


def _quantized(base: Base, kind: type[nn.Linear], trainable: bool = True) -> Base:
    """The base with layers of a kind in place of its linear ones, as a quantizer leaves it."""
    model = copy.deepcopy(base.model)
    for layer in model.model.layers:
        for child in (layer.self_attn, layer.mlp):
            for linear in child.children():
                if isinstance(linear, nn.Linear):
                    linear.__class__ = kind
    settings = SimpleNamespace(quant_method=SimpleNamespace(value="packed"))
    model.hf_quantizer = SimpleNamespace(quantization_config=settings, is_trainable=trainable)
    return replace(base, model=model, capability=probe(model, IDS, base.name))


def test_a_method_with_a_true_gradient_is_taken(llama: Base) -> None:
    packed = _quantized(llama, _Rounded)
    assert packed.quantized_by == "packed"
    assert packed.capability.no_gradient is None
    packed.check_gradients("contexts.kv.steps")
    assert no_gradient(llama.model) is None


@pytest.mark.parametrize(
    ("kind", "trainable", "reason"),
    [
        (_Detached, True, "packed gives no gradient by the input of model.layers.0.self_attn.q_proj"),
        (_StraightThrough, True, "packed gives no gradient by the input of model.layers.0.self_attn.q_proj"),
        (_Rounded, False, "transformers does not train through packed"),
    ],
)
def test_a_method_without_one_can_be_scored_but_not_learned_through(
    llama: Base, kind: type[nn.Linear], trainable: bool, reason: str
) -> None:
    packed = _quantized(llama, kind, trainable)
    config = ContextConfig(name="kv", kind="kv", tokens=2, steps=3)
    with pytest.raises(InputError, match=f"contexts.kv.steps: needs gradients through the base .*{reason}"):
        optimize(packed, torch.zeros(1), config, [], [], None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"students.s: needs gradients .*{reason}"):
        make_student(packed, StudentConfig.model_validate({"name": "s", "contexts": ["original"]}), 0)


def test_all_weights_of_a_quantized_base_are_not_trained(llama: Base) -> None:
    config = StudentConfig.model_validate({"name": "s", "method": "full", "contexts": ["original"]})
    with pytest.raises(InputError, match=r"students\.s\.method: .*quantized \(packed\) \(use method: lora"):
        make_student(_quantized(llama, _Rounded), config, 0)


def test_what_is_handed_over_is_transformers_own_configuration() -> None:
    config = quantization_config("nf4", torch.float32)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.float32
    assert quantization_config("int8", torch.bfloat16).load_in_8bit
    assert quantization_config({"quant_method": "quanto", "weights": "int4"}, torch.bfloat16).weights == "int4"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "nope"}, "transformers takes no such method: .*nope"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "bits": 3}, "BitsAndBytesConfig has no bits"),
        ({"quant_method": "quanto", "weights": "int3"}, "transformers takes no such method: .*int3"),
    ],
)
def test_methods_and_options_that_there_are_none_of_are_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"model.quantization: {message}") as error:
        load_base(ModelConfig(base=str(tiny_folder("llama")), device="cpu", quantization=settings))
    assert "\n" not in str(error.value)


def test_a_method_that_is_not_installed_is_one_line_with_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_quanto.is_optimum_quanto_available", lambda: False)
    own = {"quant_method": "quanto", "weights": "int4"}
    with pytest.raises(InputError, match=r"quantised with quanto.*optimum-quanto"):
        load_base(ModelConfig(base=str(tiny_folder("llama")), device="cpu", quantization=own))


def test_a_mapping_names_its_method() -> None:
    tree = {"name": "x", "template": {"text": "a {{b}}"}, "data": {"train": "t"}}
    with pytest.raises(InputError, match="quant_method"):
        build_config(tree | {"model": {"quantization": {"bits": 4}}}, "c.yaml")


def test_a_base_that_is_stored_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "packed", "llama", "chatml")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"stored quantized already \(quantised with gptq\)"):
        load_base(ModelConfig(base=str(folder), device="cpu", quantization="nf4"))


def test_the_identity_includes_it(tmp_path: Path) -> None:
    plain = {"weights": "w", "config": "c", "tokenizer": "t", "chat_template": None, "source": None}
    packed = plain | {"quantization": identity_of("nf4")}
    same = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
    assert identity_of("nf4") == identity_of({"quant_method": "bitsandbytes"} | same)
    of_plain, of_packed = (BaseIdentity(name="b", **identity) for identity in (plain, packed))
    check_base(of_plain, "b", plain, tmp_path)
    check_base(of_packed, "b", packed, tmp_path)
    for recorded, here in ((of_plain, packed), (of_packed, plain)):
        with pytest.raises(InputError, match="differs from 'b' in its quantization"):
            check_base(recorded, "b", here, tmp_path)
    check_base(None, "b", packed, tmp_path)
    check_base(of_packed, "b", {"config": "c", "tokenizer": "t"}, tmp_path)  # what needs no weights
    assert StandsOn(base=of_plain).differs_from(StandsOn(base=of_packed)) == "another base"
    assert StandsOn(base=of_packed).differs_from(StandsOn(base=of_packed)) is None
