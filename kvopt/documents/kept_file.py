"""``.kept/NAME-HASH/kept.json``: a result that was put aside, and where in the run directory it belongs."""

from __future__ import annotations

from pydantic import Field

from kvopt.documents.part import DocumentPart, FormatVersion


class KeptRecord(DocumentPart):
    """``.kept/NAME-HASH/kept.json``: a result that was put aside, and where in the run directory it belongs."""

    format_version: FormatVersion = 1
    stage: str = Field(description="the stage that made it, such as contexts/kv-64")
    key: str = Field(description="hash of everything that it depends on; the stage takes it up again under this key")
    why: str = Field(description="why it was put aside")
    paths: list[str] = Field(description="its files and folders, relative to the run directory")
