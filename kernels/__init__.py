"""The divergence op: exact KL between two next-token distributions, from hidden states, without storing all logits.

Installed as ``kvopt.kernels``; depends on torch alone. Start with ``linear_kl`` (values and gradients) and
``linear_scores`` (values only, everything a context is scored by).
"""

from kvopt.kernels.linear_kl import LinearKL, linear_kl
from kvopt.kernels.options import Head, KernelInputError, KLOptions, UnsupportedError
from kvopt.kernels.scores import ReferenceFacts, Scores, linear_scores, reference_facts
from kvopt.kernels.stored import Moments, TopK, moments_of

__all__ = [
    "Head",
    "KLOptions",
    "KernelInputError",
    "LinearKL",
    "Moments",
    "ReferenceFacts",
    "Scores",
    "TopK",
    "UnsupportedError",
    "linear_kl",
    "linear_scores",
    "moments_of",
    "reference_facts",
]
