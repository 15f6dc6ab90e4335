"""Adapters that PEFT itself trained: read, scored, continued and compared; what is no context is refused by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from kvopt.base.loading import Base
from kvopt.config.document import load_config
from kvopt.contexts import load_context
from kvopt.contexts.adapter import read_tensor
from kvopt.errors import InputError
from kvopt.export.inspection import describe, describe_text
from kvopt.run.run import Run
from kvopt.run.stages import learning_history
from tests.adapters import CONFIGS, SLOTS, trained
from tests.export.readers import BODIES, assert_same_logits, our_logits, right_padded
from tests.jobs import run_job, write_job
from tests.tiny import MODELS, tiny_base, tiny_folder


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_that_peft_trained_gives_us_pefts_logits(kind: str, how: str, tmp_path: Path) -> None:
    model, base = trained(kind, CONFIGS[how](), tmp_path), tiny_base(kind)
    context = load_context(tmp_path, base)
    assert (context.kind, context.tokens) == ("soft" if how == "prompt" else "kv", SLOTS)
    ids, mask = right_padded(BODIES)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
    theirs = [row[: len(body)] for row, body in zip(theirs, BODIES, strict=True)]
    assert_same_logits(theirs, our_logits(base, context, BODIES))


@pytest.mark.parametrize("how", CONFIGS)
def test_it_is_scored_beside_our_own_contexts_and_gone_on_with(how: str, tmp_path: Path) -> None:
    adapter = tmp_path / "their-adapter"
    trained("llama", CONFIGS[how](), adapter)
    kind = "soft" if how == "prompt" else "kv"
    config = write_job(
        tmp_path / "job",
        lambda tree: tree.update(
            contexts=[
                {"name": "theirs", "kind": kind, "init": f"context:{adapter}", "steps": 0},
                {"name": "more", "kind": kind, "init": f"context:{adapter}", "steps": 20, "batch_size": 4,
                 "eval_every": 5, "learning_rate": 0.02},
            ]
        ),
    )  # fmt: skip
    board = run_job(config, tmp_path / "run")
    settings, base_dir = load_config(config)
    said: list[str] = []
    with Run(settings, base_dir, tmp_path / "run", say=said.append, bars=False).opened() as run:
        (theirs,) = run.stored_contexts(str(adapter))
        (more,) = run.stored_contexts("more")
        kl = {c.name: run.score(c, "selection").kl_forward.mean for c in (theirs, more)}
        history = [point.to_json() for point in learning_history(more.name, run.at)]
        score = run.score(theirs).kl_forward.mean
    rows = {row["name"]: row["kl_forward"]["mean"] for row in board["contexts"]}
    assert rows["theirs"] == pytest.approx(score, rel=1e-6), "with steps: 0 it stands on the leaderboard as it is"
    assert [line for line in said if "cannot be checked" in line and str(tiny_folder("llama")) in line]
    assert history[0]["held_out_kl"] == pytest.approx(kl["their-adapter"], rel=1e-4), "it starts as their adapter"
    assert history[-1]["train_kl"] < history[1]["train_kl"], "and learns"
    assert kl["more"] <= kl["their-adapter"]


def test_it_is_described_as_one_whose_base_cannot_be_checked(tmp_path: Path) -> None:
    trained("llama", CONFIGS["prefix"](), tmp_path)
    facts = describe(tmp_path)
    assert facts["peft_type"] == "PREFIX_TUNING"
    assert facts["metrics"] is None
    assert "its base cannot be checked" in describe_text(facts)


@pytest.mark.parametrize("how", CONFIGS)
def test_16_bit_adapters_are_read_as_float32(how: str, tmp_path: Path) -> None:
    trained("llama", CONFIGS[how](), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(path)["prompt_embeddings"].bfloat16()}, path)
    context = load_context(tmp_path, tiny_base("llama"))
    assert context.sha256() == load_context(tmp_path, tiny_base("llama")).sha256()
    tensor = context.states if context.kind == "kv" else context.embeddings  # type: ignore[union-attr]
    assert tensor.dtype == torch.float32


# ---- what is refused


def refused(folder: Path, base: Base, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_context(folder, base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8),
         "prefix_projection"),
        (LoraConfig(task_type="CAUSAL_LM", r=2), "type LORA is not a context"),
        (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8), "type P_TUNING"),
    ],
)  # fmt: skip
def test_adapters_that_are_no_context_are_refused_by_name(config: Any, message: str, tmp_path: Path) -> None:
    trained("llama", config, tmp_path)
    refused(tmp_path, tiny_base("llama"), message)


def test_adapters_for_other_tasks_are_refused_by_name(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder("llama"), num_labels=2)
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(str(tmp_path))
    refused(tmp_path, tiny_base("llama"), "adapter for SEQ_CLS is not a context|instead of one tensor")


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_transformer_submodules": 2}, "encoder-decoder"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "SEQ_2_SEQ_LM"),
        ({"num_layers": 6, "num_attention_heads": 1}, "num_layers: 6"),
        ({"num_virtual_tokens": 4}, "has shape"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    trained("llama", CONFIGS["prefix"](), tmp_path)
    _edit(tmp_path, **changes)
    refused(tmp_path, tiny_base("llama"), message)


def test_an_adapter_of_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    trained("qwen3", CONFIGS["prefix"](), tmp_path)
    refused(tmp_path, tiny_base("llama"), "use the base that it was made for")


# ---- pickles


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A folder whose tensor lies in adapter_model.bin."""
    trained("llama", CONFIGS["prefix"](), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    return tmp_path


def test_a_bin_of_plain_tensors_is_read_without_running_code(pickled: Path) -> None:
    expected = torch.load(pickled / "adapter_model.bin", weights_only=True)["prompt_embeddings"]
    assert torch.equal(read_tensor(pickled), expected)
    assert load_context(pickled, tiny_base("llama")).tokens == SLOTS


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("bomb-went-off"),))


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_unopened(
    pickled: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pickled)
    path = pickled / "adapter_model.bin"
    if protocol == "torch":
        torch.save({"prompt_embeddings": _Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps({"prompt_embeddings": _Bomb()}))
    refused(pickled, tiny_base("llama"), "it is not opened|is damaged")
    assert not (pickled / "bomb-went-off").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 half a zip"])
def test_a_damaged_bin_is_refused_in_one_line(pickled: Path, content: bytes) -> None:
    (pickled / "adapter_model.bin").write_bytes(content)
    refused(pickled, tiny_base("llama"), "adapter_model.bin: is")


def test_a_bin_with_other_tensors_is_refused(pickled: Path) -> None:
    torch.save({"lora_A": torch.zeros(2)}, pickled / "adapter_model.bin")
    refused(pickled, tiny_base("llama"), "instead of one tensor")


def test_the_job_of_these_tests_is_what_the_config_says(tmp_path: Path) -> None:
    """The base of jobs is the base that the adapters were trained on."""
    config = yaml.safe_load(write_job(tmp_path).read_text())
    assert config["model"]["base"] == str(tiny_folder("llama"))
