"""The page in a real browser: sorting, filtering, the heat map, no errors, nothing fetched, readable at two widths.

Marked ``browser`` and deselected unless asked for: they need Playwright and an installed Chromium or Chrome.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvopt.report import write_report
from tests.report.made import EVIL, change, leaderboard, mutations, put_lines, samples, template, write_run

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


def test_more_digits_are_a_larger_number(opened: Any):
    opened.locator("table.ledger thead th", has_text="time").first.get_by_role("button").click()
    stages = opened.locator("table.ledger tbody th").all_inner_texts()
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
    assert names(opened) == ["kv-full", "kv-16", "soft-16"]
    opened.get_by_role("checkbox", name="kv").uncheck()
    assert names(opened) == ["soft-16"]


def test_the_heat_map_is_one_tab_stop_moved_in_by_arrow_keys(opened: Any):
    table = opened.locator("table.heat").first
    assert table.locator('td.cell[tabindex="0"]').count() == 1
    table.locator("td.cell").first.focus()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowDown")
    active = opened.evaluate("[document.activeElement.dataset.context, document.activeElement.dataset.token]")
    assert active == ["kv-16", "1"]
    assert table.locator('td.cell[tabindex="0"]').count() == 1
    words = opened.locator("#inspect-0").inner_text()
    assert 'The template would say " rain" 60.0 %, "\\n" 10.0 %.' in words
    assert 'kv-16 would rather say " snow" 70.0 %' in words
    opened.keyboard.press("Home")
    assert opened.evaluate("document.activeElement.dataset.context") == "m002"
    assert "has the same first token" in opened.locator("#inspect-0").inner_text()


def test_deeper_colour_means_a_higher_kl(opened: Any):
    depth = "cell => parseFloat(getComputedStyle(cell).getPropertyValue('--v'))"
    cells = opened.locator("table.heat").first.locator("tbody tr").first.locator("td.cell")
    depths = [cells.nth(i).evaluate(depth) for i in range(cells.count())]
    assert depths == sorted(depths)
    assert depths[-1] == 100
    colours = cells.evaluate_all("cells => cells.map(cell => getComputedStyle(cell).backgroundColor)")
    assert len(set(colours)) == len(colours)


def test_the_data_can_be_saved(opened: Any, tmp_path: Path):
    with opened.expect_download() as found:
        opened.get_by_role("button", name="Save all numbers").click()
    assert found.value.suggested_filename == "report.json"


def test_script_in_data_and_texts_does_not_run(browser: Any, run: Path, tmp_path: Path):
    document = leaderboard() | {"name": EVIL, "template": template(EVIL)}
    document["contexts"][4]["name"] = EVIL
    change(run / "leaderboard.json", **document)
    put_lines(run / "mutations.jsonl", [m | {"detail": EVIL, "template": template(EVIL)} for m in mutations()])
    shown = samples()
    for example in shown["examples"]:
        example |= {"values": {"text": EVIL}, "output": EVIL, "gold": [EVIL, EVIL]}
    change(run / "samples.json", **shown)
    for page in watched(browser, [run], tmp_path):
        page.locator("table.heat td.cell").first.click()
        assert page.evaluate("window.hacked === undefined")
        assert page.locator("img").count() == 0
        assert EVIL in page.locator("#inspect-0").inner_text().replace('\\"', '"')


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(browser: Any, tmp_path: Path, width: int, scheme: str):
    run = write_run(tmp_path / "run", students=True)
    size = {"width": width, "height": 900}
    for page in watched(browser, [run], tmp_path, viewport=size, color_scheme=scheme):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(253, 253, 252)") == (scheme == "light")
        lead = page.locator("p.lead").bounding_box()
        assert lead["y"] + lead["height"] < 500, "the answer stands on the first screen"
        assert page.screenshot(full_page=True)


def test_print_opens_what_is_folded_and_hides_controls(opened: Any):
    folded = opened.locator("details:not([open])").count()
    assert folded > 2
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.locator("details:not([open])").count() == 0
    opened.emulate_media(media="print")
    assert not opened.locator("form.filter").is_visible()
    assert opened.locator("#board").is_visible()
    opened.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.locator("details:not([open])").count() == folded


def test_a_page_of_two_runs_sorts_and_filters_too(browser: Any, run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    for page in watched(browser, [run, other], tmp_path):
        assert len(names(page)) == 14
        page.get_by_label("Filter", exact=True).fill("other kv")
        assert names(page) == ["kv-full", "kv-16"]
