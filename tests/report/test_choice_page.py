"""The page from its first screen to its board: cards, chart, answers, wordings, and what is folded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.errors import InputError
from kvopt.report import report_of, write_report
from kvopt.report.agreement import headline_agreements
from kvopt.report.answers_view import answers_view, wordings
from kvopt.report.cards import cards, export_command
from kvopt.report.choice import own_prompt as own_prompt_of
from kvopt.report.choice import recommended, share_kept, shown_interval, signed
from kvopt.report.pictures import distance_picture, kept_picture
from kvopt.report.reading import read_run
from tests.report.made import EVIL, add_metrics, answers, change, leaderboard, own_prompt, put, row, write_run
from tests.report.test_page import NS, page_of, parsed


def board(*rows: dict[str, Any], **changes: object) -> LeaderboardDocument:
    return LeaderboardDocument.model_validate(leaderboard() | {"contexts": list(rows), "other_mutations": []} | changes)


NONE = row("none", "text", 0, 1.0)


@pytest.fixture
def measured(run: Path) -> Path:
    """The run with metrics, answers and a prompt of the user's own."""
    add_metrics(run)
    return run


def test_three_cards_say_what_to_take_what_is_closest_and_what_the_user_wrote(measured: Path):
    found = cards(read_run(measured).board, measured)
    assert [(card.title, card.row.name) for card in found] == [
        ("Take this one", "kv-16"),
        ("The closest", "kv-full"),
        ("Your own shorter prompt", "mine"),
    ]
    assert found[0].kept == pytest.approx(1 - 0.02 / 0.8)
    html = page_of([measured], measured.parent)
    text = re.sub(r"\s+", " ", "".join(parsed(html).itertext()))
    assert "40 → 16 tokens, 98% kept" in text
    assert "Same most likely token as under the template: 99.0% of output tokens" in text


def test_the_share_kept_is_of_the_way_from_no_context_even_where_something_is_worse():
    found = board(row("worse", "soft", 4, 2.0), row("kv", "kv", 16, 0.25), NONE)
    assert [share_kept(one, found) for one in found.contexts] == pytest.approx([-1.0, 0.75, 0.0])
    assert share_kept(found.contexts[1], board(row("kv", "kv", 16, 0.25), row("worse", "soft", 4, 2.0))) is None


def test_no_context_is_on_two_cards():
    (card,) = cards(board(row("kv", "kv", 20, 0.001), row("far", "soft", 20, 0.9), NONE), Path("runs/x"))
    assert (card.title, card.also) == ("Take this one", ["It is also the closest to the template."])
    assert len(cards(board(row("kv", "kv", 40, 0.001), own_prompt(), NONE), Path("runs/x"))) == 2
    mine = cards(board(row("kv", "kv", 40, 0.1), own_prompt(), NONE), Path("runs/x"))
    assert [one.row.name for one in mine] == ["mine"]
    assert mine[0].also == ["It is also the closest to the template.", "It is your own shorter prompt."]


def test_a_mutation_is_not_the_user_s_own_prompt_and_a_longer_one_is_not_called_shorter():
    mutated = own_prompt() | {"lineage": {"id": "a1"}}
    assert own_prompt_of(board(mutated, NONE)) is None
    longer = own_prompt() | {"tokens": 60}
    assert cards(board(row("kv", "kv", 16, 0.01), longer, NONE), Path("x"))[-1].title == "Your own prompt"
    both = [own_prompt() | {"name": "long", "tokens": 60, "kl_forward": {"mean": 0.001, "ci95": None, "p95": 1.0}}]
    found = own_prompt_of(board(*both, own_prompt(), NONE))
    assert found is not None
    assert found.name == "mine"


def test_the_command_to_export_is_quoted_where_it_must_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    (one, *_) = board(row("kv-16", "kv", 16, 0.01), NONE).contexts
    assert export_command(one, tmp_path / "runs" / "a") == "kvopt export runs/a#kv-16 --to peft"
    assert export_command(one, Path("my runs/a")) == "kvopt export 'my runs/a#kv-16' --to peft"
    assert export_command(board(own_prompt()).contexts[0], Path("a")).endswith("#mine --to text")


def test_the_chart_is_clamped_to_what_can_be_compared():
    rows = [row("kv", "kv", 40, 0.02), row("bad", "soft", 4, 5.0), row("huge", "kv", 4000, 0.01)]
    found = board(*rows, NONE)
    picture = str(kept_picture(found, advised="kv"))
    assert "bad: soft, 4 tokens, -400.0 % kept (outside)" in picture
    ticks = [float(t) for t in re.findall(r'class="tick"[^>]*>([\d.]+)<', picture)]
    assert max(ticks) == 100, "no tick for 4000 tokens"
    assert "huge: kv, 4000 tokens, 99.0 % kept (outside)" in picture
    points = [tuple(map(float, p)) for p in re.findall(r'class="mark[^"]*" d="M([\d.-]+),([\d.-]+)', picture)]
    assert all(0 <= x <= 420 and 0 <= y <= 330 for x, y in points)
    distance = str(distance_picture(found, advised="kv"))
    assert "bad: soft, 4 tokens, KL 5.0000 (outside)" in distance
    assert kept_picture(board(rows[0]), advised=None) is None, "without no context nothing is kept or lost"


def test_answers_are_rows_by_contexts_with_the_recommended_one_first(measured: Path):
    view = answers_view(read_run(measured))
    assert view is not None
    assert [context.name for context in view.contexts] == ["original", "kv-16", "mine", "kv-full", "none"]
    assert view.rows[0].id == "validation:2", "the row with most fails stands first"
    cells = dict(zip((context.name for context in view.contexts), view.rows[0].cells, strict=True))
    assert cells["kv-16"].other_words == 2
    assert [(v.headline, v.value, v.passed) for v in cells["kv-16"].verdicts] == [
        ("json-valid", 0.0, False), ("rouge-l", 0.5, None),
    ]  # fmt: skip
    assert (cells["kv-full"].other_words, cells["kv-full"].verdicts[0].passed) == (0, True)
    assert cells["mine"].other_words == 1
    assert cells["none"].cut


def test_passes_and_fails_are_words_and_marks_and_not_colours_alone(measured: Path, tmp_path: Path):
    html = page_of([measured], tmp_path)
    table = re.search(r'<table class="matrix">(.*?)</table>', html, re.S)[1]
    assert table.count("✗ json-valid") == 6
    assert table.count("✓ json-valid") == 9
    assert table.count("fails</span>") == 6
    assert "snow<ins> and ice</ins>" in html
    assert "mean of 12 rows" in table


def test_without_metrics_the_samples_answers_are_shown(run: Path, tmp_path: Path):
    view = answers_view(read_run(run))
    assert view is not None
    assert (view.file, [c.name for c in view.contexts]) == ("samples.json", ["original", "kv-16", "m002", "none"])
    assert "2 other words" in page_of([run], tmp_path)


def test_many_rows_and_contexts_are_cut_and_the_page_says_so(measured: Path, tmp_path: Path):
    document = answers()
    first = document["examples"][0]
    names = [f"x{n:02}" for n in range(30)]
    document["contexts"] += [{"name": name, "kind": "kv", "tokens": 4} for name in names]
    first["answers"] |= {name: {"text": "word " * 10000, "metrics": {}} for name in names}
    document["examples"] = [first | {"id": f"row:{n}"} for n in range(500)]
    put(measured / "answers.json", document)
    html = page_of([measured], tmp_path)
    assert len(html.encode()) < 2 * 2**20
    assert "of 500 with the most fails and differences are shown" in html
    assert "8 of 35 contexts are shown" in html
    view = answers_view(read_run(measured))
    assert view is not None
    assert view.contexts[-1].name == "none"


def test_every_wording_on_the_board_has_its_text(measured: Path):
    found = {one.name: one for one in wordings(read_run(measured))}
    assert list(found) == ["original", "m002", "m001", "mine"]
    assert found["mine"].what == "your own prompt"
    (_, pieces), _ = found["mine"].fields
    assert "".join(piece.text for piece in pieces if piece.kind != "gone") == "Sort it.\n"


def test_text_of_answers_stays_text(measured: Path, tmp_path: Path):
    document = answers()
    for example in document["examples"]:
        example |= {"id": EVIL, "values": {EVIL: EVIL}, "output": EVIL}
        for one in example["answers"].values():
            one["text"] = EVIL
    put(measured / "answers.json", document)
    tree = parsed(page_of([measured], tmp_path))
    assert not list(tree.iter(f"{NS}img"))
    assert len(list(tree.iter(f"{NS}script"))) == 2


def test_damaged_answers_are_one_line(measured: Path):
    document = answers()
    del document["examples"][1]["answers"]["mine"]
    put(measured / "answers.json", document)
    with pytest.raises(InputError, match=r"answers.json: is damaged.*validation:1 has no answer under mine"):
        read_run(measured)


def test_the_rank_correlation_of_kl_and_metric_is_that_of_hand_made_ranks(measured: Path):
    valid, rouge = headline_agreements(read_run(measured).board)
    assert valid["n"] == 6
    assert valid["spearman"] == pytest.approx(-1.0 + 6 * 2 / (6 * 35)), "two neighbours are swapped"
    assert valid["in_words"] == "contexts closer to the template score higher"
    assert rouge["spearman"] is None, "all values are equal"


def test_the_board_begins_with_the_recommended_row_and_ends_with_the_references(run: Path, tmp_path: Path):
    html = page_of([run], tmp_path)
    table = re.search(r'<table id="board".*?</table>', html, re.S)[0]
    names = re.findall(r'<span class="name">([^<]+)</span>', table)
    assert names == ["kv-16", "kv-full", "m002", "m001", "soft-16", "original", "none"]
    assert re.search(r'class="recommended">\s*<th[^>]*><span class="name">kv-16</span><span class="tag take">', table)
    assert "more mutation" not in html


def test_mutations_are_folded_where_there_are_more_than_a_few(run: Path, tmp_path: Path):
    document = leaderboard()
    more = [row(f"m1{n}", "text", 41, 0.1 + n / 100, lineage={"id": f"b{n}"}) for n in range(5)]
    document["contexts"][4:4] = more
    change(run / "leaderboard.json", contexts=document["contexts"])
    html = page_of([run], tmp_path)
    folded = re.search(r'<details class="texts" id="more-mutations">(.*?)</details>', html, re.S)[1]
    assert "4 more mutations" in folded
    assert re.findall(r'<span class="name">([^<]+)</span>', folded) == ["m11", "m12", "m13", "m14"]
    assert "m10" in re.search(r'<table id="board".*?</table>', html, re.S)[0]


def test_everything_else_is_in_one_closed_details(tmp_path: Path):
    run = write_run(tmp_path / "run", students=True)
    html = page_of([run], tmp_path)
    assert '<details id="details" class="details">' in html
    before, after = html.split('<details id="details" class="details">')
    for part in ("tokens", "curves", "chosen", "mutations", "students", "arms", "provenance"):
        assert f'id="{part}"' in after
        assert f'id="{part}"' not in before
    order = [html.index(f'id="{part}"') for part in ("study", "choice", "answers", "leaderboard", "details")]
    assert order == sorted(order)


def test_a_run_that_still_goes_says_so_and_reloads_nothing(run: Path, tmp_path: Path):
    assert "still going" not in page_of([run], tmp_path)
    change(run / "leaderboard.json", complete=False)
    html = page_of([run], tmp_path)
    assert "This run is still going." in html
    assert 'http-equiv="refresh"' not in html


def test_report_json_gains_what_the_page_says(measured: Path):
    (found,) = report_of([measured])[0]["runs"]
    assert (found["recommended"], found["own_prompt"], found["complete"]) == ("kv-16", "mine", True)
    assert found["headlines"] == ["json-valid", "rouge-l"]
    assert found["contexts"][1]["metrics"]["json-valid"]["mean"] == 1.0


def test_where_no_shorter_one_keeps_enough_the_closest_is_recommended():
    far = row("soft-8", "soft", 8, 0.5)
    assert recommended(board(row("kv", "kv", 40, 0.004), far, NONE)) == "kv"
    assert recommended(board(NONE)) is None


def test_an_interval_of_rounding_errors_is_not_shown(run: Path, tmp_path: Path):
    assert shown_interval((0.25, 0.25 + 1e-12)) is None
    assert shown_interval((0.0, 0.0)) is None
    assert shown_interval((1e-5, 3e-5)) == (1e-5, 3e-5)
    assert [signed(v) for v in (1e-17, -1e-17, -0.13, 0.13)] == ["0.000", "0.000", "−0.130", "+0.130"]
    document = leaderboard()
    for one in document["contexts"]:
        one["kl_forward"]["ci95"] = [one["kl_forward"]["mean"], one["kl_forward"]["mean"] + 1e-13]
    change(run / "leaderboard.json", contexts=document["contexts"])
    html = page_of([run], tmp_path)
    assert "0.0200–0.0200" not in html
    assert "(95 % interval" not in html


@pytest.mark.parametrize("parts", ["plain", "students", "metrics", "older", "none", "two"])
def test_no_table_column_or_heading_is_empty(parts: str, tmp_path: Path):
    runs = [write_run(tmp_path / "run", students=parts == "students")]
    if parts == "metrics":
        add_metrics(runs[0])
    elif parts == "older":
        runs = [Path(__file__).parents[1] / "data" / "run-0.1.0" / "run"]
    elif parts == "none":
        change(runs[0] / "leaderboard.json", contexts=[row("original", "text", 40, 0.0), NONE], other_mutations=[])
    elif parts == "two":
        runs.append(write_run(tmp_path / "other"))
    tree = parsed(page_of(runs, tmp_path / "out"))
    for table in tree.iter(f"{NS}table"):
        rows = [[cell_text(td) for td in tr.iter(f"{NS}td")] for tr in table.iter(f"{NS}tr")]
        rows = [cells for cells in rows if cells]
        name = cell_text(table.find(f"{NS}caption"))
        assert rows, name
        assert any(text not in ("", "–") for cells in rows for text in cells), name
        if table.get("class") != "matrix" and table.get("id") != "board" and "ledger" not in (table.get("class") or ""):
            assert all(any(text not in ("", "–") for text in column) for column in zip(*rows, strict=True)), name
    flat = [element for element in tree.iter() if element.tag.removeprefix(NS) in CONTENT]
    for one, following in zip(flat, [*flat[1:], None], strict=True):
        if (level := LEVELS.get(one.tag.removeprefix(NS))) is not None:
            deeper = following is not None and LEVELS.get(following.tag.removeprefix(NS), 9) > level
            assert deeper, f"nothing stands under {cell_text(one)!r}"


LEVELS = {"h2": 2, "h3": 3, "h4": 4}
CONTENT = {*LEVELS, "p", "table", "svg", "figure", "pre", "dl", "ul", "nav"}


COUNTED = r"(?:rows|tokens|seeds|contexts|words|calls|mutations|arms|points)\b"


def cell_text(element: Any) -> str:
    return "" if element is None else " ".join("".join(element.itertext()).split())


@pytest.mark.parametrize("students", [False, True])
def test_one_is_not_a_plural(tmp_path: Path, students: bool):
    run = write_run(tmp_path / "run", students=students)
    document = leaderboard() | {"rows": {"train": 1, "selection": 1, "validation": 1}, "answered": 1}
    change(run / "leaderboard.json", **document)
    _, written = write_report([run], tmp_path / "out")
    for path in written:
        text = path.read_text("utf-8")
        text = re.sub(r"<script.*?</script>|<[^>]+>", " ", text, flags=re.S)
        assert not re.findall(r"(?<![\d.,])1 (?:other |validation |selection |more )?" + COUNTED, text)


def test_the_older_run_s_study_is_words_and_not_paths(tmp_path: Path):
    run = write_run(tmp_path / "run", students=True)
    html = page_of([run], tmp_path)
    shown = re.sub(r"<script.*?</script>|<[^>]+>", " ", html, flags=re.S)
    assert not re.findall(r"\b(?:original|templates|none|wordings|held-out|forgetting)/\w+", shown)
    older = Path(__file__).parents[1] / "data" / "run-0.1.0" / "run"
    shown = re.sub(r"<script.*?</script>|<[^>]+>", " ", page_of([older], tmp_path), flags=re.S)
    assert not re.findall(r"\b(?:original|templates|none|wordings|held-out|forgetting)/[a-z]+_", shown)
    assert json.loads((older / "study.json").read_text("utf-8"))["arms"], "the study is there"
    assert "What the study says" in shown
