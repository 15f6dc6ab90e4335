"""How often contexts are told apart that are equal, and that are not: three rules on made-up rows.

    python tools/simulate_pairs.py [--pairs 2000]

Rows differ in length (log-normal) and difficulty (exponential); the KL of a context on a row is gamma-distributed
around the row's difficulty. "exchangeable" contexts have the same distribution; "skewed" ones have the same mean, but
one of them is far off on few rows. The rules: random signs (kvopt.measure.paired), a paired bootstrap interval that
excludes 0, and two bootstrap intervals that do not overlap.
"""

from __future__ import annotations

import argparse

import numpy as np

from kvopt.measure.bootstrap import bounds, drawn_rows
from kvopt.measure.paired import LEVEL, sign_flip_p

SHAPES = {"exchangeable": (0.7, 0.7), "skewed": (0.3, 3.0)}


def pairs_of(case: str, rows: int, pairs: int, effect: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Sums of two contexts and gold tokens, [pairs, rows] each."""
    counts = np.maximum(1, rng.lognormal(3, 0.6, (pairs, rows))).round()
    hard = rng.gamma(1.0, 1.0, (pairs, rows)) * counts
    first, second = (hard * rng.gamma(shape, 1 / shape, (pairs, rows)) for shape in SHAPES[case])
    return (1 + effect) * first, second, counts


def told_apart(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> tuple[bool, bool, bool]:
    """Whether each of the three rules tells one pair apart."""
    draws = drawn_rows(len(counts), 0, 1000)
    tokens = counts[draws].sum(-1)
    low, high = bounds((first - second)[draws].sum(-1) / tokens)
    ends = [bounds(sums[draws].sum(-1) / tokens) for sums in (first, second)]
    overlap = ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]
    return sign_flip_p(first - second) <= LEVEL, bool(low > 0 or high < 0), not overlap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    pairs = parser.parse_args().pairs
    rng = np.random.default_rng(0)
    print(
        "| contexts | rows | KL of the first | random signs | paired interval | no overlap |\n|---|---|---|---|---|---|"
    )
    for case in SHAPES:
        for rows in (8, 16, 32, 64):
            for effect in (0.0, 0.5):
                found = [told_apart(*pair) for pair in zip(*pairs_of(case, rows, pairs, effect, rng), strict=True)]
                shares = " | ".join(f"{share:.1%}" for share in np.mean(found, 0))
                print(f"| {case} | {rows} | {'equal' if not effect else '+50 %'} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
