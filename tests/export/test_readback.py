"""Every export, read by the tool that it is for, gives our logits and our greedy text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kvopt.base.generate import stop_ids
from kvopt.base.loading import Base
from kvopt.contexts import load_context, save_context
from kvopt.contexts.context import SoftContext
from kvopt.contexts.folder import TensorContext
from kvopt.contexts.moving import joined, moved
from kvopt.errors import InputError
from kvopt.export.writing import export
from tests.adapters import CONFIGS, trained
from tests.export.readers import (
    BODIES,
    NEW_TOKENS,
    Kind,
    assert_same_logits,
    batches_for,
    left_padded,
    module_of,
    our_logits,
    our_text,
    right_padded,
    saved,
    until_stop,
)
from tests.tasks import Task, make_task
from tests.tiny import MODELS, tiny_base


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tiny_base(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["kv", "soft"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def check_peft(base: Base, context: TensorContext, folder: Path) -> None:
    """PEFT, from the folder alone: logits behind right padding, greedy text behind left padding, in batches."""
    fresh = AutoModelForCausalLM.from_pretrained(base.model.config._name_or_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(fresh, str(folder)).eval()
    ids, mask = right_padded(BODIES)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
    assert_same_logits(
        [row[: len(b)] for row, b in zip(theirs, BODIES, strict=True)], our_logits(base, context, BODIES)
    )
    for bodies in batches_for(base, equal=context.kind == "soft"):
        assert peft_text(model, base, bodies) == our_text(base, context, bodies)


def peft_text(model: PeftModel, base: Base, bodies: list[list[int]]) -> list[list[int]]:
    """PEFT's own greedy generation of one batch, padded on the left."""
    ids, mask = left_padded(bodies)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
        eos_token_id=sorted(stop_ids(base)),
    )  # fmt: skip
    return until_stop(base, out[:, ids.shape[1] :])


def check_hf_cache(base: Base, context: TensorContext, folder: Path) -> None:
    script = module_of(folder / "generate.py")
    model = AutoModelForCausalLM.from_pretrained(base.model.config._name_or_path, dtype=torch.float32).eval()
    prefix = script.load_prefix()
    assert_same_logits(script.logits(model, prefix, BODIES), our_logits(base, context, BODIES))
    for size in (1, 4):
        answers = script.generate(
            model, prefix, BODIES, batch_size=size, max_new_tokens=NEW_TOKENS, eos_token_id=sorted(stop_ids(base))
        )
        assert answers == our_text(base, context, BODIES)


def check_prompt_embeds(base: Base, context: TensorContext, folder: Path) -> None:
    """What a server would be sent, decoded as it decodes it, run by plain transformers."""
    script = module_of(folder / "prompt_embeds.py")
    model = AutoModelForCausalLM.from_pretrained(base.model.config._name_or_path, dtype=torch.float32).eval()
    soft, embed = script.load_soft_prompt(), model.get_input_embeddings()
    assert torch.equal(script.decode((folder / "soft_prompt.b64").read_text()), soft)
    requests = [script.request("m", script.whole_prompt(soft, embed, body), max_tokens=9) for body in BODIES]
    whole = [script.decode(request["prompt_embeds"]) for request in requests]
    assert [tuple(t.shape) for t in whole] == [(context.tokens + len(b), base.geometry.hidden_size) for b in BODIES]
    with torch.no_grad():
        theirs = [model(inputs_embeds=t[None]).logits[0, context.tokens :] for t in whole]
    assert_same_logits(theirs, our_logits(base, context, BODIES))
    for bodies in batches_for(base):
        chosen = [script.whole_prompt(soft, embed, body) for body in bodies]
        width = max(map(len, chosen))
        inputs = torch.stack([torch.nn.functional.pad(t, (0, 0, width - len(t), 0)) for t in chosen])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in chosen])
        out = model.generate(
            inputs_embeds=inputs, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
            eos_token_id=sorted(stop_ids(base)),
        )  # fmt: skip
        assert until_stop(base, out) == our_text(base, context, bodies)


def test_peft_reads_every_kind_as_we_do(task: Task, kind: Kind, tmp_path: Path) -> None:
    context = saved(task, kind, tmp_path / "c")
    export(tmp_path / "c", "peft", tmp_path / "out")
    check_peft(task.base, context, tmp_path / "out")


def test_peft_counts_padding_as_positions_under_prompt_tuning_as_the_card_says(tmp_path: Path) -> None:
    """PEFT drops position ids for PROMPT_TUNING: should it ever stop doing so, the note in the card can go."""
    task = make_task(tiny_base("llama"), tmp_path / "task")
    context = saved(task, "soft", tmp_path / "c")
    export(tmp_path / "c", "peft", tmp_path / "out")
    fresh = AutoModelForCausalLM.from_pretrained(task.base.model.config._name_or_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(fresh, str(tmp_path / "out")).eval()
    assert peft_text(model, task.base, BODIES) != our_text(task.base, context, BODIES)
    assert "equal length" in (tmp_path / "out" / "README.md").read_text()


def test_prefix_tuning_for_older_peft_is_the_same_cache(task: Task, tmp_path: Path) -> None:
    context = saved(task, "kv", tmp_path / "c")
    result = export(tmp_path / "c", "peft", tmp_path / "out", options={"peft_type": "PREFIX_TUNING"})
    assert result["peft_type"] == "PREFIX_TUNING"
    check_peft(task.base, context, tmp_path / "out")


def test_prefixes_longer_than_a_sliding_window_are_read_as_we_do(tmp_path: Path) -> None:
    task = make_task(tiny_base("gemma3"), tmp_path / "task")
    context = saved(task, "kv", tmp_path / "c", tokens=20)
    export(tmp_path / "c", "peft", tmp_path / "peft")
    check_peft(task.base, context, tmp_path / "peft")
    export(tmp_path / "c", "hf-cache", tmp_path / "cache")
    check_hf_cache(task.base, context, tmp_path / "cache")


def test_the_cache_script_answers_as_we_do(task: Task, kind: Kind, tmp_path: Path) -> None:
    context = saved(task, kind, tmp_path / "c")
    export(tmp_path / "c", "hf-cache", tmp_path / "out")
    check_hf_cache(task.base, context, tmp_path / "out")


def test_the_cache_script_does_not_import_kvopt(task: Task, tmp_path: Path) -> None:
    saved(task, "kv", tmp_path / "c")
    export(tmp_path / "c", "hf-cache", tmp_path / "out")
    assert "import kvopt" not in (tmp_path / "out" / "generate.py").read_text()
    assert "from kvopt" not in (tmp_path / "out" / "generate.py").read_text()


def test_embedded_prompts_answer_as_we_do(task: Task, tmp_path: Path) -> None:
    context = saved(task, "soft", tmp_path / "c")
    export(tmp_path / "c", "prompt-embeds", tmp_path / "out")
    check_prompt_embeds(task.base, context, tmp_path / "out")


def test_a_soft_prompt_of_real_tokens_is_exported_as_their_text(task: Task, tmp_path: Path) -> None:
    """Also where the model scales its embeddings (Gemma): the slots are in the space after the scale."""
    ids = list(task.encoded.prefix[:6])
    context = SoftContext("words", task.base.embed(torch.tensor(ids)).float())
    rounded = SoftContext("rounded", context.embeddings.bfloat16().float())
    scale = getattr(task.base.model.get_input_embeddings(), "embed_scale", None)
    if scale is not None:
        assert float(scale) != 1
    for soft in (context, rounded):
        save_context(soft, tmp_path / soft.name, task.base)
        place = tmp_path / f"out-{soft.name}"
        export(tmp_path / soft.name, "text", place)
        assert json.loads((place / "ids.json").read_text()) == ids
        assert (place / "prompt.txt").read_text() == task.base.tokenizer.decode(ids)
    one_moved = context.embeddings.clone()
    one_moved[3] *= 1.1
    save_context(SoftContext("trained", one_moved), tmp_path / "trained", task.base)
    with pytest.raises(InputError, match="1 of 6 slots are not the embedding of a token"):
        export(tmp_path / "trained", "text", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_moved_context_is_exported_at_position_0(task: Task, tmp_path: Path) -> None:
    context = saved(task, "kv", tmp_path / "c")
    save_context(moved(context, 30, task.base), tmp_path / "moved", task.base, first=30)  # type: ignore[arg-type]
    export(tmp_path / "moved", "peft", tmp_path / "peft")
    check_peft(task.base, context, tmp_path / "peft")
    again = load_context(tmp_path / "peft", task.base)  # its record is of the tensor as it is now
    torch.testing.assert_close(again.states, context.states, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    export(tmp_path / "moved", "hf-cache", tmp_path / "cache")
    check_hf_cache(task.base, context, tmp_path / "cache")


def test_a_composed_context_is_read_as_we_do(task: Task, tmp_path: Path) -> None:
    first, second = saved(task, "kv", tmp_path / "a", 5), saved(task, "kv", tmp_path / "b", 7)
    pair = joined(first, second, task.base, "ab")
    save_context(pair, tmp_path / "ab", task.base)
    export(tmp_path / "ab", "peft", tmp_path / "out")
    check_peft(task.base, pair, tmp_path / "out")


@pytest.mark.parametrize("how", CONFIGS)
def test_adapters_of_others_are_exported_as_ours_are(how: str, tmp_path: Path) -> None:
    base = tiny_base("llama")
    trained("llama", CONFIGS[how](), tmp_path / "theirs")
    context = load_context(tmp_path / "theirs", base)
    export(tmp_path / "theirs", "peft", tmp_path / "peft")
    check_peft(base, context, tmp_path / "peft")
    export(tmp_path / "theirs", "hf-cache", tmp_path / "cache")
    check_hf_cache(base, context, tmp_path / "cache")
    assert "kvopt did not make this context" in (tmp_path / "cache" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kv", "soft"])
def test_smollm2_is_read_as_we_do(smollm2: Base, kind: Kind, tmp_path: Path) -> None:
    task = make_task(smollm2, tmp_path / "task", count=4)
    context = saved(task, kind, tmp_path / "c", tokens=12)
    export(tmp_path / "c", "peft", tmp_path / "peft")
    check_peft(smollm2, context, tmp_path / "peft")
    export(tmp_path / "c", "hf-cache", tmp_path / "cache")
    check_hf_cache(smollm2, context, tmp_path / "cache")
    if kind == "soft":
        export(tmp_path / "c", "prompt-embeds", tmp_path / "embeds")
        check_prompt_embeds(smollm2, context, tmp_path / "embeds")
