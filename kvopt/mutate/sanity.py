"""Cheap checks of a model's paraphrase against the text that it rewrites. They find what is broken, not what is merely
worse.
"""

from __future__ import annotations

import re
from collections import Counter

from kvopt.mutate.validity import Rejection
from kvopt.mutate.vocabulary import starts_imperative

SHORTEST, LONGEST = 0.4, 2.5
"""Allowed length of a paraphrase, relative to the original."""
LEAST_SHARED = 0.25
"""Share of the original's content words (first five letters) that must come back."""
LEAST_SHARED_CLOSE, MOST_NEW_CLOSE = 0.6, 0.4
"""For rewrites by a small model: more must come back, and new content words are at most this share of the original's.
SmolLM2-135M turns "Use at most fifteen words" into "You can use a lot of words", and instructions into statements
about the function that they speak of; these limits refuse both.
"""
BOUNDS = {
    "upper": re.compile(
        r"\b(at most|(no|not) more than|up to|fewer than|less than|under|below|maximum|no longer than)\b", re.I
    ),
    "lower": re.compile(r"\b(at least|(no|not) (fewer|less) than|(?<!no )(?<!not )more than|minimum)\b", re.I),
    "exact": re.compile(r"\b(exactly|precisely)\b", re.I),
}

CHATTER = re.compile(
    r"^\W*(here (is|are|'s)|here’s|sure\b|certainly|of course|okay|ok[,.! ]|i (can|will|would|have|am|'m)\b|i['’]m|as an ai|rewritten|rewrite|paraphrased?|sentence|output:|"  # noqa: E501
    r"answer:|assistant:|user:|the (rewritten|paraphrased)|this (sentence|text|version)|in other words|another way)|\b(rewritten|paraphrased) (sentence|text|version)|"  # noqa: E501
    r"let me know|i hope this|the original (text|sentence)",
    re.I,
)  # fmt: skip
NEGATION = re.compile(
    r"\b(not|no|never|without|nothing|none|neither|nor|avoid|refrain|omit|exclude|except|leave out|skip|cannot|ignore|disregard|only|just|solely|"  # noqa: E501
    r"exclusively|alone)\b|n['’]t\b",
    re.I,
)
RESTRICTS = {"only", "just", "solely", "exclusively", "alone"}
NUMBER_WORDS = re.compile(
    r"\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|eighteen|twenty|thirty|fifty|hundred|single|once|twice|first|second|third|both|half)\b",
    re.I,
)
SMALL = frozenset(re.findall(r"\w+", """
    the and for with that this from you your are was were will must should have has had can may its into out any
    all each every not but one what which who when where how than then them they their there here please make
    sure using use of
"""))  # fmt: skip


def content_words(text: str) -> set[str]:
    """The first five letters of words that carry meaning."""
    return {word.removesuffix("s")[:5] for word in re.findall(r"[a-z]{3,}", text.lower()) if word not in SMALL}


def sanity(original: str, paraphrase: str, *, close: bool = False) -> Rejection | None:
    """None, or why the paraphrase of a sentence or text is refused; ``close`` asks for more, as a small model needs.

    Marks are compared elsewhere.
    """
    text = paraphrase.strip()
    if not text:
        return Rejection("empty", "no paraphrase")
    ratio = len(text) / max(1, len(original.strip()))
    if not SHORTEST <= ratio <= LONGEST:
        return Rejection("sanity-length", f"{ratio:.2f} times the original's length")
    if (match := CHATTER.search(text)) and not CHATTER.search(original):
        return Rejection("sanity-chatter", match[0].strip())
    return _repetition(original, text) or _meaning(original, text, close) or _shape(original, text)


def _repetition(original: str, text: str) -> Rejection | None:
    words = text.lower().split()
    for size, limit in ((1, 3), (3, 2)):
        runs = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
        before = original.lower()
        for run, count in runs.items():
            joined = " ".join(run)
            if size == 1 and not any(words[i : i + limit] == [joined] * limit for i in range(len(words))):
                continue
            if count >= limit and before.count(joined) < count:
                return Rejection("sanity-repetition", joined)
    if re.search(r"\b(\w+) \1\b", text, re.I) and not re.search(r"\b(\w+) \1\b", original, re.I):
        return Rejection("sanity-repetition", "a word twice in a row")
    return None


def _polarity(text: str) -> tuple[int, bool]:
    """Number of negating words, and whether anything is restricted to "only"."""
    words = [match[0].lower() for match in NEGATION.finditer(text)]
    negating = [word for word in words if word not in RESTRICTS]
    return len(negating), len(negating) < len(words)


def _meaning(original: str, text: str, close: bool) -> Rejection | None:
    (before, restricted), (after, still) = _polarity(original), _polarity(text)
    if before != after:
        return Rejection("sanity-negation", f"{after} negations instead of {before}")
    if restricted != still:
        return Rejection("sanity-negation", "'only' was lost" if restricted else "'only' was added")
    numbers, others = ({w.lower() for w in NUMBER_WORDS.findall(t)} for t in (original, text))
    if numbers - {"single"} != others - {"single"}:
        return Rejection("sanity-numbers", ", ".join(sorted(numbers ^ others)))
    for name, bound in BOUNDS.items():
        if bool(bound.search(original)) != bool(bound.search(text)):
            return Rejection("sanity-numbers", f"another {name} bound")
    words, now = content_words(original), content_words(text)
    if words and len(words & now) / len(words) < (LEAST_SHARED_CLOSE if close else LEAST_SHARED):
        return Rejection("sanity-drift", "too few words of the original are left")
    if close and len(now - words) > max(1, MOST_NEW_CLOSE * len(words)):
        return Rejection("sanity-drift", "too many new words")
    if close and starts_imperative(original) and re.match(r"(the|this|that|it|there|a|an)\b", text, re.I):
        return Rejection("sanity-drift", "a statement instead of an instruction")
    return None


def _shape(original: str, text: str) -> Rejection | None:
    if "?" in text and "?" not in original:
        return Rejection("sanity-shape", "a question instead of an instruction")
    if original.rstrip()[-1:] in tuple(".!?") and text[-1] not in ".!?\"'”’)`" and not ord(text[-1]) >= 0xF0000:
        return Rejection("sanity-truncated", "it does not end")
    if text.count("(") != text.count(")") or text.count('"') % 2 != original.count('"') % 2:
        return Rejection("sanity-truncated", "a bracket or quote is left open")
    if text.count("\n") > original.count("\n") + 2 or (
        re.search(r"[=<>#*|_]{2,}", text) and not re.search(r"[=<>#*|_]{2,}", original)
    ):
        return Rejection("sanity-shape", "layout that the original has not")
    return None
