"""``kvopt-export.json`` in the folder of an export: which context it is, and how another tool uses it."""

from __future__ import annotations

from pydantic import Field

from kvopt.documents.part import BaseIdentity, ContextKind, DocumentPart, FormatVersion
from kvopt.documents.scores_file import ForwardKL, MeanKL


class ContextMetrics(DocumentPart):
    """How close a context is to the original template; nats per gold token."""

    split: str = Field(description="the rows that it was measured on")
    kl_forward: ForwardKL | MeanKL = Field(description="without p95 where it is from a learning curve")
    gold_nll: float | None = Field(None, description="mean −log probability of the gold tokens")
    top1_agreement: float | None = Field(None, description="share of gold tokens with the same most likely token")
    examples: int | None = Field(None, description="rows that were scored")
    gold_tokens: int | None = Field(None, description="gold tokens of these rows")
    step: int | None = Field(None, description="of a learning curve: the step that was measured")


class ExportFacts(DocumentPart):
    """What single formats add to the record."""

    peft_type: str | None = Field(None, description="of peft: CARTRIDGE, PREFIX_TUNING or PROMPT_TUNING")
    layers: int | None = Field(None, description="of hf-cache and mlx: layers of the base")
    kv_heads: int | None = Field(None, description="of hf-cache and mlx: heads of keys and values in a layer")
    head_dim: int | None = Field(None, description="of hf-cache and mlx: width of a head")
    hidden_size: int | None = Field(None, description="of prompt-embeds: width of an embedding")
    slots: list[str] | None = Field(None, description="of text: the names of the template's slots")
    rows: int | None = Field(None, description="of trl-dataset: rows that were written")
    block_size: int | None = Field(None, description="of vllm: tokens in a block of the server's paged cache")
    partial_block: bool | None = Field(None, description="of vllm: whether the last block may be partly filled")


class _Exported(DocumentPart):
    format_version: FormatVersion = 1
    kvopt_version: str | None = Field(None, description="the version that wrote it")
    to: str = Field(description="the format: peft, prompt-embeds, hf-cache, mlx, text, trl-dataset or vllm")
    name: str = Field(description="of the context")
    kind: ContextKind
    tokens: int | None = Field(None, description="the context's length in tokens or slots; null where it is not known")
    base: BaseIdentity
    template_sha256: str | None = Field(None, description="hash of the original template")
    data_sha256: str | None = Field(None, description="hash of all rows")
    content_sha256: str | None = Field(None, description="hash of the context's tensor")
    template_tokens: int | None = Field(None, description="tokens of the original template that it stands for")
    metrics: ContextMetrics | None = Field(None, description="null: not measured")
    summary: str = Field(description="one sentence that says what the folder is")


class ExportRecord(ExportFacts, _Exported):
    """``kvopt-export.json`` in the folder of an export: which context it is, and how another tool uses it."""

    snippet: str = Field(description="Python that uses the folder, run from inside it")
