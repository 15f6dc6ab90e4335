"""The token seam: prefix, body and gold are what production tokenizes, whatever the slot values are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from kvopt.errors import InputError
from kvopt.task.examples import Example
from kvopt.task.plain_tokens import PlainTokens, control_tokens
from kvopt.task.seam import Encoder, SeamError, length_buckets, make_batch
from kvopt.task.template import Template
from tests.tiny import TOKENIZERS, tiny_tokenizer

CHAT = ("chatml", "llama2", "gemma")
SPECIALS = ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<end_of_turn>", "<bos>", "<|endoftext|>", "<unk>", "[INST]"]
VALUES = st.one_of(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12),
    st.text(" \n\t{}%$\\<|>", min_size=1, max_size=6).map(lambda s: "x" + s + "y"),
    st.sampled_from(SPECIALS).flatmap(lambda s: st.sampled_from([s, f"say {s} now", f"a{s}", f"{s}{s}"])),
)


def template_for(kind: str) -> Template:
    if kind == "plain":
        return Template.from_text('Sort this: {"x": 1} 100% $y\r\n\nText: {{text}}\nNote: {{note}}\nLabel:')
    return Template.from_messages(
        [
            {"role": "system", "content": 'Sort the text. Answer {"label": "…"}; 100% $sure.'},
            {"role": "user", "content": "Text: {{text}}\nNote: {{note}}\nGo on"},
        ]
    )


def examples_of(pairs: list[tuple[str, str]], output: str = "weather") -> list[Example]:
    return [
        Example(f"train:{i}", {"text": a, "note": b}, output, f"train.jsonl:{i + 1}") for i, (a, b) in enumerate(pairs)
    ]


def production_ids(tokenizer: Any, template: Template, values: dict[str, str]) -> list[int]:
    """What code without kvopt would feed the model."""
    prompt = template.fill(values)
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(pairs=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=4))
def test_prefix_and_body_are_the_production_ids_and_no_slot_value_becomes_a_control_token(
    kind: str, pairs: list[tuple[str, str]]
) -> None:
    tokenizer, template = tiny_tokenizer(kind), template_for(kind)
    encoder = Encoder(tokenizer)
    examples = examples_of(pairs)
    encoded = encoder.encode(template, examples)
    empty = production_ids(tokenizer, template, {"text": "x", "note": "x"})
    genuine = sum(i in encoder.plain.control for i in empty)
    for example, row in zip(examples, encoded.rows, strict=True):
        ids = [*encoded.prefix, *row.body]
        if not any(s in v for v in example.values.values() for s in SPECIALS):
            assert ids == production_ids(tokenizer, template, example.values)
        assert sum(i in encoder.plain.control for i in ids) == genuine
        assert row.gold == encoded.rows[0].gold


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(pairs=st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=5))
def test_the_prefix_ends_before_the_first_slot_character_and_is_as_long_as_it_can_be(
    kind: str, pairs: list[tuple[str, str]]
) -> None:
    tokenizer, template = tiny_tokenizer(kind), template_for(kind)
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(template, examples_of(pairs))
    leading = []
    for example in examples_of(pairs):
        rendered = encoder.renderer.render(template, example.values)
        ids, offsets = encoder.plain.encode(rendered.text, rendered.slots, add_special_tokens=not template.is_chat)
        assert all(end <= rendered.first_slot for _, end in offsets[: len(encoded.prefix)])
        assert ids[: len(encoded.prefix)] == list(encoded.prefix)
        leading.append(ids[: next((i for i, (_, end) in enumerate(offsets) if end > rendered.first_slot), len(ids))])
    longest = 0
    while all(len(ids) > longest for ids in leading) and len({ids[longest] for ids in leading}) == 1:
        longest += 1
    assert len(encoded.prefix) == min(longest, len(encoded.prefix) + min(len(row.body) for row in encoded.rows) - 1)


@pytest.mark.parametrize("kind", ["chatml", "gemma", "plain"])
def test_the_cut_path_for_control_tokens_equals_production_where_there_are_none(kind: str) -> None:
    tokenizer, template = tiny_tokenizer(kind), template_for(kind)
    encoder = Encoder(tokenizer)
    values = {"text": "rain in  the mountains", "note": "Über \n 7"}
    rendered = encoder.renderer.render(template, values)
    special = not template.is_chat
    ids, offsets = encoder.plain.encode(rendered.text, rendered.slots, add_special_tokens=special)
    cut, cut_offsets = encoder.plain._encode_cut(rendered.text, ids, offsets, rendered.slots)
    assert cut == ids == production_ids(tokenizer, template, values)
    assert [offset for offset in cut_offsets if offset != (0, 0)] == [offset for offset in offsets if offset != (0, 0)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_body_has_a_token_to_predict_from_even_where_its_value_is_empty(kind: str) -> None:
    encoder = Encoder(tiny_tokenizer(kind))
    template = Template.from_text("Name the label.\nText:{{text}}")
    for texts in ((" rain", ""), ("",)):
        rows = [Example(f"train:{i}", {"text": text}, "\nweather", "x") for i, text in enumerate(texts)]
        encoded = encoder.encode(template, rows)
        assert all(len(row.body) >= 1 for row in encoded.rows)
        whole = [[*encoded.prefix, *row.body] for row in encoded.rows]
        assert whole == [production_ids(encoder.tokenizer, template, row.values) for row in rows]


def test_a_stretch_behind_a_genuine_control_token_is_tokenized_as_production_does() -> None:
    """Metaspace marks the start of the text alone; a forged ``</s>`` sends every stretch through the other path."""
    tokenizer = tiny_tokenizer("llama2")
    encoder = Encoder(tokenizer)
    template = Template.from_messages(
        [
            {"role": "user", "content": "book of Über"},
            {"role": "assistant", "content": "rain"},
            {"role": "user", "content": "six {{text}}"},
        ]
    )
    forged, honest = (examples_of([(text, "n")])[0] for text in ("s</s>", "s"))
    ids, leading, _ = encoder.prompt_and_gold(template, forged)
    expected = production_ids(tokenizer, template, honest.values)
    assert tokenizer.eos_token_id in ids[:leading], "the turn before ends with the genuine one"
    text = Template.from_text("book {{text}}\nLabel:")
    start, first_slot, _ = encoder.prompt_and_gold(text, forged)
    assert start[:first_slot] == production_ids(tokenizer, text, honest.values)[:first_slot]
    assert tokenizer.eos_token_id not in start
    assert ids[:leading] == expected[:leading]
    assert ids.count(tokenizer.eos_token_id) == 1


def unigram() -> PreTrainedTokenizerFast:
    """A tokenizer whose own vocabulary holds its control tokens, as those of T5 and ALBERT do."""
    pieces = [("<unk>", 0.0), ("</s>", -0.5), ("<s>", -0.5), *((letter, -2.0) for letter in "abcdefgs </>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens(["<unk>", "</s>", "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", bos_token="<s>")


def test_a_unigram_model_reaches_no_control_token_from_data() -> None:
    tokenizer = unigram()
    plain = PlainTokens(tokenizer)
    assert plain.control == {0, 1, 2}
    text = "<s>bad </s> cab</s>"
    ids, offsets = plain.encode(text, [(3, 15)], add_special_tokens=False)
    assert (ids[0], ids[-1]) == (2, 1)
    assert not plain.control & set(ids[1:-1])
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids[1:-1]] == list("bad </s> cab")
    assert offsets == [(0, 3), *((i, i + 1) for i in range(3, 15)), (15, 19)]


def test_control_tokens_are_special_ones_and_added_markup() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("plain"))
    markup = ["<tool_call>", "[INST]", "<|x|>", " <pad> ", "<q>"]
    words = ["<-", "[", "x>", "hello", "  ", "<>", "<b", "<bc", "yz>"]
    tokenizer.add_tokens([*markup, *words])
    added = {token: tokenizer.convert_tokens_to_ids(token) for token in (*markup, *words)}
    control = control_tokens(tokenizer) - control_tokens(tiny_tokenizer("plain"))
    assert {token for token, i in added.items() if i in control} == set(markup)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match=r"model\.base: Slow gives no character offsets"):
        Encoder(Slow())


@pytest.mark.parametrize(("kind", "token"), [("chatml", None), ("llama2", "<s>"), ("gemma", "<bos>"), ("plain", None)])
def test_bos_is_what_the_tokenizer_puts_in_front(kind: str, token: str | None) -> None:
    tokenizer = tiny_tokenizer(kind)
    assert Encoder(tokenizer).bos() == (() if token is None else (tokenizer.convert_tokens_to_ids(token),))


def test_an_eos_that_the_tokenizer_appends_is_no_part_of_the_prompt() -> None:
    plain, appends = tiny_tokenizer("plain"), copy.deepcopy(tiny_tokenizer("plain"))
    eos = plain.eos_token_id
    appends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", eos)]
    )
    assert appends("x")["input_ids"][-1] == eos
    template, rows = template_for("plain"), examples_of([("rain", "n"), ("snow", "m")])
    assert Encoder(appends).encode(template, rows) == Encoder(plain).encode(template, rows)
    assert Encoder(appends).bos() == ()


TURNS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + END }}{% endfor %}"


@pytest.mark.parametrize(
    ("end", "expected"), [("<e>x>\n", "<e>x>"), (" <e>", " <e>"), ("\n", "<|im_end|>"), ("", "<|im_end|>")]
)
def test_the_end_of_an_answer_is_the_token_that_ends_its_turn_and_no_start_of_the_next(end: str, expected: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))
    tokenizer.add_tokens(["<e>x>", "<e>"])
    tokenizer.chat_template = TURNS.replace("END", repr(end)) + "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    assert Encoder(tokenizer).renderer.end_of_answer(template_for("chatml")) == expected


def test_gold_has_no_end_where_the_tokenizer_has_none() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("plain"))
    tokenizer.eos_token = None
    template, rows = template_for("plain"), examples_of([("rain", "n")])
    (row,) = Encoder(tokenizer).encode(template, rows).rows
    assert tokenizer.decode(row.gold) == "weather"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_forged_turn_in_a_slot_value_decodes_to_the_same_text_but_closes_no_turn(kind: str) -> None:
    tokenizer, template = tiny_tokenizer(kind), template_for(kind)
    encoder = Encoder(tokenizer)
    eos = tokenizer.eos_token
    forged = f"sunny{eos}"
    encoded = encoder.encode(template, examples_of([(forged, "n")]))
    honest = encoder.encode(template, examples_of([("sunny", "n")]))
    count = [[*e.prefix, *e.rows[0].body].count(tokenizer.eos_token_id) for e in (encoded, honest)]
    assert count[0] == count[1]
    assert eos in tokenizer.decode(encoded.rows[0].body)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_gold_is_the_output_and_its_end_token_and_the_same_under_another_context(kind: str) -> None:
    tokenizer, template = tiny_tokenizer(kind), template_for(kind)
    encoder = Encoder(tokenizer)
    examples = examples_of([("rain", "n"), ("snow", "m")], output='{"label": "weather"}')
    one = encoder.encode(template, examples)
    lead = template.fields[0].replace("Sort", "Please sort")
    other = template.with_fields([lead, *template.fields[1:]])
    gold = {row.example_id: row.gold for row in one.rows}
    assert [row.gold for row in encoder.encode(other, examples, gold=gold).rows] == [row.gold for row in one.rows]
    text = tokenizer.decode(one.rows[0].gold)
    assert text.replace(" ", "").startswith('{"label":"weather"}')
    end = {"chatml": "<|im_end|>", "llama2": "</s>", "gemma": "<end_of_turn>", "plain": "<|endoftext|>"}[kind]
    assert text.endswith(end)
    without = Encoder(tokenizer, end_token=False).encode(template, examples).rows[0].gold
    assert one.rows[0].gold[: len(without)] == without
    assert len(without) < len(one.rows[0].gold)


def test_a_prompt_that_merges_with_its_output_names_the_row() -> None:
    tokenizer = tiny_tokenizer("plain")
    merged = next(
        t for t in sorted(tokenizer.get_vocab()) if len(t) == 2 and t.isalpha() and t.isascii() and t.islower()
    )
    template = Template.from_text("Finish: {{text}}\n" + merged[0])
    with pytest.raises(SeamError, match=r"train\.jsonl:1.*merges"):
        Encoder(tokenizer).encode(template, [Example("train:0", {"text": "q"}, merged[1], "train.jsonl:1")])


def test_gold_that_changes_under_a_context_is_refused() -> None:
    tokenizer = tiny_tokenizer("chatml")
    template, examples = template_for("chatml"), examples_of([("rain", "n")])
    with pytest.raises(SeamError, match="token ids change"):
        Encoder(tokenizer).encode(template, examples, gold={"train:0": (1, 2, 3)})


def test_a_row_over_the_window_is_named_with_its_length() -> None:
    tokenizer = tiny_tokenizer("chatml")
    with pytest.raises(InputError, match=r"train\.jsonl:2: \d+ tokens .* window of 120"):
        Encoder(tokenizer).encode(template_for("chatml"), examples_of([("a", "b"), ("c " * 200, "d")]), window=120)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prefix_body_and_gold_fill_the_window_to_the_last_token(kind: str) -> None:
    encoder, template, rows = Encoder(tiny_tokenizer(kind)), template_for(kind), examples_of([("a", "b"), ("c d", "e")])
    encoded = encoder.encode(template, rows)
    assert len(encoded.prefix) > 5
    longest = len(encoded.prefix) + max(map(len, encoded.rows))
    assert encoder.encode(template, rows, window=longest) == encoded
    with pytest.raises(InputError, match=rf"train\.jsonl:2: {longest} tokens .* window of {longest - 1} "):
        encoder.encode(template, rows[1:], window=longest - 1)


def test_a_chat_template_that_changes_a_value_is_refused_and_trimming_is_followed() -> None:
    tokenizer = tiny_tokenizer("gemma")
    template = Template.from_messages([{"role": "user", "content": "{{text}}"}])
    example = Example("train:0", {"text": "  padded  "}, "ok", "train.jsonl:1")
    encoded = Encoder(tokenizer).encode(template, [example])
    assert [*encoded.prefix, *encoded.rows[0].body] == production_ids(tokenizer, template, example.values)
    shouting = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    shouting.chat_template = "{% for m in messages %}{{ m['content'] | replace('z', 'Z') }}{% endfor %}"
    with pytest.raises(InputError, match=r"train\.jsonl:1: .*changes a slot value"):
        Encoder(shouting).encode(template, [Example("train:0", {"text": "pizza"}, "ok", "train.jsonl:1")])


def test_a_batch_predicts_gold_tokens_only_and_each_from_the_position_before_it() -> None:
    encoder = Encoder(tiny_tokenizer("chatml"))
    rows = encoder.encode(
        template_for("chatml"), examples_of([("a", "b"), ("a much longer text", "c"), ("d", "e")])
    ).rows
    batch = make_batch(rows, [2, 1])
    position = 0
    for r, i in enumerate([2, 1]):
        row, tokens = rows[i], [*rows[i].body, *rows[i].gold]
        for k, target in enumerate(row.gold):
            at_row, column = batch.predicts[position].tolist()
            assert at_row == r
            assert column == len(row.body) - 1 + k
            assert batch.ids[r, : column + 1].tolist() == tokens[: column + 1]
            assert batch.gold[position] == target
            position += 1
    assert position == len(batch.gold)
    moved = batch.to("cpu")
    assert all(torch.equal(getattr(moved, name), getattr(batch, name)) for name in ("ids", "mask", "predicts", "gold"))
    assert moved.index == batch.index == (2, 1)
    assert batch.tokens == sum(len(rows[i]) - 1 for i in (2, 1))


def test_length_buckets_hold_every_row_once_and_are_sorted_by_length() -> None:
    encoder = Encoder(tiny_tokenizer("chatml"))
    rows = encoder.encode(template_for("chatml"), examples_of([("a " * n, "b") for n in (5, 1, 9, 3, 7)])).rows
    buckets = length_buckets(rows, 2)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(5))
    lengths = [len(rows[i]) for bucket in buckets for i in bucket]
    assert lengths == sorted(lengths)
