"""What ``kvopt.json`` must look like where it is read: the types of its entries. Whoever reads a record may then take
them as they are. Entries that are not named here may hold anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvopt.errors import InputError

NAME = r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$"
"""A name is a file's name: it becomes one where a context is exported."""

Name = Annotated[str, Field(pattern=NAME, max_length=200)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Base(_Part):
    name: str | None = None
    weights: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None


class _Positions(_Part):
    first: Count = 0


class _Point(_Part):
    step: int
    held_out_kl: float


class _KL(_Part):
    mean: float
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None


class _Scores(_Part):
    kl_forward: _KL
    gold_nll: float
    top1_agreement: float


class _Source(_Part):
    name: str


class _Origin(_Part):
    operation: str
    of: list[_Source] = []


class _Record(_Part):
    name: Name | None = None
    kind: Literal["soft", "kv"] | None = None
    tokens: Count | None = None
    kvopt_version: str | None = None
    positions: _Positions | None = None
    base: _Base | None = None
    content_sha256: str | None = None
    template_sha256: str | None = None
    data_sha256: str | None = None
    template_tokens: Count | None = None
    scope: str | None = None
    settings: dict[str, Any] | None = None
    best_step: int | None = None
    history: list[_Point] | None = None
    scores: dict[str, _Scores] | None = None
    origin: _Origin | None = None


def check_record(record: dict[str, Any], path: Path) -> None:
    """Raise InputError, with the first entry that is not what it must be, for a damaged record."""
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = "must be a plain file name" if place == "name" else first["msg"]
        raise InputError(f"is damaged: {place}: {message}", where=str(path), mend="restore or rebuild it") from None
