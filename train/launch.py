"""Several processes of one ``accelerate launch``: the first prepares, all train, the first writes."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from kvopt.errors import InputError
from kvopt.train.settings import SECONDS_TO_WAIT


def one_process(what: str) -> None:
    """Refuse a launch of several processes for what takes one alone, which would wait for the others in vain. Raises
    InputError.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{what} runs in one process", fix="start it without accelerate launch")


class Launch:
    """The processes of this launch; one alone where ``WORLD_SIZE`` is not set. Make it before the base is loaded, so
    that each process gets its own GPU.
    """

    def __init__(self, device: str) -> None:
        self.processes = int(os.environ.get("WORLD_SIZE", 1))
        self.is_first = int(os.environ.get("RANK", 0)) == 0
        if self.processes > 1:
            from accelerate import PartialState

            cpu = device == "cpu" or not torch.cuda.is_available()
            PartialState(cpu=cpu, timeout=timedelta(seconds=SECONDS_TO_WAIT))

    def share(self, value: Any = None) -> Any:
        """The first process's value, in every process."""
        if self.processes == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
