"""``kvopt bench long``: time and memory per gold token, from short to very long gold outputs, through all of the way.

A reference, a score and a step are measured at each number of gold tokens, each number in a process of its own. Rows
are the config's own gold outputs, joined until they are long; a row is as long as it has to be, or as the base's window
lets it be, and what is left goes to further rows. One row is run at a time (batch_size 1, micro_batch_size 1).
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvopt.base.prefix import Prefix
from kvopt.config.document import Config
from kvopt.errors import InputError
from kvopt.kernels.memory import peak, reset_peak
from kvopt.learning.descent import differentiated_loss
from kvopt.learning.start_task import StartTask
from kvopt.measure.reference import build_reference
from kvopt.measure.score import score_prefix
from kvopt.run.run import Run
from kvopt.task.seam import Encoded, Row

TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
SLOTS = 64
LONGEST_ROW = 4096
"""Gold tokens of a row, at most: attention's own work for a token grows with the row, whoever computes the KL."""


@dataclass(frozen=True)
class LongPoint:
    """One stage at one number of gold tokens.

    Attributes:
        stage: reference, score or step.
        gold_tokens: in all rows together; ``row_tokens`` in each of them.
        seconds: of the whole stage.
        extra_bytes: the most memory in use beyond what was in use before it.
    """

    stage: str
    gold_tokens: int
    row_tokens: int
    seconds: float
    extra_bytes: int

    @property
    def microseconds_per_token(self) -> float:
        """Of gold."""
        return 1e6 * self.seconds / self.gold_tokens


def bench_long(
    config: Config,
    base_dir: Path,
    *,
    tokens: Sequence[int] = TOKENS,
    seconds: float | None = None,
    measured: Callable[[LongPoint], object] = lambda point: None,
) -> list[LongPoint]:
    """The three stages at each number of gold tokens, the smallest first.

    Args:
        seconds: no larger number is begun once so long has passed, or would with twice as many tokens.
        measured: called with every point as soon as its number of tokens is done.
    """
    points: list[LongPoint] = []
    began = time.monotonic()
    for count in sorted(set(tokens)):
        last = sum(point.seconds for point in points if point.gold_tokens == points[-1].gold_tokens)
        growth = count / points[-1].gold_tokens if points else 1.0
        if points and seconds is not None and time.monotonic() - began + growth * last > seconds:
            break
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            new = pool.apply(_measured, (config, base_dir, count))
        for point in new:
            measured(point)
        points += new
    return points


def long_rows(rows: Sequence[Row], gold_tokens: int, longest: int) -> list[Row]:
    """Rows with so many gold tokens together, none with more than ``longest``: gold outputs of ``rows``, one after the
    other and over again.
    """
    stream = itertools.cycle(token for row in rows for token in row.gold)
    result: list[Row] = []
    while gold_tokens > 0:
        gold = tuple(itertools.islice(stream, min(gold_tokens, longest)))
        result.append(Row(f"long-{len(result)}", rows[0].body, gold))
        gold_tokens -= len(gold)
    return result


def _measured(config: Config, base_dir: Path, gold_tokens: int) -> list[LongPoint]:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, base_dir, Path(folder) / "run", say=lambda line: None)
        base, task = run.load_base(), run.task()
        encoded = task.encoded
        room = base.geometry.window - len(encoded.prefix) - len(encoded.rows[0].body)
        if room < 1:
            raise InputError("the window has no room for a gold output after the template", where="model")
        rows = long_rows(encoded.rows, gold_tokens, min(room, LONGEST_ROW))
        long = Encoded(encoded.prefix, tuple(rows))
        template = task.original.prefix(base)
        _warm(rows, lambda few: build_reference(base, template, Encoded(long.prefix, few), Path(folder) / "warm"))
        points = []

        def timed(stage: str, work: Callable[[], Any]) -> Any:
            before = reset_peak(base.device)
            start = time.perf_counter()
            result = work()
            if base.device.type == "cuda":
                torch.cuda.synchronize(base.device)
            seconds = time.perf_counter() - start
            extra = max(0, peak(base.device) - before)
            points.append(LongPoint(stage, gold_tokens, len(rows[0].gold), seconds, extra))
            return result

        reference = timed(
            "reference", lambda: build_reference(base, template, long, Path(folder) / "reference", batch_size=1)
        )
        slots = min(SLOTS, len(encoded.prefix))
        tensor = StartTask(base, "bench", "kv", slots, encoded.prefix).from_ids(encoded.prefix[:slots]).float()
        prefix = Prefix.unstack(tensor, base.dtype)
        timed("score", lambda: score_prefix(base, prefix, rows, reference, batch_size=1))
        leaf = tensor.clone().requires_grad_(True)
        timed("step", lambda: differentiated_loss(base, "kv", leaf, rows, reference, leaf=leaf, at_once=1))
        return points


def _warm(rows: Sequence[Row], work: Callable[[tuple[Row, ...]], object]) -> None:
    """The same on a few tokens, so that what is made once for the process is not counted."""
    work((Row("warm", rows[0].body, rows[0].gold[:16]),))


def as_document(points: Sequence[LongPoint]) -> dict[str, Any]:
    """The points, with time and memory per gold token, and how both grew from the least tokens to the most."""
    rows = [
        asdict(point)
        | {
            "microseconds_per_token": point.microseconds_per_token,
            "extra_bytes_per_token": point.extra_bytes / point.gold_tokens,
        }
        for point in points
    ]
    growth = {}
    for stage in dict.fromkeys(point.stage for point in points):
        first, *_, last = [point for point in points if point.stage == stage] * 2
        growth[stage] = {
            "tokens": last.gold_tokens / first.gold_tokens,
            "seconds_per_token": (last.seconds / last.gold_tokens) / (first.seconds / first.gold_tokens),
            "extra_bytes": last.extra_bytes / max(1, first.extra_bytes),
        }
    return {"points": rows, "growth": growth}
