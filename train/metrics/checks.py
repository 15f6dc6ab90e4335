"""A sum of pass/fail checks: how many of them an answer passes, and the rate of each."""

from __future__ import annotations

from dataclasses import dataclass

from kvopt.train.metrics.base import Item, Metric, Ratio, Verdict


@dataclass(frozen=True)
class Checks(Metric):
    """``NAME``: mean number of checks passed; ``NAME.all``: share of answers that pass every one; ``NAME.CHECK``: the
    rate of each. A check passes where its metric gives its highest value.
    """

    checks: tuple[Metric, ...] = ()

    def verdict(self, item: Item) -> Verdict:
        passed = {check.name: check.passed(item) for check in self.checks}
        ratios: dict[str, Ratio] = {
            self.name: (float(sum(passed.values())), 1.0),
            f"{self.name}.all": (float(all(passed.values())), 1.0),
        }
        return Verdict(ratios | {f"{self.name}.{name}": (float(hit), 1.0) for name, hit in passed.items()})
