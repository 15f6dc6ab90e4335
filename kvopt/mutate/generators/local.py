"""Paraphrases by the base model itself. A small model rewrites a whole template badly but single sentences passably, so
each sentence and list item is rewritten alone, from few examples, and a candidate puts good rewrites of some of them
together.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from kvopt.mutate.blocks import capitalize, replace_spans, some, units
from kvopt.mutate.proposals import Complete, Marked, Proposal, Request, marked
from kvopt.mutate.sanity import sanity
from kvopt.mutate.spans import MARK, Field, MarkError
from kvopt.mutate.validity import Rejection

SYSTEM = "You rewrite instructions in other words. Keep the meaning. Keep markers such as [K1] exactly as they are."
EXAMPLES = (
    ("Answer the question in one short sentence.", "Give a short answer of one sentence to the question."),
    ("Do not add anything that is not in the text.", "Never add anything that does not appear in the text."),
    ("Write the value of [K1] in the field [K2].", "In the field [K2], put the value of [K1]."),
    (
        "You are a helpful assistant for travel questions.",
        "Your role is to be a helpful assistant for questions about travel.",
    ),
    ("If there is no answer, return [K1].", "Return [K1] when no answer exists."),
)
SHORTEST_UNIT = 4


def prompt(sentence: str) -> list[dict[str, str]]:
    """The chat messages that ask for a rewrite of one sentence."""
    messages = [{"role": "system", "content": SYSTEM}]
    for original, rewrite in EXAMPLES:
        messages += [{"role": "user", "content": f"Rewrite: {original}"}, {"role": "assistant", "content": rewrite}]
    return [*messages, {"role": "user", "content": f"Rewrite: {sentence}"}]


@dataclass
class LocalParaphraser:
    """Rewrites of single sentences by an injected model.

    Args:
        complete: the model (:data:`kvopt.mutate.proposals.Complete`).
        samples: rewrites asked for each sentence, all in one call, so that its result never depends on other sentences.
        temperature: of the sampling.
    """

    complete: Complete
    samples: int = 4
    temperature: float = 0.7
    name: str = "local"
    family: str = "paraphrase"
    batch: int = 1
    limit: int | None = None
    _bank: dict[tuple[int, str], tuple[list[str], list[Rejection]]] = field(default_factory=dict)

    def propose(self, requests: Sequence[Request]) -> list[Proposal]:
        return [self._propose(request) for request in requests]

    def _propose(self, request: Request) -> Proposal:
        rng = Random(request.seed)
        fields = request.fields
        places = [
            (i, *span) for i, masked in enumerate(fields) for span in units(masked.text) if _rewritable(masked, *span)
        ]
        chosen = some(rng, places)
        changes: dict[int, list[tuple[int, int, str]]] = {}
        refused: Counter[str] = Counter()
        for i, start, end in chosen:
            good, bad = self._rewrites(request.run_seed, fields[i].text[start:end])
            refused.update(r.reason for r in bad)
            if good:
                changes.setdefault(i, []).append((start, end, rng.choice(good)))
        if not changes:
            reason = refused.most_common(1)[0][0] if refused else "not-applicable"
            return Proposal(
                rejection=Rejection(reason, f"no good rewrite of {len(chosen)} sentences: {_counts(refused)}")
            )
        sources = list(request.template.fields)
        try:
            for i, edits in changes.items():
                sources[i] = fields[i].unmask(replace_spans(fields[i].text, edits))
        except MarkError as error:
            return Proposal(rejection=Rejection("lost-marker", str(error)))
        rewritten = sum(map(len, changes.values()))
        return Proposal(
            request.template.with_fields(sources), detail=f"{rewritten} of {len(places)} sentences rewritten"
        )

    def _rewrites(self, seed: int, sentence: str) -> tuple[list[str], list[Rejection]]:
        """Good rewrites of one masked sentence, marks renumbered from the sentence's own, and the reasons against the
        others.
        """
        form = marked(sentence)
        key = (seed, form.text)
        if key not in self._bank:
            digest = hashlib.sha256(f"{seed}:{form.text}".encode()).digest()
            limit = 12 + 2 * len(form.text.split()) + 8 * len(form.markers)
            asked = [prompt(form.text)] * self.samples
            answers = self.complete(asked, int.from_bytes(digest[:4], "big"), limit, self.temperature)
            self._bank[key] = _sorted_out(form, answers)
        good, bad = self._bank[key]
        return [_with_marks(text, form) for text in good], bad


def _sorted_out(form: Marked, answers: Sequence[str]) -> tuple[list[str], list[Rejection]]:
    good: list[str] = []
    bad: list[Rejection] = []
    for answer in answers:
        text = answer.strip()
        if len(text) > 1 and text[0] == text[-1] == '"' and not form.text.startswith('"'):
            bad.append(Rejection("sanity-shape", "put in quotes"))
            continue
        if form.text[:1].isupper():
            text = capitalize(text)
        restored = form.restore(text)
        rejection = restored if isinstance(restored, Rejection) else sanity(form.text, text, close=True)
        if rejection is None and _same(text, form.text):
            rejection = Rejection("equal-to-original", "same words")
        if rejection:
            bad.append(rejection)
        elif text not in good:
            good.append(text)
    return good, bad


def _with_marks(text: str, form: Marked) -> str:
    restored = form.restore(text)
    assert isinstance(restored, str)
    return restored


def _same(one: str, other: str) -> bool:
    return re.sub(r"\W", "", one).lower() == re.sub(r"\W", "", other).lower()


def _rewritable(masked: Field, start: int, end: int) -> bool:
    text = masked.text[start:end]
    words = [word for word in re.sub(MARK, " ", text).split() if word.isalpha() or word[:-1].isalpha()]
    return len(words) >= SHORTEST_UNIT and "\n" not in text and not masked.holds_slot(text)


def _counts(refused: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items()))
