"""A small sorting task over a tiny base: template, examples, encoding and reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvopt.base.loading import Base
from kvopt.contexts import TextContext
from kvopt.measure.reference import Reference, build_reference
from kvopt.task.examples import Example
from kvopt.task.seam import Encoded, Encoder
from kvopt.task.template import Template

WORDS = [
    "rain",
    "snow",
    "wind",
    "book",
    "song",
    "table",
    "album",
    "weather",
    "tomorrow",
    "evening",
    "mountain",
    "read",
    "play",
    "rate",
    "six",
]
SYSTEM = "Sort the message into one of the labels: weather, music, book. Answer with one line of JSON and nothing else."
OTHER = "You are careful. Please find the label of the request (weather, music or book) and write a line of JSON."


@dataclass(frozen=True)
class Task:
    """What the tests of scores, contexts and optimization share."""

    base: Base
    template: Template
    encoder: Encoder
    examples: tuple[Example, ...]
    encoded: Encoded
    reference: Reference

    @property
    def original(self) -> TextContext:
        return TextContext("original", self.template, self.encoded)

    def text(self, name: str, template: Template) -> TextContext:
        gold = {row.example_id: row.gold for row in self.encoded.rows}
        return TextContext(name, template, self.encoder.encode(template, self.examples, gold=gold))


def template_for(base: Base, text: str = SYSTEM) -> Template:
    """The task's template in the form that the base's tokenizer can render."""
    if base.tokenizer.chat_template is None:
        return Template.from_text(text + "\nRequest: {{text}}\nAnswer:\n")
    return Template.from_messages([{"role": "system", "content": text}, {"role": "user", "content": "{{text}}"}])


def examples(count: int, seed: int = 0) -> tuple[Example, ...]:
    """Rows of different lengths."""
    rng = Random(seed)
    rows = []
    for i in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 7)))
        output = f'{{"label": "{rng.choice(WORDS)}"' + ', "score": 1' * rng.randint(0, 2) + "}"
        rows.append(Example(f"train:{i}", {"text": text}, output, f"train.jsonl:{i + 1}"))
    return tuple(rows)


def make_task(base: Base, folder: Path, count: int = 12) -> Task:
    """The task with its reference built in ``folder``."""
    template, rows = template_for(base), examples(count)
    encoder = Encoder(base.tokenizer)
    encoded = encoder.encode(template, rows)
    context = TextContext("original", template, encoded)
    return Task(
        base,
        template,
        encoder,
        rows,
        encoded,
        build_reference(base, context.prefix(base), encoded, folder, batch_size=4),
    )
