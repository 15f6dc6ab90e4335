"""ROUGE-L F1 (Lin 2004: longest common subsequence of words), by the rouge-score package; mean over examples.

rouge-score keeps the letters a-z and digits alone, so texts of other scripts score 0: use another metric for those.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kvopt.config.metrics import Item, Metric, Verdict
from kvopt.errors import from_extra


class RougeL(Metric):
    """ROUGE-L F1, mean over examples."""

    kind: Literal["rouge-l"]
    stemmer: bool = Field(False, description="compare words by their Porter stems")

    def prepared(self, base_dir: Path) -> RougeL:
        """Itself, where the package is there."""
        with from_extra("metrics", "ROUGE-L", self.place):
            self._scorer  # noqa: B018  (it is loaded here)
        return self

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"], use_stemmer=self.stemmer)

    def verdict(self, item: Item) -> Verdict:
        """F1 of answer and gold output."""
        return Verdict({self.label: (self._scorer.score(item.gold, item.answer)["rougeL"].fmeasure, 1.0)})
