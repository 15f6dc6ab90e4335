"""``scores.jsonl``: the scores of every context on every split, one line each, and how other documents hold them."""

from __future__ import annotations

from pydantic import Field

from kvopt.documents.part import CI95, ContextKind, DocumentPart


class MeanKL(DocumentPart):
    """A mean forward KL with its interval, both in nats per gold token."""

    mean: float = Field(description="mean over gold tokens")
    ci95: CI95 | None = Field(description="95 % bootstrap interval over rows; null for a single row")


class ForwardKL(MeanKL):
    """Forward KL from the base under the original template to the base after a context, in nats per gold token."""

    p95: float = Field(description="95th percentile over gold tokens")


class SplitScores(DocumentPart):
    """How close one context is to the original template on the rows of one split."""

    kl_forward: ForwardKL
    gold_nll: float = Field(description="mean −log probability of the gold tokens, in nats per gold token")
    gold_nll_ci95: CI95 | None = Field(None, description="95 % bootstrap interval over rows; null for a single row")
    top1_agreement: float = Field(description="share of gold tokens with the same most likely token, 0 to 1")
    examples: int = Field(description="rows that were scored")
    gold_tokens: int = Field(description="gold tokens of these rows")


class _ScoredContext(DocumentPart):
    context: str = Field(description="the context's name")
    kind: ContextKind
    tokens: int = Field(description="its length in tokens or slots")
    split: str = Field(description="validation or selection")


class ScoreLine(SplitScores, _ScoredContext):
    """One line of ``scores.jsonl``: one context on one split."""
