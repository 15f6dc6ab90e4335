"""Orders of mutations: counts, nested sets, distances of wordings, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvopt.config.names import ContextName, NestedOrder
from kvopt.errors import InputError
from kvopt.mutate.orders import diverse_order, first_mutations, spread_order, text_distance, word_pairs
from kvopt.task.template import Template

ORIGINAL = Template.from_text("Name the intent of the request: {{text}}")
WORDS = st.lists(st.sampled_from(["a", "b", "c", ".", "\n"]), max_size=8).map(" ".join)


def template(text: str) -> Template:
    return Template.from_text(text + " {{text}}")


def distance(a: Template, b: Template) -> float:
    return text_distance(word_pairs(a), word_pairs(b))


def mutations(*texts: str) -> dict[str, Template]:
    return {f"m{i:03}": template(text) for i, text in enumerate(texts)}


def test_the_distance_is_the_share_of_word_pairs_that_only_one_wording_has():
    a, b = Template.from_text("x y {{s}}"), Template.from_text("x z {{s}}")
    # ("", x), (x, y | z), (y | z, "{"), then the slot's own pairs, equal in both: {{ · {s · s} · }} · } and the end
    assert distance(a, b) == pytest.approx(4 / 10)
    assert distance(a, a) == 0
    spaced = Template.from_text("x   y {{s}}")
    assert distance(a, spaced) == 0
    assert text_distance(frozenset(), frozenset()) == 0


def test_wordings_at_no_distance_are_each_taken_once():
    ranked = list(mutations("a b", "a  b", "a b", "c", "d", "e").items())
    assert sorted(diverse_order(template("a b"), ranked, 3)) == ["m000", "m001", "m002"]


def test_line_ends_and_messages_count_as_wording():
    assert distance(template("a b c"), template("a\nb\nc")) > 0
    one = Template.from_messages([{"role": "user", "content": "a b\n{{s}}"}])
    two = Template.from_messages([{"role": "system", "content": "a b"}, {"role": "user", "content": "{{s}}"}])
    assert distance(one, two) > 0


@given(WORDS, WORDS, WORDS)
def test_the_distance_is_a_metric(first: str, second: str, third: str):
    a, b, c = template(first), template(second), template(third)
    assert distance(a, b) == distance(b, a)
    assert 0 <= distance(a, b) <= 1
    assert distance(a, c) <= distance(a, b) + distance(b, c) + 1e-12


def test_diverse_takes_the_farthest_of_the_better_half_from_all_that_is_chosen():
    near, far, alike = "Name the intent of a request:", "Which of the seven is it", "Which of the seven is that"
    other, worse = "Decide what somebody wants here", ["worse 1", "worse 2", "worse 3", "worse 4"]
    ranked = list(mutations(near, alike, far, other, *worse).items())
    assert diverse_order(ORIGINAL, ranked, 2) == ["m003", "m001"], "the two farthest, not the two alike"
    assert diverse_order(ORIGINAL, ranked, 8)[:4] == ["m003", "m001", "m002", "m000"], "the better half first"
    assert diverse_order(ORIGINAL, ranked, 8)[4:] == ["m004", "m005", "m006", "m007"], "the others by rank"


@pytest.mark.parametrize("order", get_args(NestedOrder))
def test_the_first_k_are_a_part_of_the_first_k_plus_one(order):
    accepted = mutations(*(f"wording {i} of {i * i % 7} words {'and more ' * (i % 3)}" for i in range(9)))
    ranked = list(accepted)[::-1]
    sets = [first_mutations(order, k, accepted, lambda: ranked, ORIGINAL, seed=3, where="test") for k in range(1, 10)]
    for smaller, larger in pairwise(sets):
        assert larger[: len(smaller)] == smaller
    assert sorted(sets[-1]) == sorted(accepted)


def test_best_is_by_rank_and_diverse_and_random_leave_out_what_is_taken():
    accepted = mutations("one", "two", "three", "four")
    ranked = ["m002", "m000", "m003", "m001"]
    assert first_mutations("best", 2, accepted, lambda: ranked, ORIGINAL, seed=0, where="t") == ["m002", "m000"]
    for order in ("diverse", "random"):
        found = first_mutations(order, 3, accepted, lambda: ranked, ORIGINAL, seed=0, taken={"m002"}, where="t")
        assert sorted(found) == ["m000", "m001", "m003"]


def test_spread_takes_the_middle_of_equal_parts():
    assert spread_order(range(12), 3) == [2, 6, 10]
    assert spread_order(range(12), 1) == [6]
    assert spread_order(range(5), 4) == [0, 1, 3, 4]
    assert spread_order(range(3), 7) == [0, 1, 2]
    accepted = mutations(*(f"wording {i}" for i in range(8)))
    ranked = list(accepted)[::-1]
    found = first_mutations("spread", 2, accepted, lambda: ranked, ORIGINAL, seed=0, where="t")
    assert found == [ranked[2], ranked[6]]
    left = first_mutations("spread", 2, accepted, lambda: ranked, ORIGINAL, seed=0, taken={ranked[2]}, where="t")
    assert ranked[2] not in left


def test_diverse_looks_at_all_that_are_ranked_where_it_should():
    near, mid, far = "Name the intent of a request:", "Name the intent of the request:", "Which of the seven is it"
    accepted = mutations(near, mid, far)
    ranked = list(accepted)
    half = first_mutations("diverse", 1, accepted, lambda: ranked, ORIGINAL, seed=0, where="t")
    whole = first_mutations("diverse", 1, accepted, lambda: ranked, ORIGINAL, seed=0, where="t", whole=True)
    assert half != ["m002"]
    assert whole == ["m002"]


def test_random_needs_no_ranks():
    def never() -> list[str]:
        raise AssertionError

    assert len(first_mutations("random", 2, mutations("a", "b", "c"), never, ORIGINAL, seed=1, where="t")) == 2


def test_too_few_mutations_are_named():
    with pytest.raises(
        InputError, match=r"here: 3 mutations are wanted, but there are only 2 \(raise mutations\.count and run again\)"
    ):
        first_mutations("diverse", 3, mutations("a", "b"), lambda: ["m000", "m001"], ORIGINAL, seed=0, where="here")


def test_specs_with_a_number():
    name = ContextName.parse("diverse-mutations:12", "here")
    assert (name.form, name.order, name.count) == ("counted", "diverse", 12)
    assert ContextName.parse("original", "here").form == "original"
    assert ContextName.parse("text:best-mutations", "here").form == "text"
    for spec in ("best-mutations", "random-mutations:", "diverse-mutations:0", "best-mutations:x", "best-mutations:²"):
        with pytest.raises(InputError, match="needs a number"):
            ContextName.parse(spec, "here")
