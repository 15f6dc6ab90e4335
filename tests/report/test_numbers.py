"""What the report computes: advice in words, costs, rank agreement, word diffs, what changed between runs."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from random import Random

import pytest
import yaml

from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.report import report_of
from kvopt.report.agreement import in_words, rank_agreements
from kvopt.report.changes import compare_runs, flatten
from kvopt.report.choice import advice, number, pareto_front, recommended, rivals
from kvopt.report.costs import build_costs, pays_after
from kvopt.report.reading import read_run, read_runs
from kvopt.report.worddiff import WORD, _stretches, diff
from tests.report.made import change, leaderboard, row, score, write_run


def board(*rows: dict, **changes: object) -> LeaderboardDocument:
    document = leaderboard() | {"contexts": list(rows), "other_mutations": []} | changes
    return LeaderboardDocument.model_validate(document)


NONE = row("none", "text", 0, 1.0)


def test_the_advice_names_the_shorter_context_first_and_then_the_closest():
    found = advice(LeaderboardDocument.model_validate(leaderboard()))
    assert (found["closest"], found["shorter"], found["ties"]) == ("kv-full", "kv-16", ["m002"])
    lead, then = found["sentences"]
    assert lead == (
        "kv-16 keeps the template's behaviour to 0.0200 nats per gold token (95 % interval 0.0160–0.0240) with 16 of 40"
        " tokens (97.5% of the template's effect)."
    )
    assert then.startswith("kv-full is closest, though not separable from m002: 0.0040 nats")


def test_a_shorter_context_that_keeps_too_little_is_not_advised():
    far = row("soft-8", "soft", 8, 0.5, separable_from_best=True)
    found = advice(board(row("kv", "kv", 40, 0.004), far, NONE))
    assert (found["closest"], found["shorter"]) == ("kv", None)
    assert "kv is closest to the template" in found["sentences"][0]
    assert "Nothing much shorter comes close: the best is soft-8 with 8 tokens at 0.5000" in found["sentences"][1]
    assert "50% of the template's effect" in found["sentences"][1]


def test_selection_rows_choose_and_validation_rows_report():
    rows = [
        row("lucky", "kv", 10, 0.010, selection=score(0.030)),
        row("a", "kv", 10, 0.020, selection=score(0.015)),
        row("long", "kv", 40, 0.012, selection=score(0.002)),
        row("none", "text", 0, 1.0, selection=score(1.2)),
    ]
    found = advice(board(*rows))
    assert (found["closest"], found["shorter"]) == ("long", "a")
    assert found["sentences"][0].startswith("a keeps the template's behaviour to 0.0200 nats")
    assert "lucky has 0.0100 on the rows reported here; contexts are chosen by other rows" in " ".join(
        found["sentences"]
    )
    assert recommended(board(*rows)) == "a"
    far = [row("near", "kv", 10, 0.05, selection=score(0.5)), *rows[2:]]
    assert advice(board(*far))["shorter"] is None, "it keeps 58 % on the rows that decide, whatever it keeps on others"
    rows[0].pop("selection")
    assert advice(board(*rows))["closest"] == "lucky", "an old board, without scores on selection rows for all"


def test_two_tokens_fewer_are_not_called_shorter():
    found = advice(board(row("kv", "kv", 40, 0.004), row("m001", "text", 38, 0.005), NONE))
    assert found["shorter"] is None


def test_the_advice_says_when_the_best_cannot_be_told_apart_from_the_noise_or_from_others():
    rows = [row("a", "kv", 40, 0.0004), row("b", "kv", 40, 0.00045, separable_from_best=False)]
    sentences = advice(board(*rows, NONE))["sentences"]
    assert "b is not separable from a by a paired test on these rows." in sentences
    assert "a is within the noise floor of 0.00050: as close as can be measured." in sentences


def test_a_run_without_contexts_gives_no_advice():
    found = advice(board(row("original", "text", 40, 0.0004), NONE))
    assert found["closest"] is None
    assert "no contexts to choose from" in found["sentences"][0]


def test_the_pareto_front_has_what_nothing_beats_in_both():
    names = [r.name for r in pareto_front(rivals(LeaderboardDocument.model_validate(leaderboard())))]
    assert names == ["kv-16", "kv-full"]


def test_numbers_keep_two_digits_that_mean_something():
    assert [number(v) for v in (1.23456, 0.0041, 0.00072, 0.0000123, 0.0, -0.002)] == [
        "1.2346", "0.0041", "0.00072", "1.2e-05", "0.0000", "-0.0020",
    ]  # fmt: skip


def test_a_context_costs_the_work_since_it_was_last_begun_anew(run: Path):
    costs = build_costs(read_run(run))
    assert costs["kv-16"]["seconds"] == 12
    assert costs["kv-16"]["tokens_in"] == 40
    assert "original" not in costs
    assert "kv-full" not in costs


def test_mutations_share_the_search_and_the_scoring_that_chose_them(run: Path):
    costs = build_costs(read_run(run))
    assert costs["m001"] == costs["m003"]
    assert costs["m001"]["seconds"] == 16
    assert (costs["m001"]["model_calls"], costs["m001"]["shared_by"]) == (6, 3)


def test_shortened_texts_share_their_search_and_a_context_pays_for_all_that_led_to_it(run: Path):
    board = json.loads((run / "leaderboard.json").read_text("utf-8"))
    short = row("short-9", "text", 9, 0.2) | {"lineage": {"family": "extract"}}
    board["contexts"].append(short)
    (run / "leaderboard.json").write_text(json.dumps(board), "utf-8")
    with (run / "ledger.jsonl").open("a", encoding="utf-8") as ledger:
        for tokens_in, tokens_back in ((900, 300), (100, 0)):
            entry = {"stage": "shortened", "outcome": "done", "seconds": 3, "tokens_in": tokens_in}
            ledger.write(json.dumps(entry | {"tokens_back": tokens_back}) + "\n")
        ledger.write(json.dumps({"stage": "reference", "outcome": "done", "seconds": 1, "tokens_in": 700}) + "\n")
    read = read_run(run)
    rows, costs = {row.name: row for row in read.board.contexts}, build_costs(read)
    assert (costs["short-9"]["tokens_in"], costs["short-9"]["shared_by"]) == (1000, 1)
    before = sum(e.tokens_in for e in read.ledger if e.stage == "reference")
    saved = read.board.template_tokens - 9
    assert pays_after(read, rows["short-9"], costs["short-9"]) == math.ceil((1000 + 300 + before) / saved)
    assert pays_after(read, rows["original"], None) is None
    assert pays_after(read, rows["short-9"], None) is None


def test_rank_agreement_is_that_of_scipy_on_hand_made_ranks():
    selections = [(0.1, 2.0), (0.2, 1.0), (0.3, 3.0), (0.4, 4.0)]
    rows = [
        row(f"m00{i}", "text", 40, kl) | {"selection": score(kl) | {"gold_nll": nll}}
        for i, (kl, nll) in enumerate(selections)
    ]
    chosen, reported = rank_agreements(board(*rows))
    assert (chosen["n"], chosen["split"]) == (4, "selection")
    assert chosen["spearman"] == pytest.approx(0.8)
    assert chosen["kendall"] == pytest.approx(4 / 6)
    assert reported["spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rho", "p", "words"),
    [
        (0.9, 0.001, "both rank them alike"),
        (0.5, 0.001, "both rank them alike in part"),
        (0.1, 0.04, "one order says little about the other"),
        (-0.65, 0.001, "they rank them in opposite order"),
        (0.9, 0.2, "not told apart from chance"),
        (None, None, "too few, or all equal, for a rank correlation"),
    ],
)
def test_rank_agreement_is_put_in_words(rho: float | None, p: float | None, words: str):
    assert in_words(rho, p).split(":")[0] == words


def test_rank_agreement_of_two_or_of_equals_is_not_defined():
    two = rank_agreements(board(row("a", "kv", 4, 0.1), row("b", "kv", 4, 0.2)))[1]
    assert (two["n"], two["spearman"], two["kendall_p"]) == (2, None, None)
    same = [row(name, "kv", 4, 0.1) for name in "abc"]
    assert rank_agreements(board(*same))[1]["kendall"] is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Read the text.", "Read the text, please."),
        ("a\n\nb {{x}} c", "a\nb {{x}} d"),
        ("", "new words"),
        ("one two", ""),
        (" ".join(f"w{i}" for i in range(1000)), " ".join(f"w{i}" for i in range(1000)) + " end"),
    ],
)
def test_a_diff_holds_both_texts(old: str, new: str):
    pieces = diff(old, new)
    if not any(piece.kind == "cut" for piece in pieces):
        assert "".join(p.text for p in pieces if p.kind in ("same", "new")) == new
        assert "".join(p.text for p in pieces if p.kind in ("same", "gone")) == old
    assert any(piece.kind in ("gone", "new") for piece in pieces)


def test_a_slot_is_one_word_and_a_long_unchanged_stretch_is_cut():
    pieces = diff("Text: {{a.b}} x", "Text: {{c}} x")
    assert [p.text for p in pieces if p.kind == "gone"] == ["{{a.b}}"]
    long = " ".join(f"w{i}" for i in range(1000))
    pieces = diff(long, long + " end")
    assert next(p.text for p in pieces if p.kind == "cut") == "992 unchanged words"


@pytest.mark.parametrize("end", ["\n", " "])
def test_texts_of_thousands_of_words_are_compared_in_seconds(end: str):
    """Word by word, these took minutes, and a report shows forty of them."""
    random = Random(0)
    words = [random.choice(["the", "text", "a", f"w{random.randrange(500)}"]) for _ in range(4000)]
    changed = ["changed" if i % 40 == 0 else word for i, word in enumerate(words)]
    old, new = ("".join(word + (end if i % 12 == 0 else " ") for i, word in enumerate(w)) for w in (words, changed))
    begun = time.monotonic()
    stretches = _stretches(WORD.findall(old), WORD.findall(new))
    assert time.monotonic() - begun < 20
    assert "".join(w for _, gone, _ in stretches for w in gone) == old
    assert "".join(w for _, _, come in stretches for w in come) == new
    assert all(gone == come for same, gone, come in stretches if same)
    if end == "\n":
        assert sum(len(gone) for same, gone, _ in stretches if same) > 7000, "by lines, what is unchanged is found"


def test_words_that_come_often_are_compared_too():
    old = "- Read the text and say the label.\n" * 60
    pieces = diff(old, old.replace("say", "write", 1))
    assert [(p.kind, p.text) for p in pieces if p.kind in ("gone", "new")] == [("gone", "say"), ("new", "write")]


def test_lineage_and_rejections_are_reported(run: Path):
    found = report_of([run])[0]["runs"][0]["mutations"]
    assert found["counts"] == {"accepted": 3, "slot-lost": 1, "unchanged": 1}
    assert [m["name"] for m in found["accepted"]] == ["m002", "m001", "m003"]
    assert found["accepted"][0]["parents"] == ["m001"]
    assert found["rejected"][0]["examples"][0]["detail"] == "the slot {{text}} is gone"


def test_selection_and_validation_stand_side_by_side(run: Path):
    rows = {r["name"]: r for r in report_of([run])[0]["runs"][0]["chosen"]}
    assert (rows["m002"]["chosen_as"], rows["m002"]["selection_kl"]) == ("mutation", 0.004)
    assert rows["m002"]["separable_from_best"] is False
    assert (rows["kv-16"]["chosen_as"], rows["kv-16"]["selection_kl"]) == ("checkpoint", 0.025)
    assert "none" not in rows


def test_configs_are_compared_key_by_key_and_list_items_by_name():
    tree = {"a": {"b": 1, "c": []}, "contexts": [{"name": "kv", "steps": 2}], "plain": [1, 2]}
    assert flatten(tree) == {"a.b": 1, "a.c": [], "contexts.kv.name": "kv", "contexts.kv.steps": 2, "plain": [1, 2]}


def test_two_runs_show_what_changed(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    change(other / "manifest.json", seed=1)
    (other / "config.yaml").write_text("name: made\ncontexts:\n- {name: kv-16, steps: 20}\n", "utf-8")
    document = leaderboard()
    document["contexts"] = [row("original", "text", 40, 0.0004), row("kv-16", "kv", 16, 0.01), NONE]
    change(other / "leaderboard.json", contexts=document["contexts"])
    found = compare_runs(read_runs([run, other]))
    assert found["comparable"] is True
    assert found["runs"] == ["run", "other"]
    assert {"key": "seed", "values": [0, 1]} in found["identity"]
    assert {"key": "contexts.kv-16.steps", "values": [8, 20]} in found["config"]
    results = {r["name"]: r for r in found["results"]}
    assert results["kv-16"]["kl_forward"] == [0.02, 0.01]
    assert results["kv-16"]["apart"] is True
    assert results["original"]["apart"] is False
    assert "m001" not in results


def test_runs_that_render_the_template_otherwise_are_not_comparable(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    config = yaml.safe_load((other / "config.yaml").read_text("utf-8"))
    config["template"]["chat_kwargs"] = {"enable_thinking": False}
    (other / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    found = compare_runs(read_runs([run, other]))
    assert found["comparable"] is False
    assert found["why"][0].startswith("The template differs")


def test_mutations_of_one_name_and_different_texts_are_different_contexts(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    document = leaderboard()
    for one in document["contexts"]:
        if one["name"] == "m001":
            one["lineage"]["id"] = "another text"
    change(other / "leaderboard.json", contexts=document["contexts"])
    names = [r["name"] for r in compare_runs(read_runs([run, other]))["results"]]
    assert "m001" not in names
    assert {"m002", "kv-16"} <= set(names)


def test_mutations_of_one_text_are_one_context_whatever_each_run_calls_them(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    document = leaderboard()
    for one in document["contexts"]:
        if one["name"] == "m002":
            one["name"] = "m007"
    change(other / "leaderboard.json", contexts=document["contexts"])
    found = compare_runs(read_runs([run, other]))
    names = [one["name"] for one in found["contexts"]]
    assert "m002 / m007" in names
    assert len(names) == 7


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("manifest.json", {"template_sha256": "other"}, "The template differs"),
        ("leaderboard.json", {"rows_sha256": {"validation": "other"}}, "The validation rows differ"),
        ("manifest.json", {"base": {"weights": "other"}}, "The base differs"),
    ],
)
def test_kls_to_different_references_are_not_compared(run: Path, tmp_path: Path, file: str, values: dict, words: str):
    other = write_run(tmp_path / "other")
    change(other / file, **values)
    found = compare_runs(read_runs([run, other]))
    assert found["comparable"] is False
    assert found["why"][0].startswith(words)


def test_old_runs_that_do_not_record_their_rows_are_compared_with_care(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    document = leaderboard()
    del document["rows_sha256"]
    (other / "leaderboard.json").write_text(json.dumps(document), "utf-8")
    change(other / "manifest.json", data_sha256="other")
    assert compare_runs(read_runs([run, other]))["comparable"] is None
    change(other / "manifest.json", data_sha256="d" * 8)
    change(other / "leaderboard.json", rows_sha256={"validation": "v" * 8})
    assert compare_runs(read_runs([run, other]))["comparable"] is True
