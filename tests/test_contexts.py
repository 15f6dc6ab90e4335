"""Learned contexts: where they start, how they are stored, and that PEFT reads them as we do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, prefill, prefix_cache, run_bodies
from kvopt.config.contexts import Init, known_starts
from kvopt.contexts import KVContext, SoftContext, load_context, save_context
from kvopt.documents.context_record import ContextFacts
from kvopt.errors import InputError
from kvopt.learning.start_task import StartTask, initial_tensor
from kvopt.measure.score import score_tokens
from kvopt.task.seam import make_batch
from tests.tasks import Task, make_task
from tests.tiny import MODELS, tiny_base


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tiny_base(request.param), tmp_path_factory.mktemp(request.param))


def initial(task: Task, init: str, tokens: int, kind: Literal["kv", "soft"] = "kv", seed: int = 0) -> Tensor:
    ids = task.encoded.prefix
    return initial_tensor(Init(init).start, StartTask(task.base, "c", kind, tokens, ids, task.encoded.rows, None, seed))


def as_context(kind: str, tensor: Tensor) -> KVContext | SoftContext:
    return KVContext("c", tensor) if kind == "kv" else SoftContext("c", tensor)


def kl(task: Task, kind: str, tensor: Tensor) -> float:
    return float(score_tokens(task.base, as_context(kind, tensor), task.encoded, task.reference).kl.mean())


@pytest.mark.parametrize("init", ["template", "strided", "matched", "random-text", "random"])
@pytest.mark.parametrize("kind", ["kv", "soft"])
def test_every_initialiser_gives_finite_slots_and_the_same_ones_again(task: Task, init: str, kind: str) -> None:
    if (kind, init) == ("soft", "matched"):
        with pytest.raises(InputError, match="keys and values"):
            initial(task, init, 5, "soft")
        return
    tensor = initial(task, init, 5, kind)  # type: ignore[arg-type]
    g = task.base.geometry
    assert tensor.shape == ((5, g.layers, 2, g.kv_heads, g.head_dim) if kind == "kv" else (5, g.hidden_size))
    assert tensor.dtype == torch.float32
    assert tensor.isfinite().all()
    assert torch.equal(tensor, initial(task, init, 5, kind))  # type: ignore[arg-type]
    if init.startswith("random"):
        assert not torch.equal(tensor, initial(task, init, 5, kind, seed=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("init", ["template", "strided", "matched"])
def test_as_many_slots_as_the_template_has_tokens_are_the_template_itself(task: Task, init: str) -> None:
    assert abs(kl(task, "kv", initial(task, init, len(task.encoded.prefix)))) < 1e-6


def test_more_slots_than_the_text_has_tokens_is_refused(task: Task) -> None:
    with pytest.raises(InputError, match=r"contexts\.c\.tokens: .* slots wanted"):
        initial(task, "template", len(task.encoded.prefix) + 1)


def test_strided_keys_keep_their_distance_to_the_bodies(task: Task) -> None:
    """Dropping slots from a prefix by hand, with positions left as they were, gives the same hidden states."""
    length, tokens = len(task.encoded.prefix), 6
    with torch.no_grad():
        full = prefill(task.base, ids=torch.tensor(task.encoded.prefix))
    keep = torch.linspace(0, length - 1, tokens).round().long()
    dropped = Prefix(tuple(k[:, keep] for k in full.keys), tuple(v[:, keep] for v in full.values))
    row = make_batch(task.encoded.rows, [0])
    width = row.ids.shape[1]
    with torch.no_grad():
        moved = run_bodies(task.base, Prefix.unstack(initial(task, "strided", tokens), torch.float32), row)
        stayed = task.base.backbone(
            input_ids=row.ids,
            attention_mask=torch.ones(1, tokens + width, dtype=torch.long),
            position_ids=torch.arange(length, length + width)[None],
            past_key_values=prefix_cache(dropped),
            use_cache=False,
        ).last_hidden_state
    torch.testing.assert_close(moved, stayed, rtol=1e-4, atol=1e-5)


def test_matching_attention_reproduces_it_better_than_dropping_slots(llama: Base, tmp_path: Path) -> None:
    task = make_task(llama, tmp_path)
    matched = kl(task, "kv", initial(task, "matched", 12))
    assert matched < kl(task, "kv", initial(task, "strided", 12))
    assert matched < kl(task, "kv", initial(task, "template", 12))


def test_slot_0_is_the_texts_first_token_under_matching(task: Task) -> None:
    tensor = initial(task, "matched", 4)
    shifted = initial(task, "strided", 4)
    torch.testing.assert_close(tensor[0, :, 0], shifted[0, :, 0])


@pytest.mark.parametrize("kind", ["kv", "soft"])
def test_peft_gives_the_logits_and_the_greedy_text_of_our_own_path(task: Task, kind: str, tmp_path: Path) -> None:
    base = task.base
    tensor = initial(task, "strided", 6, kind)  # type: ignore[arg-type]
    tensor = tensor + 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    context = as_context(kind, tensor)
    save_context(context, tmp_path / "c", base, frozen=1)
    batch = make_batch(task.encoded.rows, [0, 1, 2])
    with torch.no_grad():
        ours = base.model.lm_head(run_bodies(base, context.prefix(base), batch))
    model = PeftModel.from_pretrained(base.model, str(tmp_path / "c")).eval()
    with torch.no_grad():
        theirs = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits[:, -batch.ids.shape[1] :]
    torch.testing.assert_close(ours[batch.mask], theirs[batch.mask], rtol=1e-4, atol=1e-4)
    body = torch.tensor([task.encoded.rows[0].body])
    answer = model.generate(
        input_ids=body, attention_mask=torch.ones_like(body), max_new_tokens=8, do_sample=False, pad_token_id=0
    )[0, body.shape[1] :]
    ids = list(task.encoded.rows[0].body)
    stop = base.model.generation_config.eos_token_id
    greedy: list[int] = []
    while len(greedy) < len(answer):
        row = torch.tensor([[*ids, *greedy]])
        with torch.no_grad():
            hidden = base.backbone(
                input_ids=row,
                attention_mask=torch.ones(1, 6 + row.shape[1], dtype=torch.long),
                past_key_values=prefix_cache(context.prefix(base)),
                use_cache=False,
            ).last_hidden_state[0, -1]
        greedy.append(int(base.model.lm_head(hidden).argmax()))
        if greedy[-1] == stop:
            break
    assert greedy == answer.tolist()[: len(greedy)]
    assert greedy


@pytest.mark.parametrize("kind", ["kv", "soft"])
def test_a_folder_is_read_back_as_it_was_written(task: Task, kind: str, tmp_path: Path) -> None:
    context = as_context(kind, initial(task, "template", 5, kind))  # type: ignore[arg-type]
    save_context(context, tmp_path / "c", task.base, frozen=1, record=ContextFacts(best_step=3))
    again = load_context(tmp_path / "c", task.base)
    assert again.sha256() == context.sha256()
    assert again.name == "c"
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    g = task.base.geometry
    assert config["peft_type"] == ("CARTRIDGE" if kind == "kv" else "PROMPT_TUNING")
    assert config["num_virtual_tokens"] == 5
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    if kind == "kv":
        assert config["num_frozen_tokens"] == 1
        assert config["token_dim"] == g.kv_heads * g.head_dim
        stored = load_file(tmp_path / "c" / "adapter_model.safetensors")["prompt_embeddings"]
        assert stored.shape == (5, g.layers * 2 * g.kv_heads * g.head_dim)
        assert torch.equal(stored[2, : g.head_dim], context.states[2, 0, 0, 0])  # type: ignore[union-attr]
        assert torch.equal(stored[2, -g.head_dim :], context.states[2, -1, 1, -1])  # type: ignore[union-attr]


@pytest.fixture
def folder(llama: Base, tmp_path: Path) -> Path:
    task = make_task(llama, tmp_path / "reference")
    save_context(as_context("kv", initial(task, "template", 5)), tmp_path / "c", llama)
    return tmp_path / "c"


def _rewrite(folder: Path, change: object) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({"prompt_embeddings": change(load_file(path)["prompt_embeddings"])}, path)  # type: ignore[operator]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _poison(tensor: Tensor) -> Tensor:
    tensor[1, 3] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _rewrite(f, _poison), "not finite"),
        (lambda f: _rewrite(f, lambda t: t[:, :-1].contiguous()), "has shape"),
        (lambda f: _rewrite(f, lambda t: t[:-1].contiguous()), "has shape"),
        (lambda f: _rewrite(f, lambda t: t.bfloat16()), "bfloat16"),
        (lambda f: _rewrite(f, lambda t: t.int()), "int32"),
        (lambda f: _rewrite(f, lambda t: t + 1), "not the one that kvopt.json describes"),
        (lambda f: _truncate(f / "adapter_model.safetensors"), "truncated"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model"),
        (lambda f: (f / "adapter_config.json").unlink(), "is not a context folder"),
        (lambda f: (f / "kvopt.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: shutil.rmtree(f), "is not a context folder"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, llama: Base, damage: object, message: str) -> None:
    damage(folder)  # type: ignore[operator]
    with pytest.raises(InputError, match=message) as caught:
        load_context(folder, llama)
    assert "\n" not in str(caught.value)


def test_a_context_of_another_base_is_refused_even_when_the_shapes_fit(folder: Path, llama: Base) -> None:
    other = replace(llama, identity={**llama.identity, "weights": "0" * 64})
    with pytest.raises(InputError, match="in its weights"):
        load_context(folder, other)


def test_values_that_are_not_finite_are_never_written(llama: Base, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        save_context(SoftContext("c", torch.full((2, llama.geometry.hidden_size), torch.inf)), tmp_path / "c", llama)
    assert not (tmp_path / "c").exists()


def test_a_foreign_peft_adapter_without_our_record_can_be_read(folder: Path, llama: Base) -> None:
    (folder / "kvopt.json").unlink()
    assert load_context(folder, llama).tokens == 5


def test_every_initialiser_of_the_table_is_named_in_the_config_help() -> None:
    from kvopt.config.contexts import ContextConfig

    text = ContextConfig.model_fields["init"].description or ""
    assert all(name in text for name in known_starts())
