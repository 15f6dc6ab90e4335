"""ROUGE-L F1 (Lin 2004: longest common subsequence of words), by the rouge-score package; mean over examples.

rouge-score keeps the letters a-z and digits alone, so texts of other scripts score 0: use another metric for those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvopt.train.metrics.base import Item, Metric, Verdict


@dataclass(frozen=True)
class RougeL(Metric):
    """With ``stemmer``, words are compared by their Porter stems."""

    stemmer: bool = False

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"], use_stemmer=self.stemmer)

    def verdict(self, item: Item) -> Verdict:
        return Verdict({self.name: (self._scorer.score(item.gold, item.answer)["rougeL"].fmeasure, 1.0)})
