"""Several processes of one ``accelerate launch`` or ``torchrun``: the first works as if it were alone, and has the
others do their share of what it can divide.

Only the first process decides, reads what was stored and writes files; the others wait for orders: a function of a
module, and its arguments. A batch of rows is always computed by one process, and results are put back in order, so that
a score, a reference and an answer do not depend on the number of processes. Every process must see the same files.

Symbols: W processes.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from kvopt.base.work_orders import GO_ON, Failed, WorkOrder
from kvopt.errors import InputError, KvoptError, counted

if TYPE_CHECKING:
    from torch import Tensor

SECONDS_TO_WAIT = 7 * 24 * 3600
"""For an order, or for the first process while it learns contexts: a process that died is noticed at once."""
SAID = "kvopt/said"


def processes() -> int:
    """How many processes were launched together, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the first of its launch, or alone."""
    return processes() == 1 or int(os.environ.get("RANK", 0)) == 0


def one_process(what: str) -> None:
    """Refuse a launch of several processes for what takes one alone. Raises InputError."""
    if processes() > 1:
        raise InputError(f"{what} runs in one process", fix="start it without accelerate launch or torchrun")


class Launch:
    """The processes of a launch; before :meth:`start`, and where only one was launched, this process alone.

    Attributes:
        count, rank: W, and this process's number from 0.
        shares: whether a base's layers are shared out, so that each process needs the others to compute with it.
        busy: whether all processes are at work on an order; what is asked for then is done by each for itself.
    """

    def __init__(self) -> None:
        self.count, self.rank, self.busy, self.shares = 1, 0, False, False
        self._own: dict[str, Any] = {}
        self._makers: dict[str, Callable[[], Any]] = {}
        self._device: Any = "cpu"
        self._orders: Any = None
        self._result: Any = None
        self._error: Exception | None = None
        self._ending = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def start(self, device: str, shares: bool = False) -> None:
        """Join the other processes, each on its own GPU where the base is to run on one; call it before the base is
        loaded. Raises InputError for a device that they cannot share.
        """
        if processes() == 1 or self.count > 1:
            return
        import torch
        from accelerate import PartialState

        cpu = device == "cpu" or not torch.cuda.is_available()
        if not cpu:
            from kvopt.base.devices import check_gpus

            check_gpus(device, int(os.environ.get("LOCAL_WORLD_SIZE", processes())))
        waiting = timedelta(seconds=SECONDS_TO_WAIT)
        with _noticing(processes()):
            state = PartialState(cpu=cpu, timeout=waiting)
            self._orders = torch.distributed.new_group(backend="gloo", timeout=waiting)
        self.count, self.rank, self.shares = state.num_processes, state.process_index, shares
        self._device = torch.device("cpu") if cpu else state.device
        signal.signal(signal.SIGTERM, self._terminated)

    def owns(self, **things: Any) -> None:
        """Name things that every process has for itself: where arguments hold one, the others get their own."""
        self._own |= things

    def forget(self, name: str) -> None:
        """Drop what :meth:`everywhere` made, in every process."""
        if self._own.pop(name, None) is not None and self.count > 1:
            self.together(_forget, name)

    # ---- the first process

    def divides(self, base: Any) -> bool:
        """Whether work on this model can be divided now: all processes have it, and they wait for an order."""
        return self.count > 1 and not self.busy and any(thing is base for thing in self._own.values())

    def together(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``work(*arguments)`` in every process; the results in the order of the processes. Raises what one raised."""
        return self._ordered(work, arguments)

    def summed(self, work: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """The sum of the tensors that ``work(*arguments)`` gives in each process, in their dtype."""
        return self._ordered(work, arguments, summed=True)[0]

    def everywhere(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """``work(*arguments)`` in every process, which keeps the result as its own ``name``; returns this one's."""
        if name not in self._own:
            if self.count > 1 and not self.busy:
                self._ordered(work, arguments, kept=name)
            else:
                return work(*arguments)
        return self._own[name]

    @contextmanager
    def in_step(self, work: Callable[..., Any], *arguments: Any) -> Iterator[None]:
        """The others call ``work(*arguments)`` while this process does the block, which exchanges tensors with it."""
        if self.count == 1 or self.busy:
            yield
            return
        self._send(WorkOrder(self._packed((work, arguments)), in_step=True))
        self.busy = True
        with _noticing(self.count):
            yield
        self.busy = False  # after an error the others are still at work: they cannot take another order
        self._raise_first(self._gathered(None))

    def agreed(self, value: Any) -> Any:
        """The first process's value in every process, where all ask at once."""
        if self.count == 1:
            return value
        import torch

        box = [value]
        with _noticing(self.count):
            torch.distributed.broadcast_object_list(box, src=0, group=self._orders)
        return box[0]

    def wished(self, layer: int) -> int:
        """The layer that the first process wants of those that want one, where all ask at once; -1: none does."""
        import torch

        mine = torch.tensor([layer])
        wishes = [torch.empty_like(mine) for _ in range(self.count)]
        with _noticing(self.count):
            torch.distributed.all_gather(wishes, mine, group=self._orders)
        return next((int(wish) for wish in wishes if wish >= 0), -1)

    def end(self, code: int) -> None:
        """The last order: leave, with this exit code; this process of a launch leaves with it, too."""
        if self.count == 1:
            return
        if self.is_first and not self.busy:
            with suppress(KvoptError):  # they have gone
                self._send(WorkOrder(code=code))
                self._leave()
        _exit(code)

    def may_speak(self) -> bool:
        """Whether this process is the one that says what went wrong: one line for a launch."""
        self._ending = True
        if self.count == 1:
            return is_first()
        from torch.distributed.distributed_c10d import _get_default_store

        try:
            return bool(_get_default_store().add(SAID, 1) == 1)
        except Exception:  # the process that kept the store is gone: the next one speaks
            return self.rank <= 1

    def _ordered(self, work: Callable[..., Any], arguments: tuple[Any, ...], **options: Any) -> list[Any]:
        order = WorkOrder(self._packed((work, arguments)), **options)
        self._send(order)
        self.busy = True
        found = self._gathered(self._done(order, lambda: work(*arguments)))
        if order.summed and self.agreed(not any(isinstance(result, Failed) for result in found)):
            found = [self._total()]
        self.busy = False
        self._raise_first(found)
        return found

    def _raise_first(self, found: Sequence[Any]) -> None:
        """Raise the error of the first process that had one: its own as it was."""
        for rank, result in enumerate(found):
            if isinstance(result, Failed):
                raise self._error if rank == self.rank and self._error is not None else result.error

    def _packed(self, value: Any) -> bytes:
        from kvopt.base.wire import packed

        return packed(value, self._own)

    def _send(self, order: WorkOrder) -> None:
        self.agreed(order)

    # ---- the others

    def serve(self, makers: dict[str, Callable[[], Any]]) -> NoReturn:
        """Do what the first process asks for, until it has no more, and exit with its code.

        Args:
            makers: make this process's own things, by name, when an order first needs them.
        """
        self._makers = makers
        try:
            while (order := self.agreed(None)).code is None:
                self._follow(order)
        except KeyboardInterrupt:
            _exit(130)
        except KvoptError as error:
            if self.may_speak():
                print(f"error: {error}", file=sys.stderr, flush=True)
            _exit(error.exit_code)
        self._leave()
        _exit(order.code)

    def _called(self, order: WorkOrder) -> Any:
        work, arguments = self._unpacked(order.call)
        return work(*arguments)

    def _unpacked(self, data: bytes) -> Any:
        from kvopt.base.wire import unpacked

        return unpacked(data, self._mine, self._device)

    def _mine(self, name: str) -> Any:
        if name not in self._own:
            self._own[name] = self._makers[name]()
        return self._own[name]

    def _follow(self, order: WorkOrder) -> None:
        self.busy = True
        if order.in_step:
            with _noticing(self.count):
                self._called(order)
            self._gathered(None)
        else:
            self._gathered(self._done(order, lambda: self._called(order)))
            if order.summed and self.agreed(None):
                self._total()
        self.busy = False

    # ---- all

    def _done(self, order: WorkOrder, call: Callable[[], Any]) -> Any:
        """What this process sends of an order's result, or what it failed with."""
        try:
            result = call()
        except Exception as error:
            self._error = error if self.is_first else None
            return Failed.of(error, self.rank)
        if order.kept is not None:
            self._own[order.kept] = result
            return None
        self._result = result
        return None if order.summed else result

    def _gathered(self, result: Any) -> list[Any]:
        """The results of all processes, in the first; nothing in the others. One that has its own helps until all have
        theirs, where layers are shared out.
        """
        import torch

        while self.shares and (layer := self.wished(-1)) >= 0:
            self._mine("shards").hold(layer)

        boxes: list[Any] | None = [None] * self.count if self.is_first else None
        with _noticing(self.count):
            torch.distributed.gather_object(self._packed(result), boxes, dst=0, group=self._orders)
        return [self._unpacked(box) for box in boxes or ()]

    def _total(self) -> Tensor:
        import torch

        total = self._result.to(self._device)
        with _noticing(self.count):
            torch.distributed.all_reduce(total)
        return total.to(self._result.device)

    def _leave(self) -> None:
        from accelerate import PartialState

        PartialState().destroy_process_group()
        self.count = 1

    def _terminated(self, number: int, frame: Any) -> None:
        if not self.is_first:
            os._exit(128 + number)  # it has nothing to leave in order
        if not self._ending:
            self._ending = True
            raise KvoptError(f"stopped by another process of this launch, or from outside{GO_ON}")


LAUNCH = Launch()
"""The launch that this process belongs to."""


def split(
    base: Any, work: Callable[..., Any], items: Sequence[Any], *arguments: Any, progress: Callable[[int], None] | None
) -> list[Any]:
    """``work(base, item, *arguments)`` of each item, in their order; of several processes that all have the model, each
    does every W-th.

    Args:
        work: a function of a module.
        items: batches: sequences, whose lengths ``progress`` is called with when they are done.
    """
    if not LAUNCH.divides(base):
        results = []
        for item in items:
            results.append(work(base, item, *arguments))
            if progress:
                progress(len(item))
        return results
    parts = LAUNCH.together(_part, base, work, list(items), arguments, _Mine(progress))
    return [parts[place % LAUNCH.count][place // LAUNCH.count] for place in range(len(items))]


def _part(base: Any, work: Callable[..., Any], items: list[Any], arguments: tuple[Any, ...], report: _Mine) -> Any:
    """This process's share; the progress of the first stands for that of all."""
    done = []
    for first in range(0, len(items), LAUNCH.count):
        if first + LAUNCH.rank < len(items):
            done.append(work(base, items[first + LAUNCH.rank], *arguments))
        if report.progress:
            report.progress(sum(len(item) for item in items[first : first + LAUNCH.count]))
    return done


class _Mine:
    """A callback that stays in its process."""

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self.progress = progress

    def __reduce__(self) -> tuple[Any, ...]:
        return _Mine, ()


@contextmanager
def _noticing(count: int) -> Iterator[None]:
    """Turn what torch raises where another process is gone into one line."""
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError

        if not isinstance(error, DistError) and "gloo" not in str(error) and "NCCL" not in str(error):
            raise
        raise KvoptError(f"one of the {counted(count, 'process', 'processes')} of this launch ended{GO_ON}") from error


def _exit(code: int) -> NoReturn:
    """Leave without taking Python apart: there, a thread of gloo that frees its last tensor waits for a lock that it
    cannot get, and now and then aborts the process (torch 2.13).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _forget(name: str) -> None:
    LAUNCH._own.pop(name, None)
