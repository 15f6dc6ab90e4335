"""What every section of the config is: strict (an unknown key is a fault), and the patterns that names must match."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of runs, learned contexts and students: each becomes a folder's name."""

LABEL = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
"""Of metrics and hand-written templates: names without dots, since results address them by dotted paths."""


def refuse_repeats(names: Sequence[str], what: str) -> None:
    """Raises ValueError for the first name that stands twice; ``what`` they name, in the plural, such as "arms"."""
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(f"two {what} are named {name!r}")


class Section(BaseModel):
    """A mapping of the YAML whose keys are all known."""

    model_config = ConfigDict(extra="forbid")


class FrozenSection(Section):
    """A section that is never changed after it was read, so that it can be a default of another one."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Shorthand(Section):
    """A section that may also be written as plain text: the value of one of its keys."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(schema)]}
