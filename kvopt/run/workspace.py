"""Where a stage works: the run directory, and what is shown meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvopt.console.progress import Progress
from kvopt.run.directory import RunDirectory


@dataclass(frozen=True)
class Workspace:
    """What every stage is given beside its inputs: a locked run directory and the progress to report to."""

    directory: RunDirectory
    progress: Progress

    @property
    def say(self) -> Callable[[str], None]:
        """Gets a line for each stage."""
        return self.progress.say
