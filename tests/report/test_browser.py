"""The page in a real browser: sorting, filtering, the heat map, no errors, nothing fetched, readable at three widths,
by keyboard, without script, and on paper.

Skipped where Playwright or an installed Chromium or Chrome is absent.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvopt.report import write_report
from tests.report.made import (
    EVIL,
    add_metrics,
    change,
    id_of,
    leaderboard,
    mutations,
    put_lines,
    samples,
    template,
    write_run,
)

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, run: Path, tmp_path: Path) -> Iterator[Any]:
    """The page of the hand-made run; the test fails for any error, warning or request."""
    yield from watched(browser, [run], tmp_path)


@pytest.fixture
def detailed(opened: Any) -> Any:
    """The same with its details open."""
    opened.locator("#details > summary").click()
    return opened


def watched(browser: Any, runs: list[Path], out: Path, **options: Any) -> Iterator[Any]:
    _, (path,) = write_report(runs, out, ("html",))
    page = browser.new_page(**options)
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    yield page
    page.close()
    assert trouble == []


def names(page: Any) -> list[str]:
    """Names of the leaderboard's rows that are shown, in order."""
    return page.locator("#board tbody tr:visible th .name").all_inner_texts()


def test_a_header_sorts_both_ways_and_then_restores_the_order(opened: Any):
    first = names(opened)
    head = opened.locator("#board thead th", has_text="tokens")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert names(opened)[0] == "none"
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert names(opened)[0] == "m002"
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert names(opened) == first


def test_numbers_are_sorted_as_numbers_and_empty_cells_stay_last(opened: Any):
    build = opened.locator("#board thead th", has_text="build").get_by_role("button")
    build.click()
    assert names(opened)[0] == "kv-16"
    assert names(opened)[-1] not in ("m001", "m002")
    build.click()
    assert names(opened)[0] in ("m001", "m002")
    assert names(opened)[-1] not in ("kv-16", "m001", "m002")


def test_more_digits_are_a_larger_number(detailed: Any):
    detailed.locator("table.ledger thead th", has_text="time").first.get_by_role("button").click()
    stages = detailed.locator("table.ledger tbody th").all_inner_texts()
    assert stages[-3:] == ["mutations", "reference", "contexts/kv-16"]


def test_sorting_by_one_column_takes_the_mark_from_the_other(opened: Any):
    opened.locator("#board thead th", has_text="tokens").get_by_role("button").click()
    opened.locator("#board thead th", has_text="top-1").get_by_role("button").click()
    assert opened.locator('#board th[aria-sort="ascending"]').count() == 1


def test_the_keyboard_reaches_and_sorts_a_column(opened: Any):
    button = opened.locator("#board thead th", has_text="tokens").get_by_role("button")
    button.focus()
    opened.keyboard.press("Enter")
    assert names(opened)[0] == "none"


def test_words_and_kinds_filter_and_the_count_is_announced(opened: Any):
    status = opened.locator("form.filter output")
    assert status.inner_text() == "7 contexts"
    opened.get_by_label("Filter", exact=True).fill("add-please")
    assert names(opened) == ["m002"]
    assert status.inner_text() == "1 of 7 contexts"
    opened.get_by_role("button", name="All", exact=True).click()
    status.filter(has_text=re.compile("^7 contexts$")).wait_for()
    opened.get_by_role("checkbox", name="text").uncheck()
    assert names(opened) == ["kv-16", "kv-full", "soft-16"]
    opened.get_by_role("checkbox", name="kv").uncheck()
    assert names(opened) == ["soft-16"]


def test_the_heat_map_is_one_tab_stop_moved_in_by_arrow_keys(detailed: Any):
    table = detailed.locator("table.heat").first
    assert table.locator('td.cell[tabindex="0"]').count() == 1
    table.locator("td.cell").first.focus()
    detailed.keyboard.press("ArrowRight")
    detailed.keyboard.press("ArrowDown")
    active = detailed.evaluate("[document.activeElement.dataset.context, document.activeElement.dataset.token]")
    assert active == ["kv-16", "1"]
    assert table.locator('td.cell[tabindex="0"]').count() == 1
    words = detailed.locator("#inspect-0").inner_text()
    assert 'The template would say " rain" 60.0 %, "\\n" 10.0 %.' in words
    assert 'kv-16 would rather say " snow" 70.0 %' in words
    detailed.keyboard.press("Home")
    assert detailed.evaluate("document.activeElement.dataset.context") == "m002"
    assert "has the same first token" in detailed.locator("#inspect-0").inner_text()


def test_deeper_colour_means_a_higher_kl(detailed: Any):
    depth = "cell => parseFloat(getComputedStyle(cell).getPropertyValue('--v'))"
    cells = detailed.locator("table.heat").first.locator("tbody tr").first.locator("td.cell")
    depths = [cells.nth(i).evaluate(depth) for i in range(cells.count())]
    assert depths == sorted(depths)
    assert depths[-1] == 100
    colours = cells.evaluate_all("cells => cells.map(cell => getComputedStyle(cell).backgroundColor)")
    assert len(set(colours)) == len(colours)


def test_the_data_can_be_saved(detailed: Any, tmp_path: Path):
    with detailed.expect_download() as found:
        detailed.get_by_role("button", name="Save all numbers").click()
    assert found.value.suggested_filename == "report.json"


def test_script_in_data_and_texts_does_not_run(browser: Any, run: Path, tmp_path: Path):
    document = leaderboard() | {"name": EVIL, "template": template(EVIL)}
    document["contexts"][4]["name"] = EVIL
    change(run / "leaderboard.json", **document)
    evil = {"detail": EVIL, "template": template(EVIL), "id": id_of(EVIL)}
    put_lines(run / "mutations.jsonl", [m | evil for m in mutations()])
    shown = samples()
    for example in shown["examples"]:
        example |= {"values": {"text": EVIL}, "output": EVIL, "gold": [EVIL, EVIL]}
    change(run / "samples.json", **shown)
    for page in watched(browser, [run], tmp_path):
        page.locator("#details > summary").click()
        page.locator("table.heat td.cell").first.click()
        assert page.evaluate("window.hacked === undefined")
        assert page.locator("img").count() == 0
        assert EVIL in page.locator("#inspect-0").inner_text().replace('\\"', '"')


SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
WIDTHS = pytest.mark.parametrize("width", [390, 768, 1280])


@SCHEMES
@WIDTHS
def test_nothing_is_wider_than_the_window(browser: Any, tmp_path: Path, width: int, scheme: str):
    run = write_run(tmp_path / "run", students=True)
    add_metrics(run)
    size = {"width": width, "height": 900}
    for page in watched(browser, [run], tmp_path, viewport=size, color_scheme=scheme):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(253, 253, 252)") == (scheme == "light")
        page.evaluate(OPEN_ALL)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


OPEN_ALL = "for (const one of document.querySelectorAll('details')) one.open = true"


@WIDTHS
def test_the_answer_is_on_the_first_screen_and_the_chart_inside_its_frame(browser: Any, run: Path, width: int):
    add_metrics(run)
    for page in watched(browser, [run], run.parent, viewport={"width": width, "height": 900}):
        card = page.locator(".card.pick").bounding_box()
        assert card["y"] + card["height"] < 500, "the context to take stands on the first screen"
        for switch, picture in (("kept %", ".by-kept svg"), ("log KL", ".by-distance svg")):
            page.get_by_text(switch, exact=True).click()
            frame = page.locator(picture).bounding_box()
            assert frame["x"] >= 0
            assert frame["x"] + frame["width"] <= width
            for text in page.locator(f"{picture} text, {picture} .mark").all():
                box = text.bounding_box()
                assert box["x"] >= frame["x"] - 1
                assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
                assert box["y"] >= frame["y"] - 1
                assert box["y"] + box["height"] <= frame["y"] + frame["height"] + 1


def test_the_switch_shows_one_chart_at_a_time_by_keyboard_and_without_script(browser: Any, run: Path, tmp_path: Path):
    for script in (True, False):
        for page in watched(browser, [run], tmp_path, java_script_enabled=script):
            kept, distance = page.locator(".by-kept"), page.locator(".by-distance")
            assert (kept.is_visible(), distance.is_visible()) == (True, False)
            page.locator("#chart-kept").focus()
            page.keyboard.press("ArrowRight")
            assert (kept.is_visible(), distance.is_visible()) == (False, True)


def test_without_script_everything_can_be_read(browser: Any, run: Path, tmp_path: Path):
    add_metrics(run)
    for page in watched(browser, [run], tmp_path, java_script_enabled=False):
        assert page.locator("#board tbody tr").first.is_visible()
        assert page.get_by_role("button", name="Copy").count() == 0, "a button that does nothing is not shown"
        page.locator("#answer-0 summary").click()
        assert page.locator("#answer-0 ins").first.is_visible()
        page.locator("#details > summary").click()
        assert page.locator("table.heat").first.is_visible()


def test_the_command_is_copied(browser: Any, run: Path, tmp_path: Path):
    for page in watched(browser, [run], tmp_path):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        button = page.locator(".card.pick .copy")
        button.click()
        button.filter(has_text="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == page.locator(".card.pick code").inner_text()
        assert "#kv-16 --to peft" in page.locator(".card.pick code").inner_text()


def test_a_link_to_a_folded_part_opens_what_it_stands_in(browser: Any, run: Path, tmp_path: Path):
    add_metrics(run)
    for page in watched(browser, [run], tmp_path):
        page.locator("table.matrix tbody a").first.click()
        page.locator("#answer-0 pre").first.wait_for()
        page.locator("nav >> text=Details").first.click()
        page.locator("#provenance").wait_for()


@SCHEMES
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["study", "metrics", "two"])
def test_axe_finds_nothing(browser: Any, tmp_path: Path, kind: str, width: int, scheme: str):
    """Contrast, names, roles, order of headings, what the keyboard reaches: all of axe's rules, everything open."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is in the extra browser").Axe()
    runs = [write_run(tmp_path / "run", students=kind == "study")]
    if kind == "metrics":
        add_metrics(runs[0])
    elif kind == "two":
        runs.append(write_run(tmp_path / "other"))
    size = {"width": width, "height": 900}
    for page in watched(browser, runs, tmp_path, viewport=size, color_scheme=scheme):
        page.evaluate(OPEN_ALL)
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()


def test_the_keyboard_reaches_every_control_in_the_order_of_the_page(browser: Any, run: Path, tmp_path: Path):
    add_metrics(run)
    for page in watched(browser, [run], tmp_path):
        reached = []
        for _ in range(120):
            page.keyboard.press("Tab")
            spot = page.evaluate(
                "(() => { const e = document.activeElement, s = getComputedStyle(e.matches('.vh') ? e.labels[0] : e);"
                " return e === document.body ? null :"
                " [e.getBoundingClientRect().top + scrollY, s.outlineStyle, e.outerHTML.slice(0, 80)]; })()"
            )
            if spot is None:
                break
            reached.append(spot)
        assert len(reached) > 30
        assert all(outline != "none" for _, outline, _ in reached), "focus can be seen"
        words = " ".join(html for _, _, html in reached)
        for control in ('class="copy"', "chart-kept", 'class="scroll"', "<summary", 'type="search"'):
            assert control in words, control
        shown = [top for top, _, html in reached if "skip" not in html]
        assert sum(b < a - 700 for a, b in pairwise(shown)) == 0, "focus does not jump back"


@pytest.mark.parametrize("kind", ["plain", "metrics", "study", "two"])
def test_on_paper_it_is_at_most_two_pages(browser: Any, tmp_path: Path, kind: str):
    runs = [write_run(tmp_path / "run", students=kind == "study")]
    if kind == "metrics":
        add_metrics(runs[0])
    elif kind == "two":
        runs.append(write_run(tmp_path / "other"))
    for page in watched(browser, runs, tmp_path):
        for paper in ("A4", "Letter"):
            pages = len(re.findall(rb"/Type\s*/Page\b", page.pdf(format=paper)))
            assert 1 <= pages <= 2


def test_print_leaves_out_controls_and_what_is_folded_and_keeps_what_is_open(opened: Any):
    opened.emulate_media(media="print")
    assert not opened.locator("form.filter").is_visible()
    assert not opened.locator(".card.pick .copy").is_visible()
    assert opened.locator(".card.pick code").is_visible()
    assert opened.locator("#board").is_visible()
    assert not opened.locator("#details").is_visible()
    opened.evaluate("document.getElementById('details').open = true")
    assert opened.locator("#details #provenance").is_visible()
    width = opened.evaluate("document.documentElement.scrollWidth")
    assert width <= opened.viewport_size["width"]


def test_a_page_of_two_runs_sorts_and_filters_too(browser: Any, run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    for page in watched(browser, [run, other], tmp_path):
        assert len(names(page)) == 7
        page.get_by_label("Filter", exact=True).fill("kv")
        assert names(page) == ["kv-full", "kv-16"]
