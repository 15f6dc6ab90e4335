"""Worker processes for students that do not depend on each other: on this machine, or on a Ray cluster.

joblib keeps the pool. Workers write into the run directory of the command that started them, each piece of work under
its own lock, so that it is done once even where a pool starts it again. They show their progress as lines.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvopt.base.launch import one_process
from kvopt.config.document import Config
from kvopt.errors import KvoptError, from_extra

SECONDS_IDLE = 30
"""After which a worker without work ends, should the command that it works for have been killed."""


@dataclass(frozen=True)
class Workers:
    """How many worker processes, and where.

    Attributes:
        count: processes.
        ray: address of a Ray cluster ("auto": the one of this machine); None: processes of this machine.
    """

    count: int
    ray: str | None = None

    def __post_init__(self) -> None:
        one_process("a command with workers of its own (--jobs, --ray)")

    def each(self, work: Callable[..., None], items: Iterable[tuple[Any, ...]]) -> Iterator[None]:
        """``work(*item)`` of every item in some worker; yields when one is done.

        Raises:
            KvoptError: what a worker raised, or that one was killed; what the others finished is kept.
        """
        from joblib import Parallel, delayed, parallel_config
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        threads = max(1, torch.get_num_threads() // self.count) if self.ray is None else None
        here: dict[str, Any] = {"backend": "loky", "idle_worker_timeout": SECONDS_IDLE}
        place = here if self.ray is None else {"backend": "ray"}
        calls = [delayed(_call)(threads, work, *item) for item in items]
        try:
            with self._connected(), parallel_config(n_jobs=self.count, **place):
                if self.ray is None:
                    yield from Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch=self.count)(calls)
                else:  # its backend returns all at the end; the workers' lines come through as they work
                    yield from Parallel(batch_size=1)(calls)
        except TerminatedWorkerError:
            fix = "run the same command again to go on, with fewer --jobs where memory was short"
            raise KvoptError(f"a worker process was killed; finished students are kept: {fix}") from None

    @contextmanager
    def _connected(self) -> Iterator[None]:
        if self.ray is None:
            yield
            return
        with from_extra("ray", "a Ray cluster", "--ray"):
            import ray
            from ray.util.joblib import register_ray
        try:
            ray.init(address=self.ray, logging_level="ERROR", log_to_driver=True)
        except (ConnectionError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise KvoptError(f"--ray {self.ray}: no cluster can be reached: {reason}") from None
        register_ray()
        try:
            yield
        finally:
            ray.shutdown()


def _call(threads: int | None, work: Callable[..., None], *item: Any) -> None:
    """In the worker: as many threads as are its share, and no traceback at Ctrl-C, which the command answers."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        work(*item)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def on_own_device(config: Config) -> Config:
    """The config with a GPU of its own for this worker, where the machine has several and the config leaves it open."""
    worker = re.fullmatch(r"LokyProcess-(\d+)", multiprocessing.current_process().name)
    if worker is None or config.model.device not in ("auto", "cuda") or torch.cuda.device_count() < 2:
        return config  # Ray shows each worker the GPUs that it may use
    device = f"cuda:{(int(worker[1]) - 1) % torch.cuda.device_count()}"
    return config.model_copy(update={"model": config.model.model_copy(update={"device": device})})


class Voice:
    """What a worker says: nothing while it opens what is there, then lines on stderr."""

    def __init__(self) -> None:
        self.is_on = False

    def __call__(self, line: str) -> None:
        if self.is_on:
            print(line, file=sys.stderr, flush=True)
