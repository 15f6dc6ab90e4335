"""``--to trl-dataset``: the run's examples under a text context, as the conversational or plain rows that TRL's
trainers read.
"""

from __future__ import annotations

from pathlib import Path

from kvopt.errors import InputError
from kvopt.export.exporter import Options, Written
from kvopt.export.source import Source


def write(source: Source, place: Path, options: Options) -> Written:
    raise InputError("is not there yet", where="--to trl-dataset")
