"""Words that operators and protection share: section headings, emphasis, verbs that begin instructions, words that
point elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


EMPHASIS = _words(
    """
    NOT NEVER ALWAYS MUST SHOULD ONLY DO DON IMPORTANT NOTE WARNING ALL ANY EACH EVERY NO AND OR ARE IS YOU YOUR
    THE BE IF SHALL CAREFULLY EXACTLY
    """
)
"""Capitals that stress a word and are no labels."""


@dataclass(frozen=True)
class Headings:
    """Section headings in groups that mean the same."""

    groups: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for group in self.groups for name in group)

    @property
    def words(self) -> frozenset[str]:
        return frozenset(word for name in self.names for word in name.split())

    def others(self, name: str) -> list[str]:
        """Other names for the heading ``name`` (lower case)."""
        return [other for group in self.groups if name in group for other in group if other != name]


HEADINGS = Headings(
    (
        ("rules", "guidelines", "requirements", "rules to follow", "what to observe"),
        ("instructions", "directions", "what to do", "how to proceed"),
        ("task", "your task", "the task", "task description"),
        ("role", "your role"),
        ("constraints", "restrictions", "limits"),
        ("output format", "response format", "format", "format of the answer", "answer format"),
        ("notes", "remarks"),
        ("note", "remark"),
        ("example", "sample"),
        ("examples", "samples"),
        ("steps", "procedure"),
        ("conventions", "style rules"),
        ("context", "background"),
        ("goal", "objective", "aim"),
        ("input",),
        ("output",),
        ("style", "tone"),
        ("important",),
        ("labels",),
        ("categories",),
        ("definitions",),
        ("intents",),
        ("style guide",),
    )
)

SECTION_TAGS = frozenset({"instructions", "rules", "guidelines", "task"})
"""XML-like tags that the section-tags operator writes; they are structure and no literals."""

IMPERATIVES = _words(
    """
    add adhere analyze annotate answer apply ask assign assume attempt avoid base begin be build capitalize
    check choose cite classify combine compare complete compose compute consider convert copy correct create
    decide define delete describe detect determine disregard divide draft edit emit employ end ensure enumerate
    evaluate exclude explain extract fill find focus follow format generate give guess highlight identify ignore
    include infer insert invent judge keep label leave limit list look make map mark match mention move name
    note omit order output paraphrase pick place predict prefer prepare preserve print produce provide put quote
    read recognize refer remove rename repeat replace reply report reproduce respond restrict return review
    rewrite say score select separate set show skip sort specify split start state stay stick stop study suggest
    summarize supply tag take tell think translate treat try use verify wrap write
    """
)
"""Verbs that begin an instruction."""

NOUN_LIKE = _words(
    """
    answer base build check copy draft edit end fill find focus format guess highlight judge label limit list
    look mark match mention move name note order output place print quote report reply review say score set show
    skip sort split start state stay stick stop study tag take tell try use map be return
    """
)
FOLLOWS_VERB = _words(
    """
    the a an only with in on each every any all one your their its it them exactly to at from by as no nothing
    just out up for that what which whether if sure care this these those not more how when where either both
    such using back into
    """
)

ANAPHORA = re.compile(
    r"\b(it|its|this|these|those|they|them|their|he|she|then|above|below|also|otherwise|however|instead|therefore|such|again|latter|former|"
    r"previous|next|first|second|third|finally|last|afterwards?|same|too|so|both|thus|hence|another|other|others|rest|here|there)\b",
    re.I,
)
"""Words that point to another sentence: a sentence with one does not stand alone."""

STARTS_DEPENDENT = re.compile(
    r"(it|its|this|these|those|they|them|their|then|also|otherwise|however|instead|therefore|thus|hence|but|and|or|so|if not|if so|finally|"  # noqa: E501
    r"next|after that|afterwards|in that case|in this case|in addition|for example|for instance|that is)\b",
    re.I,
)
REFERS_TO_NUMBER = re.compile(
    r"\b(step|rule|item|point|number|bullet|guideline)s? (\d|one|two|three|[\U000F0000-\U000FFFFD])|\b(in (this|that|the (given|following|same)) order|in order:|order matters)",  # noqa: E501
    re.I,
)


def starts_imperative(sentence: str) -> bool:
    """Whether ``sentence`` begins with a plain instruction ("Write the …"), by its first two words."""
    match = re.match(r"([A-Za-z]+)(?:[ \t]+(\S+))?", sentence)
    if not match or match[1].lower() not in IMPERATIVES or not match[2] or sentence[match.end(1)] not in " \t":
        return False
    verb, following = match[1].lower(), match[2].lower().strip(",.;:")
    if match[2][-1] in ":" or following in IMPERATIVES:
        return False
    if verb in NOUN_LIKE:
        return following in FOLLOWS_VERB or bool(
            re.match("[\U000f0000-\U000ffffd]", following) and verb not in {"end", "note", "state"}
        )
    return bool(re.match("[a-z\"“'\U000f0000-\U000ffffd]", match[2]))
