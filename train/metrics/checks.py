"""A sum of pass/fail checks: how many of them an answer passes, and the rate of each.

``NAME``: mean number of checks passed; ``NAME.all``: share of answers that pass every one; ``NAME.CHECK``: the rate of
each. A check passes where its metric gives its highest value.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from kvopt.config.metrics import Item, Metric, Ratio, Verdict, check_distinct

if TYPE_CHECKING:
    from kvopt.config.evaluation import CheckConfig


class Checks(Metric):
    """A sum of pass/fail checks; the rate of each is shown."""

    kind: Literal["checks"]
    checks: list[CheckConfig] = Field(min_length=1, description="metrics that an answer passes or fails")

    @field_validator("checks")
    @classmethod
    def _distinct(cls, value: list[Metric]) -> list[Metric]:
        check_distinct(value, "checks")
        if any(check.label == "all" for check in value):
            raise ValueError("'all' is the name of the share that passes every check; name the check otherwise")
        return value

    def prepared(self, base_dir: Path) -> Checks:
        """With each check prepared."""
        return self.model_copy(update={"checks": [check.prepared(base_dir) for check in self.checks]})

    def verdict(self, item: Item) -> Verdict:
        """Counts, all, and each."""
        passed = {check.label: check.passed(item) for check in self.checks}
        ratios: dict[str, Ratio] = {
            self.label: (float(sum(passed.values())), 1.0),
            f"{self.label}.all": (float(all(passed.values())), 1.0),
        }
        return Verdict(ratios | {f"{self.label}.{name}": (float(hit), 1.0) for name, hit in passed.items()})
