"""What a base is: its own weights and no others, its own attention, its own positions; and what validate says of it."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as ggufs
import numpy as np
import pytest
import torch
from huggingface_hub.errors import IncompleteSnapshotError
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    LlamaConfig,
    MptConfig,
    PreTrainedModel,
)

from kvopt.base import gguf, hub, places
from kvopt.base.attention import gated, watched
from kvopt.base.identity import config_sha256
from kvopt.base.loading import Base, load_base, load_tokenizer
from kvopt.base.prefix import prefill, run_bodies
from kvopt.base.probe import check_config
from kvopt.base.rope import angles
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError
from kvopt.task.seam import Row, make_batch
from tests.gguf_file import write_gguf
from tests.jobs import run_job, write_job
from tests.tiny import SMALL, tiny_folder, tiny_model, tiny_tokenizer

Kvopt = Callable[..., tuple[int, str, str]]
IDS = [90, 91, 140, 200, 77, 30, 31, 33, 90, 12]


def made(folder: Path, config: Any) -> Path:
    """A random model of this configuration, with the ChatML tokenizer."""
    words = tiny_tokenizer("chatml")
    config.vocab_size = len(words)
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def loaded(folder: Path, **settings: Any) -> Base:
    return load_base(ModelConfig(base=str(folder), dtype="float32", device="cpu", **settings))


def gemma2(folder: Path) -> Path:
    softcaps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
    return made(folder, Gemma2Config(**SMALL, head_dim=8, sliding_window=256, **softcaps))


def gemma3(folder: Path) -> Path:
    """Gemma 3 with a softcap, which its own checkpoints do not have; transformers would take sdpa for it."""
    softcaps = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    return made(folder, Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=256, **softcaps))


def gpt_oss(folder: Path) -> Path:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    sizes = SMALL | {"intermediate_size": 48, "head_dim": 8, "sliding_window": 256}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return made(folder, GptOssConfig(**sizes, rope_parameters=rope, **experts))


# ---- files


def test_a_whole_model_beside_adapter_files_is_refused_by_run_and_validate(kvopt: Kvopt, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(tiny_folder("llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(folder)
    config = write_job(tmp_path / "job", lambda c: c["model"].update(base=str(folder)))
    for verb in ("validate", "run"):
        code, _, err = kvopt(verb, config)
        assert code == 2
        assert "adapter_config.json" in err
    for file in folder.glob("adapter_*"):
        file.unlink()
    assert loaded(folder).identity == loaded(tiny_folder("llama")).identity


def test_the_code_that_comes_with_a_model_is_part_of_its_identity(tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path, dirs_exist_ok=True)
    plain = config_sha256(tmp_path)
    (tmp_path / "modeling_own.py").write_text("x = 1")
    assert config_sha256(tmp_path) == plain, "code that nothing names is never run"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.Own"}}))
    first = config_sha256(tmp_path)
    (tmp_path / "modeling_own.py").write_text("x = 2")
    assert config_sha256(tmp_path) != first


# ---- GGUF


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def scaled() -> tuple[PreTrainedModel, np.ndarray]:
    """A Llama with scaled RoPE, and the divisors that a converter writes for it."""
    rope = LLAMA3 | {"original_max_position_embeddings": 64}
    model = tiny_model("llama", len(tiny_tokenizer("chatml")), rope_parameters=rope, num_hidden_layers=2)
    plain = tiny_model("llama", model.config.vocab_size, num_hidden_layers=2)
    divisors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert float(divisors.max()) > 2
    return model, divisors.numpy().astype(np.float32)


def test_a_gguf_file_with_scaled_rope_is_the_model_that_it_was_made_of(
    scaled: tuple[PreTrainedModel, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVOPT_CACHE", str(tmp_path / "cache"))
    model, divisors = scaled
    for parameter in model.parameters():  # as the conversion rounds them
        parameter.data = parameter.data.bfloat16().float()
    write_gguf(tmp_path / "scaled.gguf", model, {gguf.ROPE_FREQS: divisors})
    base = loaded(tmp_path / "scaled.gguf")
    ids = torch.tensor([IDS * 12])
    with torch.no_grad():
        ours, theirs = base.model(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert base.geometry.window == model.config.max_position_embeddings


def test_a_gguf_file_is_converted_tensor_by_tensor_to_what_save_pretrained_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", len(tiny_tokenizer("chatml")))
    write_gguf(tmp_path / "model.gguf", model, {})
    live = [0, 0]

    def dequantize(data: np.ndarray, kind: object) -> np.ndarray:
        whole = ggufs.quants.dequantize(data, kind)  # type: ignore[arg-type]
        live[0] += 1
        live[1] = max(live)
        weakref.finalize(whole, lambda: live.__setitem__(0, live[0] - 1))
        return whole

    monkeypatch.setattr(ggufs, "dequantize", dequantize)
    gguf.save_gguf_as_folder(tmp_path / "model.gguf", tmp_path / "folder", {"source": "here"})
    assert live[1] <= 2, "more than a tensor and the next one were in memory"
    model.bfloat16().save_pretrained(tmp_path / "expected")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("folder", "expected"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_gguf_file_that_lacks_a_tensor_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    deeper = tiny_model("llama", len(tiny_tokenizer("chatml")))
    state = deeper.state_dict()
    del state["model.layers.2.mlp.up_proj.weight"]
    cut: Any = SimpleNamespace(config=deeper.config, state_dict=lambda: state)
    write_gguf(tmp_path / "less.gguf", cut, {})
    with pytest.raises(InputError, match=r"less\.gguf: lacks 1 tensor, first model\.layers\.2\.mlp\.up_proj"):
        gguf.save_gguf_as_folder(tmp_path / "less.gguf", tmp_path / "folder", {})
    assert not (tmp_path / "folder").exists()


def test_a_gguf_tensor_that_is_not_used_is_refused_by_name(
    scaled: tuple[PreTrainedModel, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVOPT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "more.gguf", scaled[0], {"rope_factors_long.weight": np.ones(4, dtype=np.float32)})
    with pytest.raises(InputError, match=r"does not use 1 tensor of it, first rope_factors_long\.weight"):
        loaded(tmp_path / "more.gguf")


def test_a_converted_base_in_a_cache_that_cannot_be_written_is_used(
    scaled: tuple[PreTrainedModel, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVOPT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "model.gguf", scaled[0], {})

    def no_permission(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(30, "Read-only file system")

    with monkeypatch.context() as inner:
        inner.setattr(hub, "acquire_lock", no_permission)
        with pytest.raises(InputError, match="no permission to write"):
            places.locate(str(tmp_path / "model.gguf"), None, lambda line: None)
    folder = places.locate(str(tmp_path / "model.gguf"), None, lambda line: None)
    monkeypatch.setattr(hub, "acquire_lock", no_permission)
    assert places.locate(str(tmp_path / "model.gguf"), None, lambda line: None) == folder


# ---- positions


@pytest.mark.parametrize(
    "config",
    [BloomConfig(), MptConfig(), GPT2Config(), GPTJConfig(), FalconConfig(alibi=True)],
    ids=lambda c: c.model_type,
)
def test_bases_without_rotary_positions_are_refused_by_name_from_the_configuration(config: Any) -> None:
    with pytest.raises(InputError, match=f"the positions of {config.model_type} are not rotary"):
        check_config(config, "name")


def test_validate_refuses_them_as_run_does(kvopt: Kvopt, tmp_path: Path) -> None:
    folder = made(tmp_path / "bloom", BloomConfig(hidden_size=32, n_layer=2, n_head=4, pad_token_id=None))
    config = write_job(tmp_path / "job", lambda c: c["model"].update(base=str(folder)))
    said = []
    for verb in ("validate", "run"):
        code, _, err = kvopt(verb, config)
        assert code == 2
        said.append(err.splitlines()[-1])
    assert said[0] == said[1]
    assert "the positions of bloom are not rotary" in said[0]


def test_the_window_of_validate_is_that_of_run(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    folder = made(tmp_path, LlamaConfig(**SMALL, rope_parameters=rope))
    assert load_tokenizer(ModelConfig(base=str(folder)))[1] == loaded(folder).geometry.window == 64


def test_rotary_modules_that_give_each_angle_once_are_read_as_they_are(tmp_path: Path) -> None:
    base = loaded(gpt_oss(tmp_path))
    rotary, head = base.rope.module, base.geometry.head_dim
    for positions in ([0], [0, 1, 7]):
        cos, sin = angles(rotary, torch.tensor(positions), "full_attention")
        assert cos.shape == sin.shape == (len(positions), head // 2)
        frequencies = 10000.0 ** (-torch.arange(0, head, 2) / head)
        expected = torch.tensor(positions)[:, None] * frequencies
        torch.testing.assert_close(cos, expected.cos())
        torch.testing.assert_close(sin, expected.sin())


def test_at_position_0_alone_angles_have_their_width(llama: Base) -> None:
    cos, _ = angles(llama.rope.module, torch.tensor([0]), "full_attention")
    assert cos.shape == (1, llama.geometry.head_dim // 2)


# ---- attention


@pytest.mark.parametrize("make", [gemma2, gemma3, gpt_oss])
def test_a_base_with_softcap_or_sinks_runs_by_itself_and_answers_as_without_a_prefix(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    base = loaded(make(tmp_path))
    assert base.model.config._attn_implementation == "eager"
    row = Row("r", tuple(IDS[4:7]), tuple(IDS[7:]))
    batch = make_batch([row], [0])
    with torch.no_grad():
        ours = run_bodies(base, prefill(base, ids=torch.tensor(IDS[:4])), batch)
        plain = base.backbone(input_ids=torch.tensor([IDS[:-1]]), use_cache=False).last_hidden_state[:, 4:]
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [gemma2, gpt_oss])
def test_watched_and_gated_attention_is_the_bases_own(make: Callable[[Path], Path], tmp_path: Path) -> None:
    base = loaded(make(tmp_path))
    ids = torch.tensor([IDS])
    with torch.no_grad():
        plain = base.backbone(input_ids=ids, use_cache=False).last_hidden_state
        with watched(base, lambda *args: None):
            seen = base.backbone(input_ids=ids, use_cache=False).last_hidden_state
        with gated(base, torch.ones(4)):
            open_gates = base.backbone(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(seen, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(open_gates, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [gemma2, gemma3, gpt_oss])
def test_an_attention_that_the_base_cannot_do_is_one_line_with_the_mend_for_run_and_validate(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = make(tmp_path)
    for key in ("attn_implementation", "attention"):  # the second is how it was said before 0.3
        for attention in ("sdpa", "spda"):
            line = rf"model\.attn_implementation {attention}: .*set model\.attn_implementation: eager"
            with pytest.raises(InputError, match=line):
                loaded(folder, **{key: attention})
            with pytest.raises(InputError, match=line):
                load_tokenizer(ModelConfig.model_validate({"base": str(folder), key: attention}))
    load_tokenizer(ModelConfig(base=str(folder), attn_implementation="eager"))


def test_an_attention_that_the_base_can_do_passes_both(tmp_path: Path) -> None:
    folder = made(tmp_path, LlamaConfig(**SMALL))
    for attention in ("sdpa", "eager", "flex_attention"):
        load_tokenizer(ModelConfig(base=str(folder), attn_implementation=attention))
    assert loaded(folder, attn_implementation="sdpa").model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("make", [gemma2, gpt_oss])
def test_a_whole_job_runs_on_a_base_with_softcap_or_sinks(
    make: Callable[[Path], Path], kvopt: Kvopt, tmp_path: Path
) -> None:
    """Saved to a folder, under default settings."""
    folder = make(tmp_path / "base")
    config = write_job(tmp_path / "job", lambda c: c["model"].update(base=str(folder)))
    code, out, err = kvopt("validate", config)
    assert code == 0, err
    assert out.rstrip().endswith("OK")
    board = run_job(config, tmp_path / "run")
    scores = {row["name"]: row["kl_forward"]["mean"] for row in board["contexts"]}
    assert scores["original"] < 1e-9
    assert scores["kv-8"] < scores["none"]


def test_messages_of_transformers_are_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("because " * 100 + "of the end")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(InputError, match=r"of the end$"):
        loaded(tiny_folder("llama"))


# ---- the hub


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[bool]]:
    """A hub repository and its cache: ``snapshot_download`` as huggingface_hub does it, which remembers the listing of
    the whole repository. The list says of each call whether it went to the hub.
    """
    repository, cache, calls = tmp_path / "hub", tmp_path / "cache", list[bool]()
    shutil.copytree(tiny_folder("llama"), repository)
    (repository / "README.md").write_text("card")
    (repository / ".gitattributes").write_text("x")
    files = sorted(path.name for path in repository.iterdir())

    def snapshot_download(
        name: str, *, local_files_only: bool = False, allow_patterns: Any = None, ignore_patterns: Any = None, **_: Any
    ) -> str:
        wanted = list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        calls.append(not local_files_only)
        if local_files_only:
            if missing := [name for name in wanted if not (cache / name).exists()]:
                raise IncompleteSnapshotError(f"missing {missing}", snapshot_path=str(cache))
            return str(cache)
        cache.mkdir(exist_ok=True)
        for name in wanted:
            shutil.copy(repository / name, cache / name)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    return cache, calls


def test_validate_fetches_no_weights_and_what_is_cached_is_not_asked_for_again(
    served: tuple[Path, list[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, calls = served
    config = ModelConfig(base="acme/tiny", dtype="float32", device="cpu")
    load_tokenizer(config)
    assert calls.count(True) == 1
    assert not list(cache.glob("*.safetensors"))
    load_tokenizer(config)
    assert calls.count(True) == 1
    load_base(config)
    assert calls.count(True) == 2
    monkeypatch.setattr(hub, "unreachable", lambda: "the hub cannot be reached")
    load_base(config)
    load_tokenizer(config)
    assert calls.count(True) == 2
    assert sorted(path.name for path in cache.iterdir() if path.name in ("README.md", ".gitattributes")) == []
