"""Progress of long work: lines in a log, bars on a terminal, and an estimate that counts this process alone."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from kvopt.console.live import LiveTable
from kvopt.console.progress import Progress, advance, duration, step_reporter


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def log(clock: Clock, lines: list[str]) -> Progress:
    """Progress into a log file."""
    return Progress(lines.append, False, clock=clock)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_a_line_at_the_start_and_one_every_thirty_seconds(
    log: Progress, clock: Clock, lines: list[str]
) -> None:
    with log.bar("kv-32", 40, unit="step") as bar:
        report = step_reporter(bar)
        report(0, None, 0.5)
        for step in range(1, 41):
            clock.sleep(10)
            report(step, 0.25, 0.0127 if step == 16 else None)
    assert lines[0] == "kv-32: 40 steps"
    assert lines[1] == "kv-32 step 3/40, held-out 0.5000, train 0.2500, about 6 min left"
    assert lines[6] == "kv-32 step 18/40, held-out 0.0127, train 0.2500, about 4 min left"
    assert len(lines) == 1 + 13


def test_work_that_goes_on_shows_where_and_counts_only_its_own_time(
    log: Progress, clock: Clock, lines: list[str]
) -> None:
    with log.bar("kv-32", 40, unit="step") as bar:
        report = step_reporter(bar)
        report(24, None, 0.5)
        assert bar.line == "kv-32 step 24/40, held-out 0.5000"
        clock.sleep(60)
        report(25, 0.25, None)
        assert bar.seconds_left == 15 * 60
    assert lines[-1] == "kv-32 step 25/40, held-out 0.5000, train 0.2500, about 15 min left"


def test_rows_that_were_there_already_are_no_pace(log: Progress, clock: Clock) -> None:
    with log.bar("reference", 100) as bar:
        bar.take_over(80)
        assert bar.seconds_left is None
        clock.sleep(10)
        advance(bar)(10)
        assert bar.seconds_left == 10
        advance(bar)(10)
        assert bar.seconds_left is None
        assert bar.line == "reference row 100/100"


def test_contexts_that_take_no_time_are_taken_over(log: Progress, clock: Clock, lines: list[str]) -> None:
    for number in log.over("scoring", range(10)):
        clock.sleep(0 if number < 8 else 40)
    assert lines == ["scoring: 10 contexts", "scoring context 9/10, about 40 s left"]


def test_work_inside_of_other_work_is_told_of_too(log: Progress, clock: Clock, lines: list[str]) -> None:
    with log.bar("study", 3, unit="student") as outer:
        for name in ("a", "b", "c"):
            with log.bar(name, 2, unit="step", begin=f"student {name}") as inner:
                clock.sleep(40)
                inner.update()
            outer.update()
    assert lines[:4] == ["study: 3 students", "student a", "a step 1/2, about 40 s left", "student b"]


def test_nothing_is_said_of_no_work(log: Progress, lines: list[str]) -> None:
    assert list(log.over("scoring mutations", [])) == []
    assert lines == []


def test_a_terminal_shows_at_once_where_work_goes_on(clock: Clock, lines: list[str]) -> None:
    console = terminal()
    progress = Progress(lines.append, True, clock=clock, console=console)
    with progress.bar("kv-32", 40, unit="step") as bar:
        report = step_reporter(bar)
        report(24, None, 0.0127)
        at_once = drawn(console)
    assert all(text in at_once for text in ("kv-32", "24/40", "held-out 0.0127"))
    assert lines == []


def test_a_terminal_keeps_the_bar_around_another_one(clock: Clock) -> None:
    console = terminal()
    progress = Progress(print, True, clock=clock, console=console)
    with progress.bar("study", 3, unit="student") as outer:
        with progress.bar("[a]", 7, unit="step") as inner:
            inner.update(5)
        outer.update(2)
    with progress.bar("later", 11):
        pass
    for text in ("[a]", "2/3", "later", "0/11"):
        assert text in drawn(console)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (7, "7 s"), (43, "45 s"), (89, "90 s"), (91, "2 min"), (200, "3 min"), (5500, "1.5 h")],
)
def test_a_duration_is_as_exact_as_an_estimate(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_live_table_says_each_row_once_in_a_log(lines: list[str]) -> None:
    with LiveTable(lines.append, drawn=False) as table:
        table.show(Text("one"), {"a": "a: 1"})
        table.show(Text("two"), {"b": "b: 2", "a": "a: 1"})
        table.show(Text("two"), {"b": "b: 3", "a": "a: 1"})
    assert lines == ["a: 1", "b: 2", "b: 3"]


def test_a_live_table_is_drawn_in_place_beside_a_bar(clock: Clock, lines: list[str]) -> None:
    console = terminal()
    progress = Progress(lines.append, True, clock=clock, console=console)
    with LiveTable(lines.append, drawn=True, console=console) as table:
        table.show(Text("first table"), {"a": "a: 1"})
        with progress.bar("scoring", 3) as bar:
            bar.update()
            table.show(Text("second table"), {"a": "a: 1", "b": "b: 2"})
    for text in ("first table", "second table", "scoring", "1/3"):
        assert text in drawn(console)
    assert lines == []
