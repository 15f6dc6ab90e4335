"""A template taken apart into pieces that can be cut: nothing is lost in any script, and what must stay stays."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvopt.base.loading import Base
from kvopt.mutate.spans import compile_protect
from kvopt.shorten.pieces import Pieces, take_apart
from kvopt.task.examples import Example
from kvopt.task.seam import Encoder
from kvopt.task.template import Slot, Static, Template, parse
from tests.tiny import tiny_base

ROW = Example("train:0", {"text": "play a song", "more": "now"}, '{"label": "music"}', "train.jsonl:1")
ENGLISH = "Sort the message. Use one label:\n\n- weather: rain, snow (or wind)\n- music: a song\n\nAnswer with JSON.\n"
OTHERS = (
    "将消息分类。只写一个标签：天气、音乐、书。不要解释。",
    "संदेश को छाँटें। केवल एक लेबल लिखें: मौसम, संगीत। कुछ और न लिखें।",
    "จัดประเภทข้อความ ตอบเพียงคำเดียว",
    "Sort 🙂🏳️‍🌈 the\tmessage;  keep   spaces\r\nand lines \\{{not_a_slot}} — {braces} 100%.",
)


def chat(*contents: str) -> Template:
    """A system message, pairs of a user's message and the answer, and the user's message with the slot."""
    roles = ["system", *["user", "assistant"] * ((len(contents) - 1) // 2), "user"]
    messages = zip(roles, (*contents, "{{text}}"), strict=True)
    return Template.from_messages([{"role": role, "content": content} for role, content in messages])


def apart(base: Base, template: Template, **options: object) -> Pieces:
    encoder = Encoder(base.tokenizer)
    prefix = encoder.encode(template, [ROW, Example("train:1", {"text": "x", "more": "y"}, "z", "")]).prefix
    return take_apart(template, ROW, encoder, prefix, **options)  # type: ignore[arg-type]


def leading_statics(template: Template) -> list[str]:
    """The static texts before the first slot."""
    texts = []
    for source in template.fields:
        for part in parse(source):
            if isinstance(part, Slot):
                return texts
            texts.append(part.text)
    return texts


@pytest.mark.parametrize("text", [ENGLISH, *OTHERS])
def test_pieces_are_the_text_before_the_first_slot_without_what_merges_with_it(base: Base, text: str) -> None:
    has_chat = base.tokenizer.chat_template is not None
    template = chat(text) if has_chat else Template.from_text(text + " {{text}} and {{more}}")
    pieces = apart(base, template)
    whole = "".join(map(pieces.text, range(len(pieces))))
    [static] = leading_statics(template)
    assert whole
    assert whole in static  # a chat template may trim it, and the last token may be part of the body
    assert len(static) - len(whole) <= 6
    assert pieces.written(range(len(pieces))) == template
    places = [place for tokens in pieces.tokens for place in tokens]
    assert places == sorted(set(places))
    assert max(places) < len(pieces.prefix)


@given(st.data())
def test_a_cut_text_is_the_template_without_the_pieces(data: st.DataObject) -> None:
    base = tiny_base("llama")
    template = chat(data.draw(st.sampled_from([ENGLISH, *OTHERS])))
    pieces = apart(base, template)
    kept = data.draw(st.sets(st.sampled_from(range(len(pieces))), min_size=1))
    shorter = pieces.written(kept)
    outside = leading_statics(template)[0].replace("".join(map(pieces.text, range(len(pieces)))), "\x00")
    expected = outside.replace("\x00", "".join(pieces.text(i) for i in sorted(kept)))
    assert [part.text for part in parse(shorter.fields[0]) if isinstance(part, Static)] == [expected]
    assert shorter.fields[1:] == template.fields[1:]


@pytest.mark.parametrize("level", ["paragraph", "sentence", "phrase", "word", "token"])
def test_units_of_a_level_hold_every_piece_once(llama: Base, level: str) -> None:
    pieces = apart(llama, chat(ENGLISH))
    assert [i for unit in pieces.at(level) for i in unit] == list(range(len(pieces)))


def test_units_are_what_a_reader_would_call_so(llama: Base) -> None:
    pieces = apart(llama, chat(ENGLISH))

    def texts(level: str) -> list[str]:
        return ["".join(map(pieces.text, unit)).strip() for unit in pieces.at(level)]

    assert {"Sort the message.", "- music: a song", "Answer with JSON."} <= set(texts("sentence"))
    assert {"rain,", "snow", "(or wind)"} <= set(texts("phrase"))
    assert {"weather:", "message."} <= set(texts("word"))


def test_pairs_of_messages_go_together(llama: Base) -> None:
    pieces = apart(llama, chat("Sort.", "It rains.", "weather", "A song.", "music"))
    [first, second] = pieces.at("messages")
    assert "".join(map(pieces.text, first)) == "It rains.weather"
    everything = set(range(len(pieces)))
    without_first = everything - set(first)
    assert [m.role for m in pieces.written(without_first).messages] == ["system", "user", "assistant", "user"]
    assert pieces.whole_messages(without_first)
    answer = [i for i in first if pieces.pieces[i].field == 2]
    assert not pieces.whole_messages(everything - set(answer))  # a question without its answer
    assert [m.role for m in pieces.written(set(second)).messages] == ["user", "assistant", "user"]


def test_marked_and_needed_literals_stay(llama: Base) -> None:
    text = 'Say "music" or "snow" in BigLetters. Never mention the price. Write "music" once.'
    protect = compile_protect(["the price"])
    pieces = apart(llama, chat(text), protect=protect, gold_texts=['{"label": "music"}', "BigLetters"])
    why = {literal.text: literal.why for literal in pieces.literals}
    assert why == {'"music"': "in gold outputs", '"snow"': "", "BigLetters": "in gold outputs", "the price": "marked"}
    everything = set(range(len(pieces)))

    def without(pattern: str, occurrence: int = 0) -> set[int]:
        [*spans] = re.finditer(pattern, text)
        start, end = spans[occurrence].span()
        return {i for i in everything if not (pieces.pieces[i].start < end and pieces.pieces[i].end > start)}

    assert pieces.allowed(everything)
    assert pieces.allowed(without('"snow"'))
    assert pieces.allowed(without('"music"'))
    assert pieces.allowed(without('"music"', 1))
    assert not pieces.allowed(without('"music"') & without('"music"', 1))
    assert not pieces.allowed(without("price"))
    assert not pieces.allowed(without("Letters"))
    assert pieces.broken(without('"snow"')) == [('"snow"', "cut")]
    assert pieces.broken(without("now")) == [('"snow"', "broken")]
    every = apart(llama, chat(text), literals="all")
    assert {literal.why for literal in every.literals} == {"in gold outputs"}
    assert not every.allowed(without('"snow"'))
