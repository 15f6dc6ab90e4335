"""The frozen-prompt probe: the task's own inputs under an instruction that asks for something else.

A student that still answers as it answers the task has learned to ignore instructions. An answer looks like the task
when it is the model's own answer under the original template, or, where all gold outputs are JSON objects or lists,
when it is one too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvopt.base.generate import answer_text, generate
from kvopt.base.loading import Base
from kvopt.base.prefix import prefill
from kvopt.config.metrics import Ratio
from kvopt.task.examples import Example
from kvopt.task.seam import Encoder
from kvopt.task.template import Slot, Template, escape, parse
from kvopt.train.json_answers import NotJSON, parse_json, same_value

Progress = Callable[[int], None]


def frozen_template(original: Template, instruction: str) -> Template:
    """The original's slots alone, under another instruction: its system message where it has one, else the text in
    front of the first slot.
    """
    text, bare = escape(instruction), [_slots_of(field) for field in original.fields]
    if not original.is_chat:
        return original.with_fields([f"{text}\n\n{bare[0]}\n"])
    messages: list[dict[str, str]] = []
    for message, slots in zip(original.messages, bare, strict=True):
        if slots and messages and messages[-1]["role"] == message.role:  # what stood between them had no slots
            messages[-1]["content"] += f"\n{slots}"
        elif slots:
            messages.append({"role": message.role, "content": slots})
    if original.messages[0].role == "system" and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text})
    else:
        messages[0]["content"] = f"{text}\n\n{messages[0]['content']}"
    return Template.from_messages(messages)


def _slots_of(field: str) -> str:
    return "\n".join("{{" + part.name + "}}" for part in parse(field) if isinstance(part, Slot))


def frozen_answers(
    model: Base,
    encoder: Encoder,
    template: Template,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    stop: frozenset[int],
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[str]:
    """Answers under ``template``, one for each example; arguments as for :func:`kvopt.base.generate.generate`."""
    encoded = [encoder.prompt_and_gold(template, example) for example in examples]
    prompts = [ids for ids, _, _ in encoded]
    shared = _shared(prompts, min(min(leading, len(ids) - 1) for ids, leading, _ in encoded))
    with torch.no_grad():
        prefix = prefill(model, ids=torch.tensor(prompts[0][:shared], device=model.device, dtype=torch.int64))
    answers = generate(
        model,
        prefix,
        [ids[shared:] for ids in prompts],
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    return [answer_text(model, ids) for ids in answers]


def _shared(prompts: Sequence[Sequence[int]], limit: int) -> int:
    """How many leading ids, at most ``limit``, all prompts share."""
    for ids in prompts:
        limit = next((i for i in range(limit) if ids[i] != prompts[0][i]), limit)
    return limit


def task_likeness(answer: str, under_original: str, *, json_task: bool) -> dict[str, Ratio]:
    """``same_as_original``, ``valid_json`` (None's place is 0 / 0 unless ``json_task``) and ``looks_like_task``."""
    same, valid = same_value(answer, under_original), json_task and is_container(answer)
    return {
        "same_as_original": (float(same), 1.0),
        "valid_json": (float(valid), float(json_task)),
        "looks_like_task": (float(same or valid), 1.0),
    }


def is_container(text: str) -> bool:
    """Whether a text is a JSON object or list and nothing else."""
    try:
        return isinstance(parse_json(text), dict | list)
    except NotJSON:
        return False
