"""Operators keep slots and literals on any text, and say what they are meant to say."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvopt.mutate.blocks import blocks, join
from kvopt.mutate.generators.rules import apply_operator
from kvopt.mutate.operator import RULE_FAMILIES, operators
from kvopt.mutate.spans import MARK, MarkError, compile_protect, find_spans, mask
from kvopt.task.template import SLOT, Template

PIECES = [
    "You are a careful assistant.",
    "Read the text and answer with one word.",
    "Do not add anything.",
    "Never invent names.",
    "Please write a summary.",
    "If the text is empty, return nothing.",
    "Don't repeat yourself.",
    "You must always copy the {raw} value.",
    "Rules:",
    "## TASK",
    "- Write one line.",
    "- Do not use “curly words” or 'single ones'.",
    "* Use `code {x}`;",
    "1. Choose one of: red, green, or blue.",
    "2. Keep 3.5% and $HOME, %s and %(a)d.",
    '{"key": "a b", "n": [1, 2]}',
    "AddToPlaylist, BookRestaurant, and snake_case",
    "```python\nx = {1: 2}\n```",
    "---",
    "Text: {{text}}",
    "{{text}}",
    "\\{{escaped}}",
    "{{other}} and {{text}}.",
    "日本語のテキスト。",
    "naïve café – ok",
    "<b>bold</b>",
    "{",
    "}}",
    "$",
    "% 100%",
    "http://a.b/c?d=1.",
    "NEVER do this!",
    "\U000f0000",
]
sources = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(alphabet="aB {}%$\"'`.:-\n1é\U000f0001", max_size=12)),
    min_size=1,
    max_size=10,
).flatmap(lambda parts: st.sampled_from([" ", "\n", "\r\n", "\n\n"]).map(lambda gap: gap.join(parts)))


@st.composite
def templates(draw: st.DrawFn) -> Template:
    first, second = draw(sources), draw(sources)
    if not SLOT.search(second) or all(m[1] for m in SLOT.finditer(second)):
        second += " {{text}}"
    if draw(st.booleans()):
        return Template.from_text(first + "\n" + second)
    return Template.from_messages([{"role": "system", "content": first}, {"role": "user", "content": second}])


def lost(template: Template, changed: Template) -> list[str]:
    """Literals of ``template`` that ``changed`` has less often, looked for as plain text."""
    before, after = "\n".join(template.fields), "\n".join(changed.fields)
    found = {source[span.start : span.end] for source in template.fields for span in find_spans(source)}
    return [
        literal for literal in found if after.count(literal) < before.count(literal) and not literal.strip().isdigit()
    ]


@settings(max_examples=150, deadline=None)
@given(sources)
def test_masking_and_blocks_give_the_text_back(source: str) -> None:
    field = mask(source, len(source))
    assert field.unmask(field.text) == source
    assert join(blocks(field.text)) == field.text


@settings(max_examples=150, deadline=None)
@given(templates(), st.sampled_from(["leading", "all"]), st.integers(0, 1000))
def test_every_operator_keeps_every_mark_and_slot(template: Template, scope: str, seed: int) -> None:
    for operator in operators().values():
        changed = apply_operator(
            operator, template, scope, (), Random(seed)
        )  # raises MarkError for a lost or doubled mark
        if changed is None:
            continue
        assert Counter(changed.slot_sequence) == Counter(template.slot_sequence), operator.name
        assert not [one for one in lost(template, changed) if any(c in one for c in "{`<:/_")], operator.name
        if scope == "leading":
            assert "".join(changed.fields).split("{{")[-1] == "".join(template.fields).split("{{")[-1], operator.name


def run(name: str, text: str, *, times: int = 40) -> set[str]:
    """Every result of an operator over some seeds."""
    template = Template.from_messages([{"role": "system", "content": text}, {"role": "user", "content": "{{x}}"}])
    results = (apply_operator(operators()[name], template, "leading", (), Random(seed)) for seed in range(times))
    return {r.fields[0] for r in results if r}


CASES = [
    ("bullets-numbers", "- Write one.\n- Add none.", "1. Write one.\n2. Add none."),
    ("bullets-numbers", "1. Write one.\n2. Add none.", "- Write one.\n- Add none."),
    ("numbering-style", "1. Write one.\n2. Add none.", "(a) Write one.\n(b) Add none."),
    ("list-to-prose", "Rules:\n- Write a line.\n- Add no text", "Rules:\nWrite a line. Add no text."),
    ("list-to-prose", "Do this:\n- Write a line.\n- Add no text.", "Do this: Write a line. Add no text."),
    (
        "prose-to-list",
        "You are a clerk. Write a line. Add no text.",
        "You are a clerk.\n\n- Write a line.\n- Add no text.",
    ),
    ("rename-heading", "Rules:\n- Write a line.", "Guidelines:\n- Write a line."),
    ("drop-heading", "## Task\n\nWrite a line.", "Write a line."),
    ("add-heading", "- Write a line.\n- Add no text.", "Rules:\n- Write a line.\n- Add no text."),
    ("reorder-items", "- Write a line.\n- Add no text.", "- Add no text.\n- Write a line."),
    ("reorder-sentences", "Write the label. Do not add text.", "Do not add text. Write the label."),
    ("reorder-labels", "Use GetA or GetB.", "Use GetB or GetA."),
    ("inline-to-bullets", "One of: GetA, GetB, GetC.", "One of:\n- GetA\n- GetB\n- GetC"),
    ("bullets-to-inline", "One of:\n- GetA\n- GetB\n", "One of: GetA, GetB.\n"),
    ("split-paragraph", "Write a line. Add no text.", "Write a line.\n\nAdd no text."),
    ("join-paragraphs", "Write a line.\n\nAdd no text.", "Write a line. Add no text."),
    ("section-tags", "a b c d e f g h i j k l m", "<instructions>\na b c d e f g h i j k l m\n</instructions>"),
    ("clause-order", "If the text is empty, return nothing else.", "Return nothing else if the text is empty."),
    ("clause-order", "Return nothing else if the text is empty.", "If the text is empty, return nothing else."),
    ("bullet-mark", "- a\n- b", "• a\n• b"),
    ("indentation", "- a\n- b", "  - a\n  - b"),
    ("final-periods", "- Write a line.\n- Add no text.", "- Write a line\n- Add no text"),
    ("heading-style", "Rules:\n- a", "## Rules\n- a"),
    ("heading-case", "Rules:\n- a", "RULES:\n- a"),
    ("blank-lines", "Rules:\n\n- a", "Rules:\n- a"),
    ("loose-lists", "- a\n- b", "- a\n\n- b"),
    ("separators", "A b.\n\nC d.", "A b.\n\n---\n\nC d."),
    ("colon-dash", "- GetA: one\n- GetB: two", "- GetA — one\n- GetB — two"),
    ("dashes", "A word – and more.", "A word — and more."),
    ("quote-style", 'Say "two words" here.', "Say “two words” here."),
    ("apostrophes", "The user's text.", "The user’s text."),
    ("semicolons", "Write a line. Do not add text.", "Write a line; do not add text."),
    ("split-semicolons", "Write a line; do not add text.", "Write a line. Do not add text."),
    ("emphasis", "Do not add text.", "**Do not** add text."),
    ("emphasis", "Write it. NEVER add text.", "Write it. Never add text."),
    ("list-comma", "red, green, and blue", "red, green and blue"),
    ("sentence-spacing", "Write a line. Add text.", "Write a line.\nAdd text."),
    ("contract", "You cannot do what is not said.", "You can't do what isn't said."),
    ("expand", "Don't do what isn't said; you can't.", "Do not do what is not said; you cannot."),
    ("add-please", "Write a line.", "Please write a line."),
    ("drop-please", "Please write a line.", "Write a line."),
    ("negation", "Do not add text.", "Never add text."),
    ("negation", "Do not add text.", "Avoid adding text."),
    ("to-declarative", "Write the line.", "You should write the line."),
    ("to-declarative", "Never write text.", "You must never write text."),
    ("to-imperative", "You must not write text.", "Do not write text."),
    ("framing", "You are a clerk. Write a. Add b. End c.", "You are a clerk. Work carefully. Write a. Add b. End c."),
    ("role", "You are a clerk.", "Act as a clerk."),
    ("task-phrase", "Your task is to write a line.", "Your job is to write a line."),
    ("synonyms", "Return the label at most once.", "Output the label no more than once."),
]


@pytest.mark.parametrize(("name", "before", "after"), CASES)
def test_operator_writes_what_it_should(name: str, before: str, after: str) -> None:
    assert after in run(name, before, times=200)


def test_every_operator_but_those_on_slots_has_a_case() -> None:
    assert set(operators()) - {name for name, *_ in CASES} == {"label-break"}
    assert {operator.family for operator in operators().values()} == set(RULE_FAMILIES)


def test_label_break_moves_a_slot_but_not_a_fence() -> None:
    operator = operators()["label-break"]
    changed = apply_operator(operator, Template.from_text("Text: {{x}}"), "leading", (), Random(0))
    assert changed is not None
    assert changed.text == "Text:\n{{x}}"
    assert apply_operator(operator, Template.from_text("Code:\n```\n{{x}}\n```"), "leading", (), Random(0)) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("reorder-items", "1. Open the file.\n2. Then read it."),
        ("reorder-items", "Rules:\n- Write a line.\n- It ends with a period."),
        ("reorder-sentences", "Write a line. End the line with a period."),
        ("bullets-numbers", "1. Write.\n2. Read.\n\nRepeat step 2."),
        ("to-declarative", "Answer: the label. Output format: text."),
        ("prose-to-list", "You are a clerk. Write a line. Then stop."),
        ("clause-order", "If a word is missing, leave it out."),
        ("quote-style", 'The keys are "intent" and "slots".'),
        ("synonyms", "The user may use it without asking."),
    ],
)
def test_operator_leaves_alone_what_it_would_break(name: str, text: str) -> None:
    assert run(name, text) == set()


def test_crlf_stays_crlf() -> None:
    for result in run("prose-to-list", "You are a clerk. Write a line. Add no text.\r\n\r\nMore text here.\r\n"):
        assert "\n" not in result.replace("\r\n", "")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Use `a b` and 12% or $5.", {"`a b`", "12%", "$5"}),
        ("1. One.\n2. Two of 3.", {"3"}),
        ('Keys "intent": x, say "two words".', {'"intent"', "two words"}),
        ("AddToPlaylist time_range JSON timeRange", {"AddToPlaylist", "time_range", "JSON", "timeRange"}),
        ("You MUST NOT. RULES:", set()),
        ("One of: red, green or blue.", {"red", "green", "blue"}),
        ('Give {"a": {"b": [1]}} now', {'{"a": {"b": [1]}}'}),
        ("See https://a.b/c, ok", {"https://a.b/c"}),
        ("It's the users' own, don't.", set()),
    ],
)
def test_literals_are_found(source: str, expected: set[str]) -> None:
    assert {source[s.start : s.end] for s in find_spans(source)} == expected


def test_user_literals_are_protected() -> None:
    protect = compile_protect(["make sure", r"re:gr[ae]y"])
    source = "Please make sure that gray and grey stay."
    assert [source[s.start : s.end] for s in find_spans(source, protect)] == ["make sure", "gray", "grey"]
    template = Template.from_text("You make sure to read the rules, for example the first. {{x}}")

    def changed(protect: tuple[re.Pattern[str], ...]) -> list[str]:
        made = [apply_operator(operators()["synonyms"], template, "leading", protect, Random(i)) for i in range(30)]
        return [one.fields[0] for one in made if one is not None]

    assert any("make sure" not in text for text in changed(()))
    assert len(changed(protect)) > 20
    assert all("make sure" in text for text in changed(protect))


@pytest.mark.parametrize("broken", ["", "a", "{0}{0}", "{0}\U000f0007"])
def test_a_lost_doubled_or_invented_mark_is_an_error(broken: str) -> None:
    field = mask("Use {{x}}", 9)
    mark = field.text[-1]
    with pytest.raises(MarkError):
        field.unmask(broken.format(mark))
    assert MARK[1] == "\U000f0000"
