"""Chat templates are tested by rendering: messages that go missing, turns that are not prompt + answer, and clocks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from kvopt.base.completion import local_completion
from kvopt.base.loading import load_base
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError
from kvopt.task.chat_check import changed_output, check_chat
from kvopt.task.chat_template import ChatTemplate, system_in_front
from kvopt.task.examples import Example
from kvopt.task.seam import Encoder, SeamError
from kvopt.task.template import Template
from tests.jobs import entries, run_job, write_job
from tests.tiny import save_tiny, tiny_tokenizer

Kvopt = Callable[..., tuple[int, str, str]]
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASKED
MESSAGES = [{"role": "system", "content": "Sort the text."}, {"role": "user", "content": "rain"}]


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    words = copy.deepcopy(tiny_tokenizer("chatml"))
    words.chat_template = template
    return words


def check(template: str, messages: Any = MESSAGES, answer_prefix: str | None = None, **kwargs: Any) -> Any:
    return check_chat(ChatTemplate(tokenizer(template), kwargs), messages, answer_prefix)


def job_with(folder: Path, template: str, change: Callable[[dict[str, Any]], object] = lambda c: None) -> Path:
    """A whole job on a base with this chat template."""
    base = save_tiny(folder / "base", "llama", "chatml")
    tokenizer(template).save_pretrained(base)

    def edit(config: dict[str, Any]) -> None:
        config["model"]["base"] = str(base)
        change(config)

    return write_job(folder / "job", edit)


# ---- messages


def test_a_chat_template_that_keeps_every_message_has_no_warning() -> None:
    assert check(PLAIN).warnings == ()
    assert check(PLAIN).before_answer == ""
    assert check(PLAIN).after_answer == "<|im_end|>\n"


ONLY_KNOWN = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant', 'system') %}" + TURN + "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "roles", "name"),
    [
        (ONLY_KNOWN + ASKED, ("developer", "user"), r"drops message 0 \(developer\)"),
        (ONLY_KNOWN.replace(", 'system'", "") + ASKED, ("system", "user"), r"drops message 0 \(system\)"),
        ("{% set m = messages[-1] %}" + TURN + ASKED, ("user", "assistant", "user"), r"drops message 0 \(user\)"),
        (ONLY_KNOWN + ASKED, ("system", "tool", "user"), r"drops message 1 \(tool\)"),
    ],
)
def test_a_message_that_is_left_out_is_an_error_that_names_it(template: str, roles: tuple[str, ...], name: str) -> None:
    messages = [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]
    with pytest.raises(InputError, match=name):
        check(template, messages)


def test_validate_and_run_refuse_a_dropped_message_without_slots(kvopt: Kvopt, tmp_path: Path) -> None:
    config = job_with(tmp_path, ONLY_KNOWN + ASKED, lambda c: c["template"]["messages"][0].update(role="developer"))
    for verb in ("validate", "run"):
        code, _, err = kvopt(verb, config)
        assert code == 2
        assert "drops message 0 (developer)" in err


GEMMA_LIKE = (
    "<|im_start|>user\n{{ messages[0].content }}\n\n{{ messages[1].content }}<|im_end|>\n"
    "{% for m in messages[2:] %}" + TURN + "{% endfor %}" + ASKED
)
MOVED = "{% for m in messages | reverse %}" + TURN + "{% endfor %}" + ASKED


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        (GEMMA_LIKE, "merges message 0 (system) with message 1 (user) into one turn"),
        (MOVED, "moves message 1 (user) in front of message 0 (system)"),
        (PLAIN + "{{ messages[0].content }}", "repeats message 0 (system)"),
        (PLAIN.replace("m.content }}", "m.content | trim }}"), "strips the white space around message 0 (system)"),
        (
            PLAIN.replace("m.content }}", "m.content | replace('Sort', 'Order') }}"),
            "changes the text of message 0 (system)",
        ),
        (PLAIN.replace("m.role }}", "'user' }}", 1), "gives message 0 (system) the user's role"),
    ],
)
def test_what_a_chat_template_does_to_a_message_is_named(template: str, warning: str) -> None:
    messages = [{**m, "content": m["content"] + " "} for m in MESSAGES]
    assert any(warning in line for line in check(template, messages).warnings)


# ---- the answer's turn

THINK = PLAIN.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
SWITCH = THINK.replace("if m.role == 'assistant'", "if m.role == 'assistant' and (enable_thinking | default(true))")
NO_HEADER = PLAIN.replace(ASKED, "")
SPACE = (
    "{% for m in messages %}{% if m.role == 'assistant' %} [/] {{ m.content }}<|im_end|>"
    "{% else %}[{{ m.role }}] {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %} [/]{% endif %}"
)
CHANNEL = PLAIN.replace("{{ m.content }}", "{{ '<|channel|>' if m.role == 'assistant' }}{{ m.content }}")
OPENED = PLAIN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize(
    ("template", "between"),
    [
        (THINK, "<think>\n\n</think>\n\n"),
        (NO_HEADER, "<|im_start|>assistant\n"),
        (SPACE, " "),
        (
            PLAIN.replace("{{ m.content }}", "{{ '<|channel|>' if m.role == 'assistant' }}{{ m.content }}"),
            "<|channel|>",
        ),
    ],
)
def test_what_stands_between_prompt_and_answer_is_named_and_can_be_set(template: str, between: str) -> None:
    found = check(template)
    assert found.before_answer == between
    [warning] = found.warnings
    assert repr(between) in warning
    assert f"template.answer_prefix: {json.dumps(between)}" in warning
    assert check(template, answer_prefix=between).warnings == ()
    assert check(template, answer_prefix="").warnings == (), "the user means it as it is"
    [other] = check(template, answer_prefix="Well: ").warnings
    assert "template.answer_prefix" in other


def test_an_argument_of_the_chat_template_that_mends_the_turn_is_offered() -> None:
    [warning] = check(SWITCH).warnings
    assert "set template.chat_kwargs: {enable_thinking: false}" in warning
    assert check(SWITCH, enable_thinking=False).warnings == ()


def test_a_prompt_that_opens_what_no_finished_answer_has_is_named() -> None:
    [warning] = check(OPENED).warnings
    assert "ends the prompt with '<think>\\n'" in warning
    assert check(OPENED).before_answer is None


@pytest.mark.parametrize("template", [THINK, NO_HEADER, SPACE])
def test_with_the_answer_prefix_body_and_gold_are_the_ids_of_the_whole_conversation(template: str) -> None:
    words = tokenizer(template)
    between = check(template).before_answer
    encoder = Encoder(words, answer_prefix=between)
    chat = Template.from_messages([{"role": "system", "content": "Sort."}, {"role": "user", "content": "{{text}}"}])
    rows = [
        Example(f"t:{i}", {"text": text}, out, f"t:{i}")
        for i, (text, out) in enumerate([("rain", "wet"), ("sun", "dry")])
    ]
    encoded = encoder.encode(chat, rows)
    for example, row in zip(rows, encoded.rows, strict=True):
        conversation = [*chat.fill(example.values), {"role": "assistant", "content": example.output}]
        whole = words.apply_chat_template(conversation, tokenize=True)["input_ids"]
        ids = [*encoded.prefix, *row.body, *row.gold]
        assert ids == whole[: len(ids)]
        assert words.decode(row.gold).strip() == f"{example.output}<|im_end|>"
        prompt = words.apply_chat_template(chat.fill(example.values), add_generation_prompt=True)["input_ids"]
        assert [*encoded.prefix, *row.body][: len(prompt)] == prompt


def test_a_prompt_that_merges_with_its_output_says_what_the_chat_template_puts_between() -> None:
    template = PLAIN.replace("assistant\n{% endif %}", "assistant{% endif %}")
    words = tokenizer(template)
    merged = next(
        t for t in sorted(words.get_vocab()) if len(t) > 3 and t.startswith("t") and t.isalpha() and t.isascii()
    )
    example = Example("t:0", {"text": "x"}, merged[1:], "t.jsonl:1")
    chat = Template.from_messages([{"role": "user", "content": "{{text}}"}])
    with pytest.raises(SeamError, match=r'answer_prefix: "\\n"'):
        Encoder(words).encode(chat, [example])


# ---- what an output does to its turn

ANSWER = "{% if m.role == 'assistant' %}{{ ANSWER }}{% else %}{{ m.content }}{% endif %}"


def answers(expression: str) -> str:
    """A chat template that writes an answer as this Jinja expression says."""
    return PLAIN.replace("{{ m.content }}", ANSWER.replace("ANSWER", expression))


QWEN_LIKE = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
NO_TOOLS = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and 'tool' in m.content %}{{ raise_exception('tools go into tool_calls') }}"
    "{% endif %}{{ m.content }}",
)
THOUGHT = "<think>\nIt is wet.\n</think>\n\nrain"


@pytest.mark.parametrize(
    ("template", "output", "said"),
    [
        (answers("m.content | trim"), "wet\n", "strips the white space around the output"),
        (
            answers("m.content.split('</think>')[-1].lstrip()"),
            THOUGHT,
            r"leaves '<think>\nIt is wet.\n</think>\n\n' out of the output",
        ),
        (answers("m.content | tojson"), '{"a": 1}', r"""changes the output '{"a": 1}' to '{\\"a\\": 1}'"""),
        (QWEN_LIKE, THOUGHT, "renders the turn otherwise for the output: 'It is wet."),
        (NO_TOOLS, '{"tool": 1}', "refuses the output: tools go into tool_calls"),
    ],
)
def test_what_a_chat_template_does_to_an_output_is_named(template: str, output: str, said: str) -> None:
    found = changed_output(ChatTemplate(tokenizer(template)), MESSAGES, output)
    assert found is not None
    assert found.startswith(said)
    assert changed_output(ChatTemplate(tokenizer(template)), MESSAGES, "wet") is None
    assert changed_output(ChatTemplate(tokenizer(PLAIN)), MESSAGES, output) is None


def test_validate_and_run_name_the_rows_whose_outputs_the_chat_template_changes(kvopt: Kvopt, tmp_path: Path) -> None:
    template = answers("m.content.split('</think>')[-1].lstrip()")
    config = job_with(tmp_path, template, lambda c: c.update(mutations={"count": 0}, contexts=[]))
    rows = [json.loads(line) for line in (config.parent / "train.jsonl").read_text().splitlines()]
    for place in (0, 2):
        rows[place]["output"] = "<think>hm</think>" + rows[place]["output"]
    (config.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = "train.jsonl:1, 3: in a finished conversation the base's chat template leaves '<think>hm</think>' out of"
    code, out, _ = kvopt("validate", config, "--json")
    assert code == 0
    assert sum(line in warning for warning in json.loads(out)["warnings"]) == 1
    code, _, err = kvopt("run", config, "--out", tmp_path / "out")
    assert code == 0
    assert err.count(line) == 1


# ---- the clock

DATED = (
    "{% set day = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ day if loop.first }}{{ m.content }}<|im_end|>\n{% endfor %}"
) + ASKED


def test_a_date_in_the_prompt_is_named_with_the_argument_that_sets_it() -> None:
    found = check(DATED)
    [warning] = found.warnings
    assert found.uses_clock
    assert "template.chat_kwargs: {date_string:" in warning
    assert check(DATED, date_string="1 Jan 2026").warnings == ()
    unset = check(DATED.replace("date_string if date_string is defined else ", ""))
    assert "has no argument" in unset.warnings[0]


def test_the_clock_of_a_chat_template_can_be_stopped() -> None:
    chat = ChatTemplate(tokenizer(DATED), now=datetime(2020, 2, 29))
    assert "29 Feb 2020" in chat.render(MESSAGES)
    assert f"{datetime.now():%d %b %Y}" in ChatTemplate(tokenizer(DATED)).render(MESSAGES)


def test_a_run_keeps_the_date_on_which_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job_with(tmp_path, DATED, lambda c: c.update(mutations={"count": 0}, contexts=c["contexts"][:1]))
    out = tmp_path / "run"
    run_job(config, out)
    manifest = entries(out / "manifest.json")
    assert manifest["prompt_time"][:10] == f"{datetime.now():%Y-%m-%d}"
    manifest["prompt_time"] = "2020-02-29T12:00:00"
    (out / "manifest.json").write_text(json.dumps(manifest))
    first = run_job(config, out)
    context = (out / "contexts" / "kv-8" / "adapter_model.safetensors").read_bytes()
    again = run_job(config, out)
    assert json.loads((out / "manifest.json").read_text())["prompt_time"] == "2020-02-29T12:00:00"
    assert again == first
    assert (out / "contexts" / "kv-8" / "adapter_model.safetensors").read_bytes() == context


# ---- messages of kvopt's own

REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
DROPS = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.mark.parametrize("template", [REFUSES, DROPS])
def test_a_system_message_of_ours_goes_in_front_where_there_is_no_such_role(template: str) -> None:
    text = ChatTemplate(tokenizer(template)).render_own(MESSAGES)
    assert text == "<|im_start|>user\nSort the text.\n\nrain<|im_end|>\n<|im_start|>assistant\n"
    assert system_in_front(MESSAGES) == [{"role": "user", "content": "Sort the text.\n\nrain"}]
    assert ChatTemplate(tokenizer(PLAIN)).render_own(MESSAGES) == ChatTemplate(tokenizer(PLAIN)).render(MESSAGES)


def test_the_local_paraphraser_is_asked_with_the_arguments_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "base", "llama", "chatml")
    tokenizer(REFUSES.replace("{{ m.content }}", "{{ m.content }}{{ extra }}")).save_pretrained(folder)
    base = load_base(ModelConfig(base=str(folder), dtype="float32", device="cpu"))
    seen: list[str] = []

    def generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.extend(base.tokenizer.batch_decode(input_ids))
        return input_ids

    monkeypatch.setattr(base.model, "generate", generate)
    complete = local_completion(ChatTemplate(base.tokenizer, {"extra": " quickly"}), base)
    complete([MESSAGES], 0, 4, 1.0)
    assert seen == ["<|im_start|>user\nSort the text.\n\nrain quickly<|im_end|>\n<|im_start|>assistant\n"]


def test_a_run_with_paraphrases_ends_on_a_base_that_refuses_system_messages(kvopt: Kvopt, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        system, user = config["template"]["messages"]
        config["template"]["messages"] = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}]
        config["mutations"] = {"count": 3, "generator": {"kind": "local", "samples": 1}}
        config["contexts"] = []

    config = job_with(tmp_path, REFUSES, change)
    code, _, err = kvopt("run", config)
    assert code == 0, err
    assert "Traceback" not in err


def test_the_answer_prefix_of_a_config_reaches_the_rows(kvopt: Kvopt, tmp_path: Path) -> None:
    config = job_with(tmp_path, THINK)
    code, out, _ = kvopt("validate", config, "--json")
    assert code == 0
    assert "answer_prefix" in " ".join(json.loads(out)["warnings"])
    settings = yaml.safe_load(config.read_text())
    settings["template"]["answer_prefix"] = "<think>\n\n</think>\n\n"
    config.write_text(yaml.safe_dump(settings))
    code, out, _ = kvopt("validate", config, "--json")
    report = json.loads(out)
    assert "answer_prefix" not in " ".join(report["warnings"])
    assert report["first_body"].endswith("assistant\n<think>\n\n</think>\n\n")
