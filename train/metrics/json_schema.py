"""Share of answers that are JSON and valid under a JSON schema (by the jsonschema package)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonschema import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from kvopt.errors import InputError
from kvopt.storage.files import RELATIVE, read_text
from kvopt.train.metrics.base import Item, Metric, Verdict, share
from kvopt.train.metrics.json_answers import NotJSON, parse_json


@dataclass(frozen=True)
class JSONSchema(Metric):
    """1 where the answer parses and ``schema`` accepts it. The draft is the one that ``$schema`` names."""

    schema: Any = field(default_factory=dict)

    @cached_property
    def _validator(self) -> Any:
        return validator_for(self.schema)(self.schema, registry=Registry())  # nothing is fetched from the network

    def verdict(self, item: Item) -> Verdict:
        try:
            return share(self.name, self._validator.is_valid(parse_json(item.answer)))
        except NotJSON:
            return share(self.name, False)
        except Unresolvable as error:
            what = f"its JSON schema refers to what is not there: {error}"
            raise InputError(
                what, where=f"evaluate.metrics.{self.name}", mend="references stay inside one schema"
            ) from None


def read_schema(schema: dict[str, Any] | str, base_dir: Path, where: str) -> Any:
    """The checked schema, given itself or as a JSON file's path. Raises InputError."""
    value: Any = schema
    if isinstance(schema, str):
        path = base_dir / schema
        try:
            value = json.loads(read_text(path, RELATIVE))
        except ValueError as error:
            raise InputError(f"is not a JSON file: {error}", where=str(path)) from None
        where = str(path)
    try:
        validator_for(value).check_schema(value)
    except (SchemaError, AttributeError, TypeError) as error:
        reason = error.message if isinstance(error, SchemaError) else str(error)
        raise InputError(f"is not a JSON schema: {reason}", where=where) from None
    return value
