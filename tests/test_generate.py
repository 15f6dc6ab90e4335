"""Answers behind a prefix equal those of plain transformers on the full prompt."""

from __future__ import annotations

import pytest
import torch

from kvopt.base.generate import generate, stop_ids
from kvopt.base.prefix import empty_prefix, prefill
from kvopt.errors import InputError
from tests.tiny import MODELS, tiny_base

PROMPT = list(range(20, 32))
BODIES = [(40, 41, 42), (50,), (60, 61, 62, 63, 64, 65, 66), (70, 71)]


def plain_answer(base, prompt, new_tokens):
    """transformers' own greedy generation of one full prompt."""
    ids = torch.tensor([prompt])
    out = base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
        eos_token_id=sorted(stop_ids(base)), pad_token_id=0,
    )  # fmt: skip
    answer = out[0, len(prompt) :].tolist()
    ends = [i for i, token in enumerate(answer) if token in stop_ids(base)]
    return tuple(answer[: ends[0]] if ends else answer)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_answers_equal_plain_transformers_on_full_prompts(kind):
    base = tiny_base(kind)
    prefix = prefill(base, ids=torch.tensor(PROMPT))
    answers = generate(base, prefix, BODIES, max_new_tokens=12, batch_size=3)
    assert answers == [plain_answer(base, PROMPT + list(body), 12) for body in BODIES]


def test_answers_without_a_prefix_equal_plain_transformers():
    base = tiny_base("llama")
    answers = generate(base, empty_prefix(base), BODIES, max_new_tokens=8)
    assert answers == [plain_answer(base, list(body), 8) for body in BODIES]


def test_an_answer_ends_before_the_stop_token_while_others_go_on():
    base = tiny_base("llama")
    prefix = prefill(base, ids=torch.tensor(PROMPT))
    whole = generate(base, prefix, BODIES, max_new_tokens=12, stop=frozenset())
    end = whole[0][5]
    cut = generate(base, prefix, BODIES, max_new_tokens=12, stop=frozenset({end}))
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert cut == expected
    assert len(cut[0]) < 12


def test_the_stop_token_is_kept_where_it_is_asked_for():
    base = tiny_base("llama")
    prefix = prefill(base, ids=torch.tensor(PROMPT))
    whole = generate(base, prefix, BODIES, max_new_tokens=12, stop=frozenset())
    end = whole[0][5]
    cut = generate(base, prefix, BODIES, max_new_tokens=12, stop=frozenset({end}), keep_stop=True)
    assert cut == [answer[: answer.index(end) + 1] if end in answer else answer for answer in whole]


def test_sampling_is_a_function_of_the_seed():
    base = tiny_base("llama")
    prefix = prefill(base, ids=torch.tensor(PROMPT))
    draw = [generate(base, prefix, BODIES, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert draw[0] == draw[1]
    assert draw[0] != draw[2]


def test_what_cannot_be_answered_is_refused():
    base = tiny_base("llama")
    with pytest.raises(InputError, match="without tokens"):
        generate(base, empty_prefix(base), [()], max_new_tokens=4)
    with pytest.raises(InputError, match="at most 510 new tokens"):
        generate(base, empty_prefix(base), [(40, 41)], max_new_tokens=511)
