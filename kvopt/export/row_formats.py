"""What a row of ``kvopt export-data`` looks like, one function for each format.

``tokens`` holds the ids and labels that a student of ours is trained on; ``text`` the rendered prompt and the output
with its end token, which a trainer tokenizes itself; the others hold what a trainer renders itself, with its own chat
template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvopt.errors import InputError
from kvopt.task.examples import Example
from kvopt.task.seam import Encoder
from kvopt.task.template import Template

IGNORED = -100
"""The label of a token that counts nothing in the loss."""
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
TOKENIZED = ("tokens", "text")
"""Formats that the base's tokenizer has a part in."""
CHAT_ONLY = ("messages", "sharegpt")


def check_format(format: str, template: Template) -> None:
    """Raises InputError for an unknown format, or one that needs messages under a template of plain text."""
    if format not in FORMATS:
        raise InputError(f"no format {format!r}", where="--format", fix="one of " + ", ".join(FORMATS))
    if format in CHAT_ONLY and not template.is_chat:
        fix = "use --format prompt-completion, text or tokens"
        raise InputError("a template of plain text has no messages", where=f"--format {format}", fix=fix)


def formatted(
    format: str, template: Template, examples: Sequence[Example], encoder: Encoder | None, name: str
) -> list[tuple[str, dict[str, Any]]]:
    """(example id, row) of each example under a template. Raises InputError, at the context's ``name``, for a row that
    the format cannot hold.
    """
    make = FORMATS[format]
    try:
        return [(example.id, make(template, example, encoder)) for example in examples]
    except InputError as error:
        raise InputError(error.what, where=f"{name}, {error.where}", fix=error.fix) from None


def labelled(prompt: Sequence[int], gold: Sequence[int]) -> dict[str, list[int]]:
    """``input_ids`` of a prompt with its output, and ``labels``, which are −100 in the prompt."""
    return {"input_ids": [*prompt, *gold], "labels": [IGNORED] * len(prompt) + list(gold)}


def _tokens(template: Template, example: Example, encoder: Encoder | None) -> dict[str, Any]:
    """``input_ids``, ``attention_mask``, and ``labels`` that are −100 in the prompt."""
    assert encoder is not None
    prompt, _, gold = encoder.prompt_and_gold(template, example)
    ids, labels = labelled(prompt, gold).values()
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _text(template: Template, example: Example, encoder: Encoder | None) -> dict[str, Any]:
    """``prompt`` and ``completion`` as text, of which the tokenizer makes exactly our ids. A BOS that it adds to any
    text is not in it. Raises InputError where it would make others.
    """
    assert encoder is not None
    prompt = encoder.renderer.render(template, example.values, where=example.source).text
    bos = encoder.tokenizer.decode(list(encoder.bos()))
    if template.is_chat and bos and prompt.startswith(bos):
        prompt = prompt[len(bos) :]
    prompt += encoder.answer_prefix or ""
    completion = example.output + encoder.end_of_answer(template)
    ids, _, gold = encoder.prompt_and_gold(template, example)
    theirs = [encoder.tokenizer(text)["input_ids"] for text in (prompt, prompt + completion)]
    if theirs != [ids, [*ids, *gold]]:
        what = "the tokenizer makes other ids of this text than of the prompt with its output"
        raise InputError(what, where=example.source, fix="use --format tokens")
    if not completion.endswith(end_token_of(template, encoder)):
        what = "trainers put an EOS behind the output, and template.end_token is false"
        raise InputError(what, where=example.source, fix="use --format tokens")
    return {"prompt": prompt, "completion": completion}


def end_token_of(template: Template, encoder: Encoder) -> str:
    """The token that ends an output, which ``SFTConfig.eos_token`` has to be: the tokenizer's EOS, or the end of a turn
    where a chat template closes turns with another.
    """
    end = encoder.end_of_answer(template)
    return end if end in encoder.tokenizer.get_vocab() else encoder.tokenizer.eos_token


def _prompt_completion(template: Template, example: Example, encoder: Encoder | None) -> dict[str, Any]:
    prompt: Any = template.fill(example.values)
    answer = [{"role": "assistant", "content": example.output}]
    return {"prompt": prompt, "completion": answer if template.is_chat else example.output}


def _messages(template: Template, example: Example, encoder: Encoder | None) -> dict[str, Any]:
    row = _prompt_completion(template, example, encoder)
    return {"messages": row["prompt"] + row["completion"]}


def _sharegpt(template: Template, example: Example, encoder: Encoder | None) -> dict[str, Any]:
    turns = _messages(template, example, encoder)["messages"]
    if other := next((turn["role"] for turn in turns if turn["role"] not in SHAREGPT), None):
        raise InputError(f"sharegpt has no role {other!r}", where=example.source, fix="use --format messages")
    return {"conversations": [{"from": SHAREGPT[turn["role"]], "value": turn["content"]} for turn in turns]}


def _alpaca(template: Template, example: Example, encoder: Encoder | None) -> dict[str, Any]:
    """``instruction``, ``input`` (empty) and ``output``; ``system`` and ``history`` where the template has them."""
    filled = template.fill(example.values)
    if isinstance(filled, str):
        return {"instruction": filled, "input": "", "output": example.output}
    system = [turn["content"] for turn in filled if turn["role"] == "system"]
    turns = [turn for turn in filled if turn["role"] != "system"]
    in_turn = all(turn["role"] == ("user", "assistant")[i % 2] for i, turn in enumerate(turns))
    if len(system) > 1 or (system and filled[0]["role"] != "system") or not in_turn:
        what = "alpaca holds one system message at the start, then user and assistant in turn"
        raise InputError(what, where=example.source, fix="use --format messages")
    row: dict[str, Any] = {"instruction": turns[-1]["content"], "input": "", "output": example.output}
    if system:
        row["system"] = system[0]
    if len(turns) > 1:
        row["history"] = [[turns[i]["content"], turns[i + 1]["content"]] for i in range(0, len(turns) - 1, 2)]
    return row


Make = Callable[[Template, Example, Encoder | None], dict[str, Any]]
FORMATS: Mapping[str, Make] = {
    "tokens": _tokens,
    "text": _text,
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}
