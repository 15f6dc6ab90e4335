"""``frontier.json``: what ``kvopt frontier`` decided while it ran, so that the same command goes on with it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from kvopt.documents.part import DocumentPart


class FrontierDocument(DocumentPart):
    """The decisions of one search."""

    asked: dict[str, Any] = Field({}, description="what was asked for; another question starts anew")
    steps: dict[str, int] = Field({}, description="optimizer steps of each learned context, in the order of the search")
    seconds: float = Field(0.0, description="spent by the attempts before this one, with seconds asked for")
