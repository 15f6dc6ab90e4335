"""What the base really sees of a template and its rows, where that may not be what the user means: one line each."""

from __future__ import annotations

import json
from collections.abc import Sequence

from kvopt.errors import InputError, counted
from kvopt.task.chat_check import changed_output
from kvopt.task.examples import Example, places
from kvopt.task.plain_tokens import control_tokens
from kvopt.task.render import Rendered
from kvopt.task.seam import Encoded, Encoder
from kvopt.task.template import Template

SHOWN_IDS = 12  # token ids in a message
SHOWN_TEXT = 60  # characters of an output in a message
CHECKED_OUTPUTS = 32  # first rows whose outputs are rendered as the answers of finished conversations


def prompt_warnings(
    encoder: Encoder, template: Template, examples: Sequence[Example], encoded: Encoded
) -> tuple[str, ...]:
    """One line for everything about the prompts and outputs that may not be meant.

    Args:
        encoder: of the base's tokenizer.
        template: the original.
        examples: the rows, at least one.
        encoded: the same rows under the template, in the same order.

    Raises:
        InputError: the base's chat template leaves a message out.
    """
    warnings = list(encoder.renderer.check(template).warnings) if template.is_chat else []
    warnings += _bos_twice(encoder, template, encoded)
    warnings += _another_end(encoder, template, examples[0])
    warnings += _other_than_production(encoder, template, examples)
    warnings += _outputs(encoder, template, examples, encoded)
    warnings += _changed_by_the_chat_template(encoder, template, examples)
    return tuple(warnings)


def start_ids(encoder: Encoder, template: Template, encoded: Encoded, scope: str) -> tuple[int, ...]:
    """The ids of the template's text that a context can start from: what stands before the first slot; where nothing
    does and contexts replace all static text (``scope: all``), that text.
    """
    own = encoded.prefix[len(encoder.bos()) :]
    if template.is_chat or own or scope != "all":
        return encoded.prefix
    text = template.fill(dict.fromkeys(template.slots, ""))
    assert isinstance(text, str)
    return tuple(encoder.tokenized(template, Rendered(text, ()))[0])


def nothing_to_learn(encoder: Encoder, template: Template, encoded: Encoded, scope: str) -> InputError | None:
    """Why a template has no context to learn: it starts with its slot, and nothing of it stands elsewhere."""
    if template.is_chat or start_ids(encoder, template, encoded, scope)[len(encoder.bos()) :]:
        return None
    return InputError(
        "nothing stands before the first slot, so there is no context to learn",
        where="template",
        fix="put instructions in front of the slot" + ("" if scope == "all" else ", or set template.scope: all"),
    )


def turn_tokens(encoder: Encoder, template: Template, example: Example) -> frozenset[int]:
    """Ids of the control tokens that open or close a turn in the rendered prompt, and of what ends an answer."""
    rendered = encoder.renderer.render(template, dict.fromkeys(example.values, "x"))
    ids, _ = encoder.tokenized(template, rendered)
    end = encoder.tokenizer(encoder.end_of_answer(template), add_special_tokens=False)["input_ids"]
    known = {encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id} - {None}
    return frozenset((set(ids) | set(end)) & control_tokens(encoder.tokenizer) | known)


def _bos_twice(encoder: Encoder, template: Template, encoded: Encoded) -> list[str]:
    bos, start = encoder.tokenizer.bos_token_id, [*encoded.prefix, *encoded.rows[0].body][:2]
    if bos is None or start != [bos, bos]:
        return []
    token = encoder.tokenizer.bos_token
    if template.is_chat:
        return [f"template.messages: every prompt starts with {token} twice (leave it out of the message)"]
    return [f"template: every prompt starts with {token} twice, since the tokenizer adds it (leave it out of the text)"]


def _another_end(encoder: Encoder, template: Template, example: Example) -> list[str]:
    """A text template whose own turns end with another token than the outputs."""
    if template.is_chat or encoder.end_token is not True:
        return []
    rendered = encoder.renderer.render(template, example.values)
    ids, spans = encoder.tokenized(template, rendered)
    after = [token for token, (start, _) in zip(ids, spans, strict=True) if start >= rendered.slots[0][1]]
    marks = [token for token in after if token in encoder.plain.control]
    if not marks or encoder.tokenizer.eos_token_id in marks:
        return []
    end = encoder.tokenizer.convert_ids_to_tokens(marks[0])
    what = f"outputs end with {encoder.tokenizer.eos_token}, and the turns of the template with {end}"
    return [f"template: {what} (set template.end_token: {json.dumps(end)}, or name the other one if it is meant)"]


def _other_than_production(encoder: Encoder, template: Template, examples: Sequence[Example]) -> list[str]:
    """Prompts with other ids than production's: values that hold a control token, which stays text here."""
    spelled = [e for e in examples if any(encoder.plain.spells_control(value) for value in e.values.values())]
    warnings = []
    for example in dict.fromkeys([0, *([examples.index(spelled[0])] if spelled else [])]):
        row = examples[example]
        rendered = encoder.renderer.render(template, row.values, where=row.source)
        ours, theirs = encoder.tokenized(template, rendered)[0], _production(encoder, template, row)
        if ours == theirs:
            continue
        what = "the prompt has other ids than production's"
        if row in spelled:
            more = f" ({counted(len(spelled), 'such row')})" if len(spelled) > 1 else ""
            what = f"a value spells a control token, which kvopt keeps as text{more}"
        warnings.append(f"{row.source}: {what}: {_difference(ours, theirs)}")
    return warnings


def _production(encoder: Encoder, template: Template, example: Example) -> list[int]:
    """The prompt's ids in code that does not know what is data."""
    prompt = template.fill(example.values)
    if isinstance(prompt, str):
        return encoder.tokenized(template, Rendered(prompt, ()))[0]
    return encoder.renderer.chat.ids(prompt)


def _difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two lists of ids part, and both from there to where they agree again."""
    start = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    room = min(len(ours), len(theirs)) - start
    end = next((i for i in range(room) if ours[-1 - i] != theirs[-1 - i]), room)
    one, other = ours[start : len(ours) - end], theirs[start : len(theirs) - end]
    return f"ids {_ids(one)} from place {start} on, where the tokenizer alone gives {_ids(other)}"


def _ids(ids: Sequence[int]) -> str:
    return str(list(ids[:SHOWN_IDS])) + (f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else "")


# ---- outputs


def _outputs(encoder: Encoder, template: Template, examples: Sequence[Example], encoded: Encoded) -> list[str]:
    """Outputs that end their turn themselves or go on with another one, and those that the tokenizer changes."""
    turns = turn_tokens(encoder, template, examples[0])
    ended, inside, changed = list[Example](), list[Example](), list[tuple[Example, str]]()
    for example, row, text in zip(examples, encoded.rows, encoder.gold_texts(encoded), strict=True):
        answer = encoder.without_end(row.gold)
        if not turns.isdisjoint(answer[:-1]):
            inside.append(example)
        elif answer and answer[-1] in turns:
            ended.append(example)
        elif text.strip() != example.output.strip():
            changed.append((example, text))
    warnings = []
    if ended:
        twice = ", and then once more" if encoder.end_token else ""
        fix = "take it out of the outputs" + (" or set template.end_token: false" if encoder.end_token else "")
        warnings.append(f"{places([e.source for e in ended])}: the output ends with the end of its turn{twice} ({fix})")
    if inside:
        what = "a token that ends or opens a turn stands inside the output, and is learned"
        warnings.append(f"{places([e.source for e in inside])}: {what} (cut the output before it)")
    if changed:
        example, text = changed[0]
        what = f"the tokenizer changes the output {_cut(example.output)} to {_cut(text)}"
        warnings.append(f"{places([e.source for e, _ in changed])}: {what}, and answers are compared with that")
    return warnings


def _changed_by_the_chat_template(encoder: Encoder, template: Template, examples: Sequence[Example]) -> list[str]:
    """Outputs that the chat template writes otherwise into a finished conversation: one line for each way."""
    if not template.is_chat:
        return []
    found: dict[str, list[tuple[str, str]]] = {}
    for example in examples[:CHECKED_OUTPUTS]:
        messages = template.fill(example.values)
        assert not isinstance(messages, str)
        if what := changed_output(encoder.renderer.chat, messages, example.output):
            found.setdefault(what.partition(" ")[0], []).append((example.source, what))
    fix = "kvopt learns outputs as they are: write them as the base is to say them"
    which = "in a finished conversation the base's chat template"
    return [f"{places([source for source, _ in rows])}: {which} {rows[0][1]} ({fix})" for rows in found.values()]


def _cut(text: str) -> str:
    return repr(text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…")
