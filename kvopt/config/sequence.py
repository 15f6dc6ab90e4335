"""The YAML document of ``kvopt sequence``: tasks in the order in which they are learned, and the arms to compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from kvopt.config.evaluation import EvaluateConfig
from kvopt.config.faults import build_model
from kvopt.config.section import NAME, Section, refuse_repeats
from kvopt.config.students import StudentConfig
from kvopt.config.yaml_file import read_tree


class StageConfig(Section):
    """One task: a kvopt config, or only the path of its file."""

    config: str = Field(min_length=1, description="a kvopt config with template and data; relative to this file")
    name: str | None = Field(None, pattern=NAME, description="name of the task; default: the config's name")
    set: list[str] = Field(default_factory=list, description="changes to that config, each a.b=value as for --set")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"config": value} if isinstance(value, str) else value


class SequenceConfig(Section):
    """Everything that the result of a sequence depends on."""

    name: str = Field("sequence", pattern=NAME, description="names the folder, runs/NAME")
    stages: list[StageConfig] = Field(min_length=1, description="the tasks, in the order in which they are learned")
    arms: list[StudentConfig] = Field(
        min_length=1,
        description="students, each trained through all stages; a schedule of kind state-adaptive scores the pool of a"
        " stage under the student as the stages before have left it",
    )
    evaluate: EvaluateConfig | None = Field(
        None, description="how every task is measured after every stage; default: its own config's evaluate section"
    )

    @model_validator(mode="after")
    def _unique_arms(self) -> SequenceConfig:
        refuse_repeats([arm.name for arm in self.arms], "arms")
        return self


def load_sequence(path: Path, overrides: Sequence[str] = ()) -> tuple[SequenceConfig, Path]:
    """Read a sequence; also return the folder that its paths are relative to.

    Args:
        overrides: as for ``kvopt.config.document.load_config``; ``arms.NAME.steps=5`` finds an arm by its name.

    Raises:
        InputError: the file cannot be read, or something in it is wrong.
    """
    return build_model(SequenceConfig, read_tree(path, overrides), str(path)), path.resolve().parent
