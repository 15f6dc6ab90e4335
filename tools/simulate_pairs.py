"""How often contexts are told apart that are equal, and that are not: three rules on made-up rows.

    python tools/simulate_pairs.py [--pairs 2000] [--studies]

Rows differ in length (log-normal) and difficulty (exponential); the KL of a context on a row is gamma-distributed
around the row's difficulty. "exchangeable" contexts have the same distribution; "skewed" ones have the same mean, but
one of them is far off on few rows. The rules: random signs (kvopt.measure.paired), a paired bootstrap interval that
excludes 0, and two bootstrap intervals that do not overlap.

With ``--studies``: arms of a study, over seeds. A row's difference is the sum of one of the row, one of the seed and
one of both. The rules: the test of kvopt.train.study.seeds, and two intervals over seeds that do not overlap.
"""

from __future__ import annotations

import argparse

import numpy as np

from kvopt.measure.bootstrap import bounds, drawn_rows
from kvopt.measure.paired import LEVEL, sign_flip_p
from kvopt.train.study.seeds import over_seeds, paired_p

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


def studies(count: int, rng: np.random.Generator) -> None:
    """Prints the table of studies."""
    print("| seeds | rows | row / seed / both | arms | paired test | no overlap |\n|---|---|---|---|---|---|")
    for seeds in (3, 5):
        for rows in (16, 100):
            for of_row, of_seed, of_both in ((1, 0, 0.5), (1, 0.1, 0.5), (1, 0.3, 0.5), (0, 0.2, 1)):
                for effect in (0.0, 0.5):
                    found = [_study(seeds, rows, of_row, of_seed, of_both, effect, rng) for _ in range(count)]
                    shares = " | ".join(f"{share:.1%}" for share in np.mean(found, 0))
                    kind = "equal" if not effect else f"{effect:g} apart"
                    print(f"| {seeds} | {rows} | {of_row} / {of_seed} / {of_both} | {kind} | {shares} |", flush=True)


def _study(
    seeds: int, rows: int, of_row: float, of_seed: float, of_both: float, effect: float, rng: np.random.Generator
) -> tuple[bool, bool]:
    reference = rng.normal(size=rows) + rng.normal(size=(seeds, 1)) * of_seed / 2**0.5
    reference = reference + rng.normal(size=(seeds, rows)) * of_both / 2**0.5
    arm = reference + effect + of_row * rng.normal(size=rows) + of_seed * rng.normal(size=(seeds, 1))
    arm = arm + of_both * rng.normal(size=(seeds, rows))
    difference = arm - reference
    p = paired_p(list(difference.mean(1)), float(difference.mean(0).var(ddof=1) / rows), rows)
    (low, high), (first, last) = (over_seeds(list(one.mean(1))).ci95 for one in (reference, arm))  # type: ignore[misc]
    return p is not None and p <= LEVEL, first > high or low > last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--studies", action="store_true", help="of arms over seeds instead")
    options = parser.parse_args()
    pairs, rng = options.pairs, np.random.default_rng(0)
    if options.studies:
        studies(pairs, rng)
        return
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
