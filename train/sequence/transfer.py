"""Average performance, backward and forward transfer from the matrix of task scores after each stage.

R[i][j] is the score of task j after stage i, R[0] before any training; N tasks, learned in order (Lopez-Paz and Ranzato
2017 for the terms; the averages over stages are those of SAPO's protocol):

AP = mean_j R[N][j]
BWT = mean over i = 2…N of mean_{j<i} (R[i][j] − R[j][j])
FWT = mean over i = 1…N−1 of mean_{j>i} (R[i][j] − R[0][j])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvopt.documents.sequence_file import TransferMeans


@dataclass(frozen=True)
class Transfer:
    """The three averages in the unit of R. Higher is better where R is a score; where R is a loss (gold NLL) lower is
    better, and a positive BWT is forgetting. BWT and FWT are None for one task, where nothing can transfer.
    """

    average: float
    backward: float | None
    forward: float | None

    @property
    def document(self) -> TransferMeans:
        """The averages as ``sequence.json`` holds them."""
        return TransferMeans(AP=self.average, BWT=self.backward, FWT=self.forward)


def transfer(scores: Sequence[Sequence[float]]) -> Transfer:
    """AP, BWT and FWT of R [N + 1, N]. Raises ValueError for another shape or a score that is not finite."""
    r = np.asarray(scores, dtype=np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] + 1 or r.shape[1] == 0:
        raise ValueError(f"R has shape {r.shape}; it needs one row more than tasks: R[0] is before training")
    if not np.isfinite(r).all():
        raise ValueError("R holds a score that is not finite")
    tasks = r.shape[1]
    if tasks == 1:
        return Transfer(float(r[-1].mean()), None, None)
    learned = np.array([r[j + 1, j] for j in range(tasks)])
    backward = [float((r[i, : i - 1] - learned[: i - 1]).mean()) for i in range(2, tasks + 1)]
    forward = [float((r[i, i:] - r[0, i:]).mean()) for i in range(1, tasks)]
    return Transfer(float(r[-1].mean()), float(np.mean(backward)), float(np.mean(forward)))
