"""Share of answers that are JSON and valid under a JSON schema (by the jsonschema package)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from kvopt.config.metrics import Item, Metric, Verdict
from kvopt.errors import InputError, from_extra
from kvopt.storage.files import RELATIVE, parsed_json, read_text
from kvopt.train.json_answers import NotJSON, parse_json


class JSONSchema(Metric):
    """Share of answers that a JSON schema accepts."""

    kind: Literal["json-schema"]
    definition: dict[str, Any] | str = Field(description="the schema, or a JSON file with it")
    pass_or_fail: ClassVar[bool] = True

    def prepared(self, base_dir: Path) -> JSONSchema:
        """With the schema itself as ``definition``, checked under the draft that ``$schema`` names."""
        with from_extra("metrics", "checking a JSON schema", self.place):
            from jsonschema import SchemaError
            from jsonschema.validators import validator_for
            from referencing import Registry  # noqa: F401
        schema, where = self._read(base_dir)
        try:
            validator_for(schema).check_schema(schema)
        except (SchemaError, AttributeError, TypeError) as error:
            reason = error.message if isinstance(error, SchemaError) else str(error)
            raise InputError(f"is not a JSON schema: {reason}", where=where) from None
        return self.model_copy(update={"definition": schema})

    def _read(self, base_dir: Path) -> tuple[Any, str]:
        """(the schema, where it stands)."""
        if not isinstance(self.definition, str):
            return self.definition, f"{self.place}.definition"
        path = base_dir / self.definition
        try:
            return parsed_json(read_text(path, RELATIVE)), str(path)
        except ValueError as error:
            raise InputError(f"is not a JSON file: {error}", where=str(path)) from None

    @cached_property
    def _validator(self) -> Any:
        from jsonschema.validators import validator_for
        from referencing import Registry

        return validator_for(self.definition)(self.definition, registry=Registry())  # nothing is fetched

    def verdict(self, item: Item) -> Verdict:
        """1 where the answer parses and the schema accepts it."""
        from referencing.exceptions import Unresolvable

        try:
            return self.share(self._validator.is_valid(parse_json(item.answer)))
        except NotJSON:
            return self.share(False)
        except Unresolvable as error:
            what = f"its JSON schema refers to what is not there: {error}"
            raise InputError(what, where=self.place, fix="references stay inside one schema") from None
