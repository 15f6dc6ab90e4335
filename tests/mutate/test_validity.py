"""Every reason to refuse a candidate, and the faults of other prompt optimizers that must not come back."""

from __future__ import annotations

import pytest

from kvopt.mutate.sanity import sanity
from kvopt.mutate.spans import compile_protect
from kvopt.mutate.validity import Checker, check_slots
from kvopt.task.template import Template

TEXT = 'Label {{text}} as one of: good, bad.\nUse {"label": 1} and $HOME, 5% for "two words" by AddToPlaylist. {{n}}'


def ids(template: Template) -> tuple[int, ...]:
    return tuple("".join(template.fields).lower().encode())


def reason(
    candidate: str,
    original: str = TEXT,
    *,
    scope: str = "all",
    protect: tuple[str, ...] = (),
    window: int | None = None,
) -> str | None:
    checker = Checker(Template.from_text(original), scope, compile_protect(protect), ids, window)
    checker.remember(Template.from_text("Seen {{text}} already. {{n}}"), "m001")
    rejection = checker.check(Template(text=candidate))
    return rejection.reason if rejection else None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("Label {{text}}", "Label it"), "lost-slot"),
        (("{{text}}", "{{text}} {{text}}"), "duplicated-slot"),
        (("{{text}}", "{{text}} {{user}}"), "invented-slot"),
        (("{{text}}", "{{input}}"), "renamed-slot"),
        (("{{text}}", "{{ text"), "lost-slot"),
        (("{{text}}", "{text}"), "lost-slot"),
        (("{{text}}", "\\{{text}}"), "lost-slot"),
        (("good, bad", "good, worse"), "changed-literal"),
        (('"label"', '"Label"'), "changed-literal"),
        (("5%", "6%"), "changed-literal"),
        (("5%", "5 percent"), "changed-literal"),
        (("$HOME", "HOME"), "changed-literal"),
        (("AddToPlaylist", "add to playlist"), "changed-literal"),
        (("AddToPlaylist", "AddToPlaylist and RateBook"), "changed-literal"),
        (("two words", "some words"), "changed-literal"),
        (("Use", "Use {"), "changed-literal"),
        (("Use", "Use %s"), "changed-literal"),
        (("Use", "Please use"), None),
        (("", ""), "equal-to-original"),
        (("Label", "LABEL"), "changed-literal"),
        (("Use", "USe"), "changed-literal"),
    ],
)
def test_reason(change: tuple[str, str], expected: str | None) -> None:
    assert reason(TEXT.replace(*change, 1) if change[0] else TEXT) == expected


def test_slots_in_another_order_are_refused() -> None:
    assert reason("Use {{b}} and {{a}} here.", "Use {{a}} and {{b}} here.") == "slot-order"
    one = Template.from_messages([{"role": "system", "content": "A {{a}}"}, {"role": "user", "content": "B {{b}}"}])
    other = one.with_fields(["A {{a}} {{b}}", "B"])
    rejection = check_slots(one, other)
    assert rejection is not None
    assert rejection.reason == "slot-order"


def test_an_empty_candidate_is_refused() -> None:
    assert reason("{{text}}{{n}}") == "empty"
    chat = Template.from_messages([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{x}}"}])
    rejection = Checker(chat).check(chat.with_fields(["  ", "{{x}}"]))
    assert rejection is not None
    assert rejection.reason == "empty"


def test_equal_token_ids_are_refused_even_when_the_text_differs() -> None:
    assert reason("write {{x}} now", "Write {{x}} now") == "equal-to-original"
    checker = Checker(Template.from_text("Write {{x}} now"), "all", (), ids)
    checker.remember(Template.from_text("Please write {{x}} now"), "m001")
    rejections = [checker.check(Template(text=text)) for text in ("Please write {{x}} now", "please Write {{x}} now")]
    assert [r.reason if r else None for r in rejections] == ["duplicate", "duplicate-tokens"]


def test_too_long_for_the_window_is_refused() -> None:
    assert reason("Please write {{x}} now", "Write {{x}} now", window=10) == "over-window"
    assert reason("Please write {{x}} now", "Write {{x}} now", window=100) is None


def test_text_behind_the_first_slot_is_out_of_scope() -> None:
    assert reason("Read {{x}} now, please", "Read {{x}} now", scope="leading") == "changed-outside-scope"
    assert reason("Please read {{x}} now", "Read {{x}} now", scope="leading") is None
    assert reason("Read {{x}} now, please", "Read {{x}} now", scope="all") is None
    assert reason("{{x}} yes", "{{x}} now", scope="leading") == "changed-outside-scope"
    assert reason("Do {{x}} yes {{y}}", "Do {{x}} now {{y}}", scope="leading") == "changed-outside-scope"


def test_the_users_literals_are_checked() -> None:
    assert reason("Read the note {{x}}", "Read the memo {{x}}") is None
    assert reason("Read the MEMO {{x}}", "Read the note {{x}}", protect=("MEMO",)) == "changed-literal"
    assert reason("Read the note {{x}}", "Read the memo {{x}}", protect=("memo",)) == "changed-literal"
    assert reason("Read the memo twice, the memo {{x}}", "Read the memo {{x}}", protect=(r"re:mem\w",)) is None


def test_a_literal_may_not_come_more_often_than_before() -> None:
    text = "Answer AddToPlaylist or BookIt for {{x}}"
    assert reason("Answer AddToPlaylist or AddToPlaylist or BookIt for {{x}}", text) == "changed-literal"
    assert reason("Answer memo, memo for {{x}}", "Answer memo, note for {{x}}") is None, "words may"
    listed = "Labels: Weather, Book, Music. Sort {{x}}"
    for text in ("Labels: Weather, Book, Weather, Music. Sort {{x}}", "Labels: Weather, Book, Music. Sort Book {{x}}"):
        assert reason(text, listed) == "changed-literal", "labels of a list are no words of the sentence"


def test_a_numbered_list_is_structure_not_literals() -> None:
    assert reason("- Write.\n- Read 2 words.\n{{x}}", "1. Write.\n2. Read 2 words.\n{{x}}") is None
    assert reason("- Write.\n- Read words.\n{{x}}", "1. Write.\n2. Read 2 words.\n{{x}}") == "changed-literal"


def test_a_brace_in_a_candidate_never_costs_the_users_input() -> None:
    """Filling with str.format raises on ``{"label": 1}``; here the input is in the prompt, once, whatever it holds."""
    template = Template.from_text('Give {"label": {x}} %s $1 for {{text}}')
    filled = template.fill({"text": "{{text}} {0} %s"})
    assert filled == 'Give {"label": {x}} %s $1 for {{text}} {0} %s'


@pytest.mark.parametrize(
    ("original", "paraphrase", "expected"),
    [
        ("Write one short line about it.", "Write a brief line about it.", None),
        ("Write one short line about it.", "Here is a line about it, one short line.", "sanity-chatter"),
        ("Write one short line about it.", "Write.", "sanity-length"),
        ("Write one short line about it.", "Write one line line about it short.", "sanity-repetition"),
        ("Do not write about the weather.", "Write about the weather of today.", "sanity-negation"),
        ("Write about the weather now.", "Never write about the weather.", "sanity-negation"),
        ("Return only the label of it.", "Return the label of it now.", "sanity-negation"),
        ("Write two lines about weather.", "Write three lines about weather.", "sanity-numbers"),
        ("Write about the weather today.", "Cats and dogs are nice pets.", "sanity-drift"),
        ("Write about the weather today.", "Write about the weather and", "sanity-truncated"),
        ("Write about the weather today.", "Write about the weather (today.", "sanity-truncated"),
        ("Write about the weather today.", "What about the weather today?", "sanity-shape"),
        ("Write about the weather today.", "Write the weather.\n\n\nBest weather today.", "sanity-shape"),
        ("Write about the weather today.", "  ", "empty"),
    ],
)
def test_sanity_of_a_paraphrase(original: str, paraphrase: str, expected: str | None) -> None:
    rejection = sanity(original, paraphrase)
    assert (rejection.reason if rejection else None) == expected


@pytest.mark.parametrize(
    ("original", "paraphrase", "expected"),
    [
        ("Use at most fifteen words.", "Use at least fifteen words.", "sanity-numbers"),
        ("Use at most fifteen words.", "You can use a lot of words.", "sanity-numbers"),
        ("Do not use backticks or Markdown.", "You are not allowed to use backslashes or Markdown.", "sanity-drift"),
        (
            "Read the function and write its first line.",
            "The function reads and writes its first line.",
            "sanity-drift",
        ),
        ("Do not repeat the signature.", "Do not repeat the signature in the answer, text or code.", "sanity-drift"),
        ("Do not repeat the signature.", "Never repeat the signature.", None),
    ],
)
def test_a_small_models_rewrite_must_stay_close(original: str, paraphrase: str, expected: str | None) -> None:
    rejection = sanity(original, paraphrase, close=True)
    assert (rejection.reason if rejection else None) == expected
