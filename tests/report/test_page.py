"""The page: valid HTML with nothing fetched, everything escaped, every number in its JSON, readable contrast."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import html5lib
import pytest
import yaml

from kvopt.report import write_report
from kvopt.report.page import heat, token_markup
from kvopt.report.pictures.drawing import Labels, Scale, log_scale
from tests.report.made import (
    EVIL,
    change,
    id_of,
    leaderboard,
    mutations,
    put_lines,
    row,
    samples,
    study,
    template,
    write_run,
)

NS = "{http://www.w3.org/1999/xhtml}"


def page_of(runs: list[Path], out: Path) -> str:
    write_report(runs, out, ("html", "json"))
    return (out / "report.html").read_text("utf-8")


def parsed(html: str) -> Any:
    """The document's tree; raises for anything that is not valid HTML."""
    return html5lib.HTMLParser(strict=True).parse(html)


def data_of(html: str) -> Any:
    return json.loads(re.search(r'<script type="application/json" id="report-data">(.*?)</script>', html, re.S)[1])


@pytest.fixture
def evil(run: Path) -> Path:
    """The run with markup and script in every text that comes from outside."""
    document = leaderboard() | {"name": EVIL, "base": EVIL, "template": template(EVIL)}
    document["contexts"][4]["name"] = EVIL
    document["contexts"][2]["lineage"]["operators"] = [EVIL]
    change(run / "leaderboard.json", **document)
    texts = mutations()
    for mutation in texts:
        text = mutation["template"]["messages"][0]["content"] + EVIL
        mutation |= {"template": template(text), "id": id_of(text), "detail": EVIL}
    put_lines(run / "mutations.jsonl", texts)
    shown = samples()
    for example in shown["examples"]:
        example |= {"values": {EVIL: EVIL}, "output": EVIL, "gold": [EVIL, EVIL], "place": EVIL, "id": EVIL}
        for context in example["contexts"].values():
            context["answer"] = EVIL
            if context.get("top"):
                context["top"] = [[{"token": EVIL, "p": 0.5}], [{"token": EVIL, "p": 0.5}]]
    change(run / "samples.json", **shown)
    change(run / "manifest.json", kvopt_version=EVIL)
    (run / "config.yaml").write_text(f"name: {json.dumps(EVIL)}\n", "utf-8")
    return run


@pytest.mark.parametrize("students", [False, True])
def test_the_page_is_valid_html_with_two_scripts_and_no_address(tmp_path: Path, students: bool):
    html = page_of([write_run(tmp_path / "run", students=students)], tmp_path)
    tree = parsed(html)
    assert len(list(tree.iter(f"{NS}script"))) == 2
    for element in tree.iter():
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = element.get(name)
            assert value is None or value.startswith("#"), (element.tag, value)
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", html)
    assert "http://" not in outside
    assert "https://" not in outside
    assert "@import" not in html
    assert "url(" not in html


def test_the_policy_lets_only_the_page_s_own_script_run(run: Path, tmp_path: Path):
    html = page_of([run], tmp_path)
    script = re.search(r"<script>(.*?)</script>\s*</body>", html, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert "default-src 'none'" in html
    assert not re.search(r"\son\w+=", re.sub(r"<script.*?</script>", "", html, flags=re.S))


def test_text_from_data_models_and_templates_stays_text(evil: Path, tmp_path: Path):
    html = page_of([evil], tmp_path)
    tree = parsed(html)
    assert len(list(tree.iter(f"{NS}script"))) == 2
    assert not list(tree.iter(f"{NS}img"))
    shown = "".join(tree.itertext())
    assert shown.count(EVIL) > 20
    assert data_of(html)["runs"][0]["samples"]["examples"][0]["output"] == EVIL


def test_evil_text_stays_text_on_a_page_of_two_runs_and_in_markdown_and_csv(evil: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    _, written = write_report([evil, other], tmp_path)
    texts = {path.suffix: path.read_text("utf-8") for path in written}
    tree = parsed(texts[".html"])
    assert not list(tree.iter(f"{NS}img"))
    assert len(list(tree.iter(f"{NS}script"))) == 2
    assert "<script" not in texts[".md"]
    assert "window.hacked" in texts[".csv"]


def test_formulas_do_not_reach_a_spreadsheet(run: Path, tmp_path: Path):
    document = leaderboard()
    document["contexts"][4]["name"] = "=cmd()"
    change(run / "leaderboard.json", contexts=document["contexts"])
    _, (path,) = write_report([run], tmp_path, ("csv",))
    assert ",'=cmd()," in path.read_text("utf-8")


def test_control_characters_are_shown_and_the_page_stays_valid(run: Path, tmp_path: Path):
    shown = samples()
    shown["examples"][0]["contexts"]["none"]["answer"] = "bell\x07 nul\x00 end"
    change(run / "samples.json", **shown)
    html = page_of([run], tmp_path)
    parsed(html)
    assert "bell␇ nul␀ end" in html


def test_every_number_of_the_page_s_data_is_that_of_report_json(run: Path, tmp_path: Path):
    html = page_of([run], tmp_path)
    assert data_of(html) == json.loads((tmp_path / "report.json").read_text("utf-8"))
    found = next(r for r in data_of(html)["runs"][0]["contexts"] if r["name"] == "kv-16")
    assert found["kl_forward"] == {"mean": 0.02, "ci95": [0.016, 0.024], "p95": 0.06}
    assert found["build"]["seconds"] == 12
    assert data_of(html)["runs"][0]["totals"]["seconds"] == 149
    assert "2 min 29 s in all" in html
    assert found["pareto"] is True


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path):
    assert page_of([run], tmp_path / "a") == page_of([run], tmp_path / "b")


def test_tables_have_headers_captions_and_sortable_columns_say_their_order(run: Path, tmp_path: Path):
    tree = parsed(page_of([run], tmp_path))
    tables = list(tree.iter(f"{NS}table"))
    assert len(tables) > 6
    for table in tables:
        assert table.find(f"{NS}caption") is not None
        assert all(th.get("scope") in ("col", "row") for th in table.iter(f"{NS}th"))
    board = next(t for t in tables if t.get("id") == "board")
    heads = [th for th in board.iter(f"{NS}th") if th.get("aria-sort")]
    assert len(heads) >= 10
    assert all(th.get("aria-sort") == "none" and th.find(f"{NS}button") is not None for th in heads)


def test_pictures_have_titles_and_descriptions_of_their_own(tmp_path: Path):
    html = page_of([write_run(tmp_path / "run", students=True)], tmp_path)
    pictures = re.findall(r'<svg class="picture" role="img" aria-labelledby="(\S+) (\S+)"', html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(pictures) >= 10
    assert len(ids) == len(set(ids))
    assert all(part in ids for pair in pictures for part in pair)


def test_links_in_the_page_lead_somewhere(tmp_path: Path):
    html = page_of([write_run(tmp_path / "run", students=True)], tmp_path)
    targets = set(re.findall(r'href="#([^"]+)"', html))
    assert {"leaderboard", "students", "study", "tokens", "mutations"} <= targets
    assert targets <= set(re.findall(r'\bid="([^"]+)"', html))


def test_what_cannot_be_separated_is_said_in_words(run: Path, tmp_path: Path):
    text = re.sub(r"\s+", " ", "".join(parsed(page_of([run], tmp_path)).itertext()))
    assert "m002 is not separable from kv-full on these rows" in text
    assert "no power law" not in text


def test_students_robustness_forgetting_and_the_nth_mutation_are_shown(tmp_path: Path):
    html = page_of([write_run(tmp_path / "run", students=True)], tmp_path)
    text = re.sub(r"\s+", " ", "".join(parsed(html).itertext()))
    assert "student lora-mixed" in text
    shown = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert "mixed--seed-0" not in shown, "students of a study stand in the study alone"
    assert "slots.f1 over wordings" in text
    assert "Forgetting: KL from the base" in text
    assert "a·(n+1)" in text
    assert "no power law fits these points" in text
    assert "What explains forgetting" in text
    assert "Differences from fixed" in text
    assert "<strong>+0.100</strong>" in shown
    assert "[+0.060, +0.140]" in text
    assert "95 % over rows]; bold where the interval excludes 0" in text


def test_a_study_without_intervals_over_rows_is_shown_without_them(tmp_path: Path):
    document = study()
    del document["bootstrap"]
    for found in document["arms"][1]["against_reference"].values():
        found["difference"].pop("ci95_bootstrap", None)
    run = write_run(tmp_path / "run", students=True)
    (run / "study.json").write_text(json.dumps(document), "utf-8")
    html = page_of([run], tmp_path)
    assert "Differences from fixed" in html
    assert "<strong>+0.100</strong>" not in html
    assert "excludes 0" not in html


def test_a_page_of_two_runs_has_their_contexts_and_what_changed(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    change(other / "manifest.json", seed=5)
    text = re.sub(r"\s+", " ", "".join(parsed(page_of([run, other], tmp_path)).itertext()))
    assert "What changed" in text
    assert "KLs can be compared across the runs" in text
    assert "kv-16 · other" not in text, "what both runs say of a context stands once"
    rows = leaderboard()["contexts"]
    rows[4] = row("kv-16", "kv", 16, 0.05)
    change(other / "leaderboard.json", contexts=rows)
    html = page_of([run, other], tmp_path)
    text = re.sub(r"\s+", " ", "".join(parsed(html).itertext()))
    assert "kv-16 · other" in text
    assert html.index('id="changes"') < html.index('id="leaderboard"')
    table = re.search(r'<table id="board".*?</table>', html, re.S)[0]
    names = re.findall(r'<span class="name">([^<]+)</span>', table)
    assert names == ["kv-16", "kv-full", "m002", "m001", "soft-16", "original", "none"], "what changed comes first"
    change(other / "manifest.json", template_sha256="other")
    text = "".join(parsed(page_of([run, other], tmp_path)).itertext())
    assert "The template differs between the runs" in text
    assert "kv-16 · other" not in text, "no common picture of distances to different references"


def test_long_settings_of_two_runs_are_shown_as_what_changed_in_them(run: Path, tmp_path: Path):
    other, words = write_run(tmp_path / "other"), "one two three four five six " * 20
    for folder, end in ((run, "seven"), (other, "<b>eight</b>")):
        (folder / "config.yaml").write_text(yaml.safe_dump({"template": {"text": words + end}}), "utf-8")
    html = page_of([run, other], tmp_path)
    assert "<del>seven</del>" in html
    assert "<ins>&lt;b&gt;eight&lt;/b&gt;</ins>" in html


def test_a_thousand_mutations_stay_under_two_megabytes(run: Path, tmp_path: Path):
    first, text = mutations()[0], "You sort messages.\n\n- Read the request {} times.\n- Answer in one line.\n"
    texts = {n: text.format(n) for n in range(1, 1001)}
    many = [
        first | {"id": id_of(text), "template": template(text), "name": f"m{n:03d}", "attempt": n}
        for n, text in texts.items()
    ]
    put_lines(run / "mutations.jsonl", many)
    html = page_of([run], tmp_path)
    assert len(html.encode()) < 2 * 2**20
    assert "960 more mutations" in html


def test_heat_is_logarithmic_from_a_thousandth_to_three_nats():
    assert [heat(kl) for kl in (-1.0, 0.0, 0.001, 3.0, 90.0)] == [0, 0, 0, 100, 100]
    assert heat(0.0548) == 50


def test_spaces_of_tokens_are_visible():
    assert str(token_markup(" a\n")) == '<code><span class="space">·</span>a⏎<span class="space"></span></code>'
    assert "&lt;b&gt;" in token_markup("<b>")
    assert "··" in token_markup("  ")


def test_scales_have_round_ticks_and_keep_what_is_not_positive_on_the_edge():
    assert Scale(0, 153, 0, 100).ticks() == [0, 50, 100, 150]
    assert Scale(4.01, 4.06, 0, 100).ticks(4) == [4.02, 4.04, 4.06]
    scale = log_scale([0.001, 1.0], 100, 0)
    assert scale.ticks() == [0.001, 0.01, 0.1, 1.0]
    assert scale(0.0) == scale(-1.0) == 100
    assert log_scale([], 0, 1)(0.5) > 0


def test_labels_do_not_cover_each_other_nor_leave_the_picture():
    labels = Labels(0, 200)
    first = labels.place(100, 50, "one name")
    second = labels.place(100, 50, "two name")
    assert first is not None
    assert second is not None
    assert first != second
    assert labels.place(199, 100, "x" * 60) is None


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def mixed(over: str, under: str, share: float) -> str:
    channels = [round(int(over[i : i + 2], 16) * share + int(under[i : i + 2], 16) * (1 - share)) for i in (1, 3, 5)]
    return "#" + "".join(f"{c:02x}" for c in channels)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_schemes(run: Path, tmp_path: Path, scheme: str):
    css = re.search(r"<style>(.*?)</style>", page_of([run], tmp_path), re.S)[1]
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0 if scheme == "light" else 1]))
    for name in ("ink", "soft-ink", "text", "soft", "kv", "bad"):
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    for ground in ("new", "gone", "quiet"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5, ground
    assert contrast(colours["ink"], mixed(colours["heat"], colours["page"], 0.45)) >= 4.5
