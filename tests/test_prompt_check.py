"""What the base really sees of rows and outputs: production's ids, and a warning wherever they may not be meant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import AddedToken, processors
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast

from kvopt.errors import InputError
from kvopt.task.examples import Example
from kvopt.task.prompt_check import nothing_to_learn, prompt_warnings, start_ids
from kvopt.task.seam import Encoder
from kvopt.task.template import Template
from tests.jobs import run_job, write_job
from tests.tiny import save_tiny, tiny_tokenizer

Kvopt = Callable[..., tuple[int, str, str]]
CHAT = Template.from_messages([{"role": "user", "content": "Text: {{text}}"}])
EOS = "<|im_end|>"


def rows(*pairs: tuple[str, str]) -> list[Example]:
    return [Example(f"train:{i}", {"text": text}, out, f"train.jsonl:{i + 1}") for i, (text, out) in enumerate(pairs)]


def warnings(words: PreTrainedTokenizerFast, template: Template, examples: list[Example], **options: Any) -> list[str]:
    encoder = Encoder(words, **options)
    return list(prompt_warnings(encoder, template, examples, encoder.encode(template, examples)))


def with_tags(*tags: str) -> PreTrainedTokenizerFast:
    words = copy.deepcopy(tiny_tokenizer("chatml"))
    words.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return words


def test_ordinary_rows_have_no_warning() -> None:
    assert warnings(tiny_tokenizer("chatml"), CHAT, rows(("rain", "wet"), ("<b>sun</b>", "dry"))) == []


# ---- values


def test_html_tags_of_the_tokenizer_stay_tokens_in_values_as_in_production() -> None:
    words = with_tags("<b>", "</b>", "<table>")
    encoder, values = Encoder(words), {"text": "<b>cat</b> <table>"}
    ids, _, _ = encoder.prompt_and_gold(CHAT, Example("t:0", values, "cat", "t:1"))
    assert ids == words.apply_chat_template(CHAT.fill(values), add_generation_prompt=True)["input_ids"]
    assert words.convert_tokens_to_ids("<b>") in ids
    assert warnings(words, CHAT, rows(("<b>cat</b>", "cat"))) == []


@pytest.mark.parametrize("token", ["<tool_call>", "<|mine|>"])
def test_markup_that_the_chat_template_writes_or_that_has_bars_stays_text_in_values(token: str) -> None:
    words = with_tags(token)
    if token == "<tool_call>":
        words.chat_template += "{% if tools %}<tool_call>{% endif %}"
    ids, _, _ = Encoder(words).prompt_and_gold(CHAT, Example("t:0", {"text": f"a {token} b"}, "cat", "t:1"))
    assert words.convert_tokens_to_ids(token) not in ids


def test_a_value_that_spells_a_control_token_is_named_with_both_id_lists() -> None:
    words = tiny_tokenizer("chatml")
    [warning] = warnings(words, CHAT, rows(("rain", "wet"), (f"sun{EOS}", "dry"), (f"{EOS} fog", "wet")))
    end = words.convert_tokens_to_ids(EOS)
    cut = words(EOS.replace("|", ""), add_special_tokens=False)["input_ids"][0]
    assert warning.startswith("train.jsonl:2: a value spells a control token, which kvopt keeps as text (2 such rows)")
    assert f"where the tokenizer alone gives [{end}]" in warning
    assert f"ids [{cut}, " in warning


def test_a_tokenizer_whose_chat_call_gives_other_ids_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    words = copy.deepcopy(tiny_tokenizer("chatml"))
    render = words.apply_chat_template

    def with_bos(messages: Any, tokenize: bool = True, **kwargs: Any) -> Any:
        found = render(messages, tokenize=tokenize, **kwargs)
        return {"input_ids": [7, *found["input_ids"]]} if tokenize else found

    monkeypatch.setattr(words, "apply_chat_template", with_bos)
    [warning] = warnings(words, CHAT, rows(("rain", "wet")))
    assert "train.jsonl:1: the prompt has other ids than production's: ids [] from place 0 on" in warning
    assert "gives [7]" in warning


# ---- beginnings and ends


def with_bos_added() -> PreTrainedTokenizerFast:
    words = copy.deepcopy(tiny_tokenizer("plain"))
    end = words.convert_tokens_to_ids("<|endoftext|>")
    words.bos_token = "<|endoftext|>"
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    return words


def test_a_second_bos_is_named_in_text_and_in_messages() -> None:
    text = Template.from_text("<|endoftext|>Text: {{text}}\nLabel:\n")
    [warning] = warnings(with_bos_added(), text, rows(("rain", "wet")))
    assert "starts with <|endoftext|> twice" in warning
    assert warnings(with_bos_added(), Template.from_text("Text: {{text}}\nLabel:\n"), rows(("rain", "wet"))) == []
    chat = copy.deepcopy(tiny_tokenizer("gemma"))
    chat.chat_template = "{{ bos_token }}{{ bos_token }}" + chat.chat_template
    assert any("starts with <bos> twice" in line for line in warnings(chat, CHAT, rows(("rain", "wet"))))


def test_a_text_template_whose_turns_end_with_another_token_than_eos_is_named_and_mended() -> None:
    words = copy.deepcopy(tiny_tokenizer("chatml"))
    words.eos_token = "<|endoftext|>"
    text = Template.from_text("<|im_start|>user\nText: {{text}}<|im_end|>\n<|im_start|>assistant\n")
    [warning] = warnings(words, text, rows(("rain", "wet")))
    assert 'set template.end_token: "<|im_end|>"' in warning
    assert warnings(words, text, rows(("rain", "wet")), end_token=EOS) == []
    _, _, gold = Encoder(words, end_token=EOS).prompt_and_gold(text, rows(("rain", "wet"))[0])
    assert gold[-1] == words.convert_tokens_to_ids(EOS)
    with pytest.raises(InputError, match=r"template\.end_token: 'the' is no control token"):
        Encoder(words, end_token="the")


# ---- outputs


def test_outputs_that_end_or_go_on_with_a_turn_are_named() -> None:
    words = tiny_tokenizer("chatml")
    examples = rows(("a", f"cat{EOS}"), ("b", "dog"), ("c", f"cat{EOS}\n<|im_start|>user\nmore"), ("d", f"ox{EOS}"))
    ended, inside = warnings(words, CHAT, examples)
    assert ended.startswith("train.jsonl:1, 4: the output ends with the end of its turn, and then once more")
    assert inside.startswith("train.jsonl:3: a token that ends or opens a turn stands inside the output")
    [alone] = warnings(words, CHAT, examples[:2], end_token=False)
    assert "once more" not in alone


def test_outputs_that_the_tokenizer_changes_are_named_and_answers_are_compared_with_what_comes_back(
    kvopt: Kvopt, tmp_path: Path
) -> None:
    words = copy.deepcopy(tiny_tokenizer("chatml"))
    words.backend_tokenizer.normalizer = Lowercase()
    [warning] = warnings(words, CHAT, rows(("a", "Cat"), ("b", "dog")))
    assert (
        warning == "train.jsonl:1: the tokenizer changes the output 'Cat' to 'cat', and answers are compared with that"
    )
    base = save_tiny(tmp_path / "base", "llama", "chatml")
    words.save_pretrained(base)
    from kvopt.config.document import load_config
    from kvopt.run.run import Run

    config = write_job(tmp_path / "job", lambda c: c["model"].update(base=str(base)))
    data = tmp_path / "job" / "validation.jsonl"
    data.write_text(data.read_text().replace("weather", "Weather"))
    loaded, base_dir = load_config(config)
    task = Run(loaded, base_dir, tmp_path / "run", say=lambda line: None, bars=False).task()
    outputs = {example.id: example.output for example in task.dataset.validation}
    assert "Weather" in outputs.values()
    assert {task.expected[i] for i in outputs} == {text.lower() for text in outputs.values()}


# ---- nothing to learn

SLOT_FIRST = Template.from_text("{{text}}\n\nTL;DR:\n")


def test_a_template_that_starts_with_its_slot_has_a_context_only_with_scope_all() -> None:
    for words in (tiny_tokenizer("plain"), with_bos_added()):
        encoder = Encoder(words)
        encoded = encoder.encode(SLOT_FIRST, rows(("rain", "wet"), ("sun", "dry")))
        fault = nothing_to_learn(encoder, SLOT_FIRST, encoded, "leading")
        assert fault is not None
        assert "template.scope: all" in str(fault)
        assert nothing_to_learn(encoder, SLOT_FIRST, encoded, "all") is None
        ids = start_ids(encoder, SLOT_FIRST, encoded, "all")
        assert words.decode(ids[len(encoder.bos()) :]) == "\n\nTL;DR:\n"
    bare = Template.from_text("{{text}}")
    encoded = encoder.encode(bare, rows(("rain", "wet"), ("sun", "dry")), window=None)
    assert nothing_to_learn(encoder, bare, encoded, "all") is not None


def test_validate_and_run_say_so_and_scope_all_learns(kvopt: Kvopt, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["model"]["base"] = str(save_tiny(tmp_path / "base", "llama", "plain"))
        config["template"] = {"text": "{{text}}\n\nTL;DR:\n"}
        config["mutations"] = {"count": 0}
        config["contexts"] = [{"name": "kv", "kind": "kv", "init": "template", "steps": 1, "batch_size": 4}]

    config = write_job(tmp_path / "job", change)
    for verb in ("validate", "run"):
        code, _, err = kvopt(verb, config)
        assert code == 2
        assert "nothing stands before the first slot" in err
    board = run_job(config, tmp_path / "run", ("template.scope=all",))
    [learned] = [row for row in board["contexts"] if row["name"] == "kv"]
    assert learned["tokens"] > 0
    settings = yaml.safe_load(config.read_text())
    settings["contexts"] = []
    config.write_text(yaml.safe_dump(settings))
    code, _, err = kvopt("validate", config)
    assert code == 0
    assert "warning: template: nothing stands before the first slot" in err
