"""``manifest.json`` of a run directory: what its numbers depend on, and the key of every stage."""

from __future__ import annotations

from pydantic import Field

from kvopt.documents.part import BaseIdentity, DocumentPart


class RunManifest(DocumentPart):
    """``manifest.json`` of a run directory: what its numbers depend on, and the key of every stage."""

    format_version: int | None = Field(None, description="of this kind of document")
    kvopt_version: str | None = Field(None, description="the version that last worked in the directory")
    versions: dict[str, str] = Field({}, description="of Python and the libraries that numbers depend on")
    seed: int | None = Field(None, description="of the config")
    device: str | None = Field(None, description="such as cpu or cuda:0")
    threads: int | None = Field(None, description="CPU threads of torch")
    dtype: str | None = Field(None, description="of the base, such as float32")
    base: BaseIdentity | None = Field(None, description="the frozen model")
    template_sha256: str | None = Field(None, description="hash of the original template")
    data_sha256: str | None = Field(None, description="hash of all rows")
    tokens_sha256: str | None = Field(None, description="hash of all rows as token ids")
    prompt_time: str | None = Field(
        None, description="what a chat template that writes the date was told when the run began, and is told since"
    )
    config_folder: str | None = Field(
        None, description="the folder that the config's paths are relative to, from the run directory"
    )
    stages: dict[str, str] = Field(
        {}, description="hash of what each stage depends on; a stage whose hash did not change is not run again"
    )
