"""``shortened/NAME.json``: a text that ``kvopt shorten`` made, what it was asked for, and what was cut."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvopt.documents.leaderboard_file import StoredTemplate
from kvopt.documents.part import DocumentPart

SHORTENED = "shortened"
"""The folder of these files, and the stage of ``ledger.jsonl`` that makes them."""


class LostLiteral(DocumentPart):
    """A literal of the template that the shorter text no longer has whole."""

    text: str = Field(description="as the template has it")
    state: Literal["cut", "broken"] = Field(description="cut: nothing of it is left; broken: a part of it is")


class ShortenedDocument(DocumentPart):
    """One shortened text."""

    name: str = Field(description="of the context on the leaderboard")
    asked: str = Field(description="what was asked for, such as tokens 64, keep 0.97 or max-kl 0.02")
    tokens: int = Field(description="of the text before the first slot, as the model reads it")
    original_tokens: int = Field(description="of the template")
    kl_selection: float = Field(description="forward KL on the rows that decided, nats per gold token")
    rows: int = Field(description="selection rows that decided")
    trials: int = Field(description="rows that were run through the model in the search so far")
    cut: list[str] = Field([], description="the stretches of text that were cut, in reading order")
    lost_literals: list[LostLiteral] = Field([], description="literals that the text no longer has whole")
    template: StoredTemplate = Field(description="the shortened template")
