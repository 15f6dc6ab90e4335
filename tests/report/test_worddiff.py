"""Messages of two templates side by side: those of a shorter one stand beside what they were."""

from __future__ import annotations

from kvopt.report.worddiff import template_diff
from kvopt.task.template import Template

TURNS = (("It rains.", "weather"), ("A song, please.", "music"), ("Two books.", "book"))


def template(*turns: tuple[str, str], system: str | None = "Sort the message.") -> Template:
    messages = [{"role": "system", "content": system}] if system else []
    for user, answer in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return Template.from_messages([*messages, {"role": "user", "content": "{{text}}"}])


def shown(old: Template, new: Template) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(role, [(piece.kind, piece.text) for piece in pieces]) for role, pieces in template_diff(old, new)]


def test_turns_that_were_cut_are_gone_and_the_others_are_the_same() -> None:
    pairs = shown(template(*TURNS), template(TURNS[1]))
    assert pairs == [
        ("system", [("same", "Sort the message.")]),
        ("user", [("gone", "It rains.")]),
        ("assistant", [("gone", "weather")]),
        ("user", [("same", "A song, please.")]),
        ("assistant", [("same", "music")]),
        ("user", [("gone", "Two books.")]),
        ("assistant", [("gone", "book")]),
        ("user", [("same", "{{text}}")]),
    ]


def test_a_message_that_was_cut_inside_stands_beside_what_it_was() -> None:
    pairs = shown(template(*TURNS), template(("A song", "music"), system=None))
    assert ("user", [("same", "A song"), ("gone", ", please.")]) in pairs
    assert pairs[0] == ("system", [("gone", "Sort the message.")])
    assert pairs[-1] == ("user", [("same", "{{text}}")])


def test_messages_that_are_new_are_shown_as_new() -> None:
    pairs = shown(template(TURNS[0]), template(*TURNS[:2]))
    assert ("user", [("new", "A song, please.")]) in pairs
    assert ("user", [("same", "It rains.")]) in pairs
