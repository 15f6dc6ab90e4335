"""Inferring a template: every row renders back exactly, what says something is found, and a no has a reason."""

import random
import re
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvopt.errors import InputError
from kvopt.task.infer import infer_template
from kvopt.task.rendered_prompts import infer_file
from kvopt.task.slot_edges import slot_name, slot_names
from kvopt.task.template import Template, fill_source

WORDS = ["apple", "river", "stone", "cloud", "green", "{x}", "$5", "100%", "{{y}}", "naïve", "雨天", "a\\b"]


def render(source, *values):
    return [fill_source(source, row) for row in values]


def rendered_back(inferred, prompts):
    return [inferred.template.fill(values) for values in inferred.values] == list(prompts)


def sentence(rng, words=WORDS):
    return " ".join(rng.choices(words, k=rng.randint(1, 7)))


LITERALS = [
    " Question: ",
    "\n\nContext: ",
    "\r\n### Answer\r\n",
    '```json\n{"k": 1}\n```\n',
    "\nTitle: ",
    " => Label: ",
]


@st.composite
def templates(draw):
    """A template of 1 to 4 slots between distinct literals, and 3 to 9 rows of values."""
    count = draw(st.integers(1, 4))
    literals = draw(st.permutations(LITERALS))[: count + 1]
    slots = [f"s{i}" for i in range(count)]
    source = literals[0] + "".join(
        "{{" + slot + "}}" + literal for slot, literal in zip(slots, literals[1:], strict=True)
    )
    rng = random.Random(draw(st.integers(0, 10**6)))
    return source, [{slot: sentence(rng) for slot in slots} for _ in range(draw(st.integers(3, 9)))]


@settings(deadline=None)
@given(templates())
def test_every_row_renders_back(case):
    source, values = case
    prompts = render(source, *values)
    assume(len(set(prompts)) > 1)
    assert rendered_back(infer_template(prompts), prompts)


PIECES = st.sampled_from(
    ["\r\n", "\n", "{", "}", "{{a}}", "\\", "%s", "$x", " ", "é", "雨", "word", "Text:", ".", "---"]
)


def test_most_rows_that_share_a_text_render_back_and_the_others_are_refused_for_a_reason_that_holds():
    ends = Counter()

    @settings(deadline=None)
    @given(st.lists(st.lists(PIECES, max_size=12).map("".join), min_size=3, max_size=6))
    def hold(tails):
        prompts = ["Instructions for all of it: " + tail for tail in tails]
        try:
            inferred = infer_template(prompts)
        except InputError as error:
            reason = re.sub(r" other \d prompts.*", "", error.what, flags=re.S)
            ends[reason] += 1
            if reason == "does not fit the template of the":
                strangers = [int(number) - 1 for number in re.findall(r"row (\d+)", error.where)]
                others = [prompt for i, prompt in enumerate(prompts) if i not in strangers]
                assert 0 < len(strangers) < len(others)
                assert len(set(others)) == 1 or rendered_back(infer_template(others), others)
            else:
                assert (reason, len(set(prompts))) == ("all prompts are the same, so nothing is a slot", 1)
            return
        ends["inferred"] += 1
        assert rendered_back(inferred, prompts)

    hold()
    assert ends["inferred"] > 80, ends


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.permutations(LITERALS), st.integers(1, 4))
def test_the_template_itself_comes_back_when_the_inputs_vary(seed, literals, count):
    rng = random.Random(seed)
    names = ["input"] if count == 1 else [f"input_{i}" for i in range(1, count + 1)]
    source = literals[0] + "".join("{{" + n + "}}" + lit for n, lit in zip(names, literals[1:], strict=False))
    words = [f"w{i}" for i in range(500)]
    values = [{name: sentence(rng, words) for name in names} for _ in range(8)]
    for name in names:  # nothing that all values begin or end with
        values[0][name], values[1][name] = f"x {values[0][name]} x", f"y {values[1][name]} y"
    inferred = infer_template(render(source, *values))
    given = dict(zip(inferred.template.slots, names, strict=True))
    named = {name: "{{" + slot + "}}" for slot, name in given.items()}
    assert inferred.template.text == re.sub(r"\{\{(\w+)\}\}", lambda slot: named[slot[1]], source)
    assert [{given[slot]: value for slot, value in row.items()} for row in inferred.values] == values
    assert inferred.notes == ()


def test_words_that_inputs_happen_to_share_stay_in_the_inputs():
    texts = [
        "my cat saw the dog run",
        "give Ann the red book",
        "who ate the cake",
        "is it by the river or not",
        "in the end",
    ]
    inferred = infer_template([f"Classify the request.\nRequest: {text}\nLabel:" for text in texts])
    assert inferred.template.text == "Classify the request.\nRequest: {{request}}\nLabel:"
    assert [v["request"] for v in inferred.values] == texts


def test_a_slot_that_comes_twice_has_one_name():
    prompts = render("Say {{a}}\nAgain: {{a}}\nOther: {{b}}", *[{"a": f"one{i}", "b": f"two{i * i}"} for i in range(6)])
    inferred = infer_template(prompts)
    assert inferred.template.text == "Say {{input_1}}\nAgain: {{input_1}}\nOther: {{other}}"


def test_empty_values_and_literal_slots_and_backslashes_survive():
    source = "Path C:\\\\{{a}}\nKeep \\{{this}} as it is: {{b}}"
    prompts = render(source, *[{"a": a, "b": b} for a, b in [("x", ""), ("", "p q"), ("z z", "r"), ("w", "s")]])
    inferred = infer_template(prompts)
    assert inferred.template.text == source.replace("{{a}}", "{{path_c}}").replace("{{b}}", "{{as_it_is}}")
    assert rendered_back(inferred, prompts)


def test_repeated_separators_divide_when_all_rows_have_as_many():
    prompts = [f"{a} | {b} | {c}\nSum of the three:" for a, b, c in [(i, i * 7 % 11, i * 5 % 13) for i in range(1, 41)]]
    assert infer_template(prompts).template.text == "{{input_1}} | {{input_2}} | {{input_3}}\nSum of the three:"


def test_chat_messages_are_inferred_one_by_one():
    prompts = [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Translate: {x}\nInto: {y}"}]
        for x, y in [("one", "de"), ("two", "fr"), ("three", "it"), ("four", "nl"), ("five", "pl")]
    ]
    inferred = infer_template(prompts)
    assert inferred.template == Template.from_messages(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Translate: {{translate}}\nInto: {{into}}"},
        ]
    )
    assert rendered_back(inferred, prompts)


def test_coverage_is_the_share_of_template_text():
    assert infer_template(["Repeat me: ab", "Repeat me: cd", "Repeat me: ef"]).coverage == pytest.approx(11 / 13)


def test_a_thousand_long_rows_take_seconds_and_rare_exceptions_are_seen():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(200)] + ["the", "a", "of", "."]
    rows = [{"a": " ".join(rng.choices(words, k=200)), "b": sentence(rng)} for _ in range(1000)]
    rows[777]["a"] += "\n\nQuestion: is this a trap?"
    prompts = render("You answer from the text.\n\nText: {{a}}\n\nQuestion: {{b}}\n\nAnswer:", *rows)
    inferred = infer_template(prompts)
    assert rendered_back(inferred, prompts)
    assert "row 778" in inferred.notes[0]


# Refusals


@pytest.mark.parametrize(
    ("prompts", "what"),
    [
        (["a b", "a c"], "too few"),
        (["same text here"] * 4, "all prompts are the same"),
        (["lorem ipsum", "dolor sit", "amet consectetur"], "no text is common"),
        (["one", "two", [{"role": "user", "content": "x"}]], "where the others are text"),
        ([[{"role": "user"}]] * 3, "role and a content"),
    ],
)
def test_what_cannot_be_inferred_is_refused_with_the_reason(prompts, what):
    with pytest.raises(InputError, match=what):
        infer_template(prompts)


def test_rows_of_another_template_are_named_with_what_did_not_fit():
    prompts = [f"Summarize this carefully.\nText: {sentence(random.Random(i))}\nSummary:" for i in range(20)]
    prompts[4] = "Tell me a joke about rain"
    prompts[11] = "Write a poem"
    with pytest.raises(InputError) as caught:
        infer_template(prompts, [f"p.jsonl:{i}" for i in range(1, 21)])
    assert caught.value.where == "p.jsonl:5, p.jsonl:12"
    assert "Tell me a joke about rain" in caught.value.what
    assert "other 18 prompts" in caught.value.what


# Files


def test_jsonl_prompts_with_completions_become_rows(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"prompt": "Add one to: {i}", "completion": {i + 1}}}\n' for i in range(10, 15)))
    inferred = infer_file(path)
    assert inferred.template.text == "Add one to: {{add_one_to}}"
    assert inferred.rows()[0] == {"add_one_to": "10", "output": "11"}


def test_the_last_answer_of_messages_is_the_output(tmp_path):
    path = tmp_path / "p.jsonl"
    row = '{"messages": [{"role": "user", "content": "Add one to: %d"}, {"role": "assistant", "content": "%d"}]}\n'
    path.write_text("".join(row % (i, i + 1) for i in range(10, 15)))
    inferred = infer_file(path)
    assert inferred.template.to_json() == {"messages": [{"role": "user", "content": "Add one to: {{add_one_to}}"}]}
    assert inferred.rows()[4] == {"add_one_to": "14", "output": "15"}


def test_text_files_are_divided_by_lines_of_dashes(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"Add one\r\nto: 10\r\n---\r\nAdd one\r\nto: 11\r\n---  \r\nAdd one\r\nto: 12\r\n")
    inferred = infer_file(path)
    assert inferred.template.text == "Add one\r\nto: {{to}}"
    assert inferred.rows() == [{"to": "10"}, {"to": "11"}, {"to": "12"}]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ('{"text": "x"}\n', "p.jsonl:1: the row has no prompt"),
        ('{"prompt": "x", "output": "y"}\n{"prompt": "x"}\n', "p.jsonl:2: the row has no output"),
        ('{"prompt": "x", "output": {}}\n', "p.jsonl:1: the output is an object"),
    ],
)
def test_rows_without_prompt_or_output_are_named(tmp_path, rows, what):
    path = tmp_path / "p.jsonl"
    path.write_text(rows)
    with pytest.raises(InputError, match=what):
        infer_file(path)


def test_what_all_values_begin_or_end_with_is_template() -> None:
    prompts = [
        f"Sort it.\nOrder: no. {n} (open)\nCustomer: the {who}\nLabel:" for n, who in [(1, "a"), (2, "b"), (3, "c")]
    ]
    inferred = infer_template(prompts)
    assert inferred.template.text == "Sort it.\nOrder: no. {{input_1}} (open)\nCustomer: the {{input_2}}\nLabel:"
    [note] = inferred.notes
    assert "all 3 prompts have 'the' right beside a slot" in note
    assert "8 or more prompts would settle it" in note


@pytest.mark.parametrize(
    ("before", "name"),
    [
        ("Request: ", "request"),
        ("Sort it.\nCustomer message: ", "customer_message"),
        ("**Question:** ", "question"),
        ("# Text:\n", "text"),
        ("<context>", "context"),
        ('{"title": "', "title"),
        ("Please sort this ", None),
        ("", None),
        ("Тема: ", None),
    ],
)
def test_names_come_from_the_text_before_the_slot(before: str, name: str | None) -> None:
    assert slot_name(before) == name


def test_names_are_told_apart_and_none_is_the_outputs() -> None:
    names = slot_names(["a", "b", "a", "c", "d"], ["Text: ", "Text: ", "Other: ", "Output: ", ""])
    assert names == {"a": "text", "b": "text_2", "c": "input_3", "d": "input_4"}
