"""What every document is made of: the model that its mappings share, and the values that several documents hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

CI95 = Annotated[tuple[float, float], Field(strict=False)]
"""Lower and upper end of a 95 % interval. (JSON has no tuples, so a list is taken for one.)"""

FormatVersion = Annotated[int, Field(description="of this kind of document")]

ContextKind = Annotated[
    Literal["text", "soft", "kv"],
    Field(description="text; soft, an embedding for each slot; or kv, a key and a value for each slot"),
]


class DocumentPart(BaseModel):
    """One mapping of a document.

    Types are strict: a number in quotes is a fault. Keys that a file lacks take their default, and keys that are not
    named here are kept, so that files of older and newer versions are read.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """The mapping as it is written: keys in the order of the fields, without those that were never set."""
        return self.model_dump(mode="json", exclude_unset=True)

    def given(self) -> dict[str, Any]:
        """The fields that were set, by name: arguments for a document that has these fields among others."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class BaseIdentity(DocumentPart):
    """Which base a file belongs to: its name, and SHA-256 hashes that say whether another base is the same one."""

    name: str | None = Field(None, description="as in the config: a hub id, a folder or a .gguf file")
    weights: str | None = Field(None, description="hash of the weight files")
    config: str | None = Field(None, description="hash of the architecture's settings")
    tokenizer: str | None = Field(None, description="hash of the tokenizer")
    chat_template: str | None = Field(None, description="hash of the chat template; null: the tokenizer has none")
    source: str | None = Field(None, description="where the built-in base or a converted one came from; null: neither")
    quantization: str | None = Field(None, description="model.quantization, as JSON; absent: none")


class Estimate(DocumentPart):
    """A mean with its interval."""

    mean: float | None = Field(description="null where the quantity is not defined (0 / 0)")
    ci95: CI95 | None = Field(None, description="95 % interval; null where there is none, as for one row or seed")


class StandsOn(DocumentPart):
    """What a result was measured on. Results that stand on different things are not shown side by side."""

    base: BaseIdentity | None = Field(None, description="the frozen model")
    template_sha256: str | None = Field(None, description="hash of the original template")
    data_sha256: str | None = Field(None, description="hash of all rows")
    tokens_sha256: str | None = Field(None, description="hash of all rows as token ids, rendered with the template")

    def differs_from(self, other: StandsOn) -> str | None:
        """The first thing that is another, in words; None where all is the same, as far as both say what it is."""
        mine, its = (one.base.to_json() if one.base else {} for one in (self, other))
        known = (mine.keys() & its.keys()) - {"name", "source"}
        if any(mine[what] != its[what] for what in known) or (
            mine and its and mine.get("quantization") != its.get("quantization")
        ):
            return "another base"
        for name, what in (("template_sha256", "another template"), ("data_sha256", "other data")):
            if _differ(getattr(self, name), getattr(other, name)):
                return what
        return "another rendering of the template" if _differ(self.tokens_sha256, other.tokens_sha256) else None


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other
