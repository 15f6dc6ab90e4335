"""Placeholders that survive being text, and the chat template that writes them."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from kvopt.export.placeholders import LEAST_WORDS, MARKER, SHORTEST, placeholders
from kvopt.export.vllm_connector.chat import chat_template
from kvopt.export.vllm_connector.stored_context import StoredContext
from tests.tiny import tiny_base

ORIGINAL = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ bos_token }}\n"


@cache
def wordy() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with some 2,000 words of three letters, each one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges = []
    for a, b, c in itertools.islice(itertools.product("abcdefghijklm", repeat=3), 2000):
        for left, right in (("Ġ", a), ("Ġ" + a, b), ("Ġ" + a + b, c)):
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    built = Tokenizer(models.BPE(vocabulary, merges))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<end>")


def ids(text: str) -> list[int]:
    return wordy()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("behind", ["", "abc", " abc", "\n\nabc", "7", "."])
def test_text_of_placeholders_is_tokenized_into_them_whatever_follows(behind: str) -> None:
    made = placeholders("digest", 20, wordy())
    assert made.text is not None
    assert len(made.ids) == 20
    assert ids(made.text + behind) == [*made.ids, *ids(behind)]


def test_contexts_share_the_marker_and_nothing_else() -> None:
    one, same, other = (placeholders(digest, 40, wordy()) for digest in ("a", "a", "b"))
    assert one == same
    assert one.marker == MARKER
    assert one.ids[:MARKER] == other.ids[:MARKER]
    assert one.ids[-1] == other.ids[-1] == wordy().eos_token_id, "the fence"
    assert sum(a == b for a, b in zip(one.ids[MARKER:-1], other.ids[MARKER:-1], strict=True)) < 3


def test_few_slots_and_few_words_have_ids_and_no_text() -> None:
    short = placeholders("a", SHORTEST - 1, wordy())
    assert (short.marker, short.text, len(short.ids)) == (0, None, SHORTEST - 1)
    tokenizer = tiny_base("llama").tokenizer
    assert len(tokenizer) < LEAST_WORDS
    few = placeholders("a", 20, tokenizer)
    assert (few.marker, few.text, len(few.ids)) == (MARKER, None, 20)
    assert not set(few.ids) & set(tokenizer.all_special_ids)


def stored(name: str, **facts: Any) -> StoredContext:
    made = placeholders(name, 12, wordy())
    chat = {"before": " ", "after": '"{{x}}"\n<ä>'}
    settings = {"placeholder_text": made.text, "chat": chat} | facts
    return StoredContext(Path(name), name, 12, 1, 1, 8, tuple(made.ids), MARKER, **settings)


def rendered(template: str, messages: list[dict[str, Any]], **named: Any) -> str:
    return str(wordy().apply_chat_template(messages, chat_template=template, tokenize=False, **named))


def test_a_chat_that_names_a_context_begins_with_its_placeholders() -> None:
    one, two = stored("kv-a"), stored("kv-b")
    template = chat_template([one, two], ORIGINAL)
    message = {"role": "user", "content": "abc {{y}} 'q'"}
    for context in (one, two):
        text = rendered(template, [message], kvopt=context.name)
        assert text == f"{context.placeholder_text} abc {{{{y}}}} 'q'\"{{{{x}}}}\"\n<ä>"
        assert tuple(ids(text)[:12]) == context.placeholder_ids
    parts = {"role": "user", "content": [{"type": "text", "text": "abc"}, {"type": "text", "text": "d"}]}
    assert rendered(template, [parts], kvopt="kv-a").startswith(f"{one.placeholder_text} abcd")


def test_a_chat_without_a_context_is_the_bases_own() -> None:
    template = chat_template([stored("kv-a")], ORIGINAL)
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert rendered(template, messages) == rendered(ORIGINAL, messages)
    assert rendered(template, messages, kvopt=None) == rendered(ORIGINAL, messages)
    with pytest.raises(jinja2.TemplateError, match="no chat template"):
        rendered(chat_template([stored("kv-a")], None), messages)


def test_chats_that_cannot_be_served_are_refused() -> None:
    template = chat_template([stored("kv-a"), stored("kv-b")], ORIGINAL)
    message = {"role": "user", "content": "b"}
    with pytest.raises(jinja2.TemplateError, match="no context kv-9 here: this server has kv-a, kv-b"):
        rendered(template, [message], kvopt="kv-9")
    for messages in ([message, message], [{"role": "system", "content": "b"}]):
        with pytest.raises(jinja2.TemplateError, match="one user message"):
            rendered(template, messages, kvopt="kv-a")
    with pytest.raises(ValueError, match="kv-a cannot be named in a chat: its reason"):
        chat_template([stored("kv-a", chat=None, no_chat="its reason")], ORIGINAL)
