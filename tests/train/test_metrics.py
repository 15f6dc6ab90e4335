"""Each metric against hand-made answers, and the errors of those that a config can get wrong."""

from __future__ import annotations

import json

import httpx
import pytest
from pydantic import TypeAdapter

from kvopt.config.evaluation import MetricConfig
from kvopt.config.metrics import Item, Metric
from kvopt.errors import InputError
from kvopt.train.json_answers import same_value

GOLD = '{"intent": "PlayMusic", "slots": {"track": "Yesterday", "artist": "the Beatles"}}'


def metric(settings, folder) -> Metric:
    return TypeAdapter(MetricConfig).validate_python(settings).prepared(folder)


def item(answer, gold=GOLD, **values):
    return Item("v:0", values, gold, answer)


def value(one: Metric, answer, gold=GOLD, quantity=None):
    numerator, denominator = one.verdict(item(answer, gold)).ratios[quantity or one.headline]
    return numerator / denominator if denominator else None


@pytest.mark.parametrize(
    ("normalize", "answer", "gold", "hit"),
    [
        (["strip"], " yes\n", "yes", True),
        (["strip"], "Yes", "yes", False),
        (["strip", "case"], "Yes", "yes", True),
        (["punctuation", "spaces"], "a,  b.", "a b", True),
        (["json"], '{"b": 1, "a": [1.0]}', '{"a": [1], "b": 1}', True),
        (["json"], '{"a": 1}', '{"a": true}', False),
        ([], " yes", "yes", False),
    ],
)
def test_exact_match_compares_after_the_normalisation_that_is_asked_for(tmp_path, normalize, answer, gold, hit):
    one = metric({"kind": "exact-match", "normalize": normalize}, tmp_path)
    assert value(one, answer, gold) == hit


@pytest.mark.parametrize(
    ("answer", "valid"),
    [(GOLD, True), ("[1]", True), ("12", False), ("{'a': 1}", False), (GOLD + " done", False), ('{"a": NaN}', False)],
)
def test_json_validity_wants_one_object_or_list_and_nothing_else(tmp_path, answer, valid):
    assert value(metric("json-valid", tmp_path), answer) == valid


@pytest.mark.parametrize("levels", [3, 64, 65, 700, 100_000])
def test_an_answer_that_nests_without_end_is_no_json_and_no_traceback(tmp_path, levels):
    answer = "[" * levels + "]" * levels
    kinds = ("json-valid", {"kind": "exact-match", "normalize": ["json"]}, {"kind": "json-schema", "definition": {}})
    found = [value(metric(kind, tmp_path), answer, " " + answer) for kind in kinds]
    assert found == [levels <= 64, 0 if levels > 64 else 1, levels <= 64]
    metric("slots", tmp_path).verdict(item(answer, answer))
    assert same_value(answer, f"[{answer}]") is False


def test_a_bare_number_is_json_when_containers_are_not_asked_for(tmp_path):
    assert value(metric({"kind": "json-valid", "container": False}, tmp_path), "12") == 1


def test_slots_count_pairs_under_a_path(tmp_path):
    one = metric({"kind": "slots", "path": "slots"}, tmp_path)
    answer = '{"intent": "wrong", "slots": {"track": "Yesterday", "artist": "Beatles", "year": "1965"}}'
    ratios = one.verdict(item(answer)).ratios
    assert ratios == {"slots.precision": (1, 3), "slots.recall": (1, 2), "slots.f1": (2, 5)}


def test_slots_without_a_path_count_every_leaf_with_its_keys(tmp_path):
    one = metric("slots", tmp_path)
    assert one.verdict(item(GOLD)).ratios["slots.f1"] == (6, 6)
    assert one.verdict(item('{"intent": "PlayMusic"}')).ratios["slots.f1"] == (2, 4)
    repeated = '{"a": ["x", "x"]}'
    assert one.verdict(item('{"a": ["x"]}', repeated)).ratios["slots.recall"] == (1, 2)


def test_an_answer_that_is_no_json_misses_every_slot_and_invents_none(tmp_path):
    ratios = metric({"kind": "slots", "path": "slots"}, tmp_path).verdict(item("Yesterday")).ratios
    assert ratios == {"slots.precision": (0, 0), "slots.recall": (0, 2), "slots.f1": (0, 2)}


def test_slots_may_ignore_case(tmp_path):
    answer = GOLD.replace("Yesterday", "YESTERDAY")
    assert value(metric({"kind": "slots", "ignore_case": True}, tmp_path), answer) == 1
    assert value(metric("slots", tmp_path), answer) == pytest.approx(2 / 3)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(tmp_path):
    # common subsequence "the cat": recall 2/3, precision 2/4
    assert value(metric("rouge-l", tmp_path), "the cat lay down", "the cat sat") == pytest.approx(4 / 7)
    stemmed = metric({"kind": "rouge-l", "stemmer": True}, tmp_path)
    assert value(stemmed, "cats running", "cat runs") == pytest.approx(1)


def test_regex_searches_or_matches_the_whole_answer_or_wants_absence(tmp_path):
    assert value(metric({"kind": "regex", "pattern": r"\d+"}, tmp_path), "about 12") == 1
    assert value(metric({"kind": "regex", "pattern": r"\d+", "whole": True}, tmp_path), "about 12") == 0
    assert value(metric({"kind": "regex", "pattern": r"\d+", "whole": True}, tmp_path), " 12\n") == 1
    assert value(metric({"kind": "regex", "pattern": "```", "absent": True}, tmp_path), "```json") == 0


def test_json_schema_from_the_config_or_a_file(tmp_path):
    schema = {"type": "object", "required": ["intent"], "properties": {"intent": {"enum": ["PlayMusic"]}}}
    (tmp_path / "answer.schema.json").write_text(json.dumps(schema))
    for definition in (schema, "answer.schema.json"):
        one = metric({"kind": "json-schema", "definition": definition}, tmp_path)
        assert [value(one, a) for a in (GOLD, '{"intent": "Other"}', "none")] == [1, 0, 0]


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({"type": "nothing"}, "is not a JSON schema"),
        ("missing.json", "no such file"),
        ("broken.json", "not a JSON file"),
    ],
)
def test_a_schema_that_cannot_be_used_is_named(tmp_path, definition, message):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=message):
        metric({"kind": "json-schema", "definition": definition}, tmp_path)


@pytest.mark.parametrize("reference", ["#/definitions/none", "http://schema.invalid/other.json"])
def test_a_schema_that_refers_to_nothing_is_named_and_nothing_is_fetched(tmp_path, reference):
    one = metric({"kind": "json-schema", "definition": {"$ref": reference}}, tmp_path)
    with pytest.raises(
        InputError, match=r"evaluate\.metrics\.json-schema: its JSON schema refers to what is not there"
    ):
        one.verdict(item(GOLD))


def test_checks_are_summed_and_each_rate_is_there(tmp_path):
    one = metric(
        {
            "kind": "checks",
            "checks": [
                "json-valid",
                {"kind": "regex", "name": "short", "pattern": "^.{1,20}$"},
                {"kind": "regex", "name": "no-fence", "pattern": "```", "absent": True},
            ],
        },
        tmp_path,
    )
    ratios = one.verdict(item(GOLD)).ratios
    assert ratios["checks"] == (2, 1)
    assert ratios["checks.all"] == (0, 1)
    assert (ratios["checks.json-valid"], ratios["checks.short"], ratios["checks.no-fence"]) == ((1, 1), (0, 1), (1, 1))


OWN = """
def length(answer, gold, values):
    return len(answer) / 10

def parts(answer, gold, values):
    return {"same": answer == gold, "of_text": values["text"] in answer}

def broken(answer, gold, values):
    return answer.missing

def odd(answer, gold, values):
    return "good"

number = 3
"""


def test_a_function_of_the_users_file_gives_a_number_or_several(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    assert value(metric("python:mine.py:length", tmp_path), "abcde") == 0.5
    several = metric("python:mine.py:parts", tmp_path).verdict(Item("v:0", {"text": "b"}, "abc", "abc"))
    assert several.ratios == {"parts.same": (1, 1), "parts.of_text": (1, 1)}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("python:mine.py:nothing", "has no function 'nothing'"),
        ("python:mine.py:number", "has no function 'number'"),
        ("python:absent.py:f", "no such file"),
        ("python:no_such_module_at_all:f", "cannot be imported: ModuleNotFoundError"),
        ("python:f", "names no function"),
        ("python:syntax.py:f", "cannot be loaded: SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_found_is_named(tmp_path, target, message):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "syntax.py").write_text("def")
    with pytest.raises(InputError, match=message):
        metric(target, tmp_path)


def test_a_function_that_fails_or_gives_no_number_names_the_example(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    with pytest.raises(InputError, match=r"broken: raised AttributeError on the answer to v:0"):
        metric("python:mine.py:broken", tmp_path).verdict(item("x"))
    with pytest.raises(InputError, match=r"odd: gave 'good' for the answer to v:0"):
        metric("python:mine.py:odd", tmp_path).verdict(item("x"))


def judge(reply, seen=None, status=200):
    def handle(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(json.loads(request.content))
        body = {"choices": [{"message": {"content": reply}, "finish_reason": "stop"}]}
        return httpx.Response(status, json=body)

    settings = TypeAdapter(MetricConfig).validate_python(
        {"kind": "judge", "base_url": "http://judge.invalid/v1", "model": "m", "retries": 0}
    )
    return settings.through(httpx.MockTransport(handle))


def test_a_judges_number_is_scaled_to_one():
    seen: list = []
    verdict = judge("4", seen).verdict(item("answer", "gold", text="in"))
    assert verdict.ratios == {"judge": (0.75, 1.0), "judge.failed": (0.0, 1.0)}
    assert verdict.note == "4"
    asked = seen[0]["messages"][1]["content"]
    assert all(part in asked for part in ("<answer>\nanswer", "<reference>\ngold", "<input>\nin"))
    assert "from 1 (wrong) to 5" in seen[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    "reply",
    [
        "4.",
        "**4**",
        "4/5",
        "4 out of 5",
        " `4` ",
        "Score: 4",
        "**Score:** 4/5",
        "Rating is 4.",
        '{"score": 4}',
        "Only the day is wrong.\n\nScore: 4",
        "<think>The answer 2 is odd, a score of 1?</think>\n4",
        "a long thought that the template began</think>4",
    ],
)
def test_a_number_is_read_through_marks_scales_words_json_and_thoughts(reply):
    assert judge(reply).verdict(item("answer")).ratios == {"judge": (0.75, 1.0), "judge.failed": (0.0, 1.0)}


@pytest.mark.parametrize(
    "reply",
    [
        "four",
        "9",
        "0",
        "4.5",
        "Score: 4.5",
        "٤",
        "4 or 5",
        "Score: 3, no: score: 4",
        "The answer 4 is wrong.",
        "4/6",
        "-4",
    ],
)
def test_a_reply_that_states_no_number_of_the_scale_is_a_failure_and_no_score(reply):
    verdict = judge(reply).verdict(item("answer"))
    assert verdict.ratios == {"judge": (0.0, 0.0), "judge.failed": (1.0, 1.0)}
    assert "not a number from 1 to 5" in verdict.note


def test_an_endpoint_that_fails_is_recorded_for_each_answer():
    verdicts = judge("4", status=400).verdicts([item("a"), item("b")])
    assert [v.ratios["judge"] for v in verdicts] == [(0.0, 0.0)] * 2
    assert all(v.note.startswith("failed: status 400") for v in verdicts)


def test_a_judge_without_a_system_role_is_told_in_the_user_s_message(capsys):
    seen: list = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content)["messages"])
        if any(message["role"] == "system" for message in seen[-1]):
            return httpx.Response(400, json={"error": {"message": "System role not supported"}})
        return httpx.Response(200, json={"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]})

    verdicts = judge("").through(httpx.MockTransport(handle)).verdicts([item("a"), item("b")])
    assert [verdict.note for verdict in verdicts] == ["4", "4"]
    assert seen[-1][0]["content"].startswith("You grade the answer")
    assert seen[-1][0]["content"].endswith("</answer>")
    assert capsys.readouterr().err.count("metrics.judge: the endpoint refuses system messages") == 1


def test_an_address_that_is_none_is_a_failure_and_no_traceback():
    settings = {"kind": "judge", "base_url": "http://judge:port/v1", "model": "m", "retries": 0}
    verdict = TypeAdapter(MetricConfig).validate_python(settings).verdict(item("a"))
    assert verdict.note == "failed: InvalidURL: Invalid port: 'port'"


def test_answers_agree_as_text_or_as_json_values():
    assert same_value(" a ", "a")
    assert same_value('{"a": 1, "b": 2}', '{"b":2,"a":1}')
    assert not same_value("a", "b")
    assert not same_value('{"a": "1"}', '{"a": 1}')
