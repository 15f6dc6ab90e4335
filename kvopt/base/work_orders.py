"""What the processes of a launch tell each other: an order of the first, and an error of one."""

from __future__ import annotations

from dataclasses import dataclass

from kvopt.errors import KvoptError

GO_ON = "; finished work is kept: run the same command again to go on"


@dataclass(frozen=True)
class WorkOrder:
    """What the first process asks the others for: to call a function, without exchange between the processes.

    Attributes:
        call: function and arguments, packed.
        kept: name under which each process keeps the result for later orders; None: the first gets it.
        summed: the results are tensors, and the first gets their sum.
        in_step: the function talks to the other processes by itself.
        code: leave, with this exit code.
    """

    call: bytes = b""
    kept: str | None = None
    summed: bool = False
    in_step: bool = False
    code: int | None = None


@dataclass(frozen=True)
class Failed:
    """An error of one process, as the first raises it."""

    error: KvoptError

    @classmethod
    def of(cls, error: Exception, rank: int) -> Failed:
        if isinstance(error, KvoptError):
            return cls(error)
        reason = " ".join(str(error).split())[:300]
        return cls(KvoptError(f"process {rank} of the launch failed: {type(error).__name__}: {reason}{GO_ON}"))
