"""Divergences, one formula each: a file here and its Triton row functions beside it (``NAME.py``, ``NAME_triton.py``).

Importing a formula needs torch alone; Triton row functions are imported where the Triton backend runs.
"""

from kvopt.kernels.divergences.registry import Divergence, Ratios, divergences, row_functions

__all__ = ["Divergence", "Ratios", "divergences", "row_functions"]
