"""A condition moves to the other end of its sentence."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import capitalize, lower_first, replace_spans, some, units
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import starts_imperative

FRONT = re.compile(r"(If|When|Unless|Whenever|Where) ([^,.;:!?\n]+), ([^,;:!?\n]+?)(\.?)$")
BACK = re.compile(r"([^,;:!?\n]+?) (if|when|unless|whenever) ([^,;:!?\n.]+?)(\.?)$")
POINTS_BACK = re.compile(r"\b(it|its|they|them|their|this|these|then|so|one|either|both)\b", re.I)


@operator("clause-order", "structure")
def clause_order(field: Field, rng: Random) -> str | None:
    """``If A, do B.`` ↔ ``Do B if A.``, where no pronoun ties the two halves."""
    changes = []
    for start, end in units(field.text):
        sentence = field.text[start:end]
        if front := FRONT.fullmatch(sentence):
            word, condition, main, period = front.groups()
            if (
                starts_imperative(_bare(main))
                and not POINTS_BACK.search(main)
                and not re.search(r"\b(if|when|unless)\b", main)
            ):
                changes.append((start, end, f"{capitalize(main)} {word.lower()} {condition}{period}"))
        elif back := BACK.fullmatch(sentence):
            main, word, condition, period = back.groups()
            tied = POINTS_BACK.search(condition) or re.search(
                r"\b(if|when|even|only|as|and|or|but)$|\b(if|when)\b", main
            )
            if starts_imperative(_bare(main)) and not tied and len(condition.split()) > 1:
                changes.append((start, end, f"{capitalize(word)} {condition}, {lower_first(main)}{period}"))
    return replace_spans(field.text, some(rng, changes)) if changes else None


def _bare(main: str) -> str:
    return capitalize(re.sub(r"^(please|always|never|do not|don't|simply|just) ", "", main, flags=re.I))
