"""What a divergence is, and how a file makes one known.

Symbols: R rows of a block, V vocabulary, p and q the distributions of reference and candidate, z_s the candidate's
logits, d = log q − log p. Every divergence gets p, q and d from the same rows (rows.py), whatever the form of the
products; it adds its own sum over the vocabulary and its own gradient.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

LARGE_LOG_RATIO = 30.0
"""Beyond this log-ratio, p · e^v loses range, and rows use exp(log p + v) instead."""

TRITON_SUFFIX = "_triton"


class Ratios(NamedTuple):
    """Distributions of a block of rows and what is between them; float32 or float64, [R, V] but for c [R, 1].

    d = log q − log p = v − c, with v = u − Σ p u of the logits' difference u and c = log Σ p e^v, the forward KL plus
    Σ p v (which is 0 but for rounding). expm1_mass: p · expm1(d) where d < 0.5, so that nothing cancels as q → p.
    """

    p: Tensor
    q: Tensor
    d: Tensor
    v: Tensor
    c: Tensor
    expm1_mass: Tensor

    def moved_mass(self) -> Tensor:
        """q − p, exact near 0."""
        return torch.where(self.d < 0.5, self.expm1_mass, self.q - self.p)


@dataclass(frozen=True)
class Divergence:
    """A divergence between reference p and candidate q; a subclass in a file of this folder goes by the file's name.

    Every subclass has ``title``, ``exact`` and ``rows``; the other attributes and methods are for what a divergence
    can do besides.

    Args:
        beta: the number that a divergence may take; its file says what it means and which values it has.
    """

    beta: float = 0.5

    title: ClassVar[str]
    """As messages call it."""

    in_place: ClassVar[bool] = False
    """Whether ``rows_in_place`` exists: a path with fewer passes over memory, for rows on a CPU."""

    stored_forms: ClassVar[tuple[str, ...]] = ()
    """Stored references that give it: "moments" (``of_moments`` exists), "top-k" (``of_top_k`` exists)."""

    store_free: ClassVar[bool] = False
    """Whether the store-free Triton kernels compute it; their statistics are those of forward KL."""

    def __post_init__(self) -> None:
        """Raises ValueError("beta is …") where the divergence does not take this ``beta``."""

    def exact(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """[N] from float64 log-probabilities [N, V], as in a textbook; differentiable by autograd in log_q."""
        raise NotImplementedError

    def rows(self, ratios: Ratios, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Value [R] and, if wanted, its gradient by z_s [R, V]; no look at the data from the host (it is compiled)."""
        raise NotImplementedError

    def rows_in_place(
        self, p: Tensor, v: Tensor, scratch: Tensor, want_gradient: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """As ``rows``, and c [R] and a factor [R] of the gradient's rows (None for 1), where every v [R, V] is below
        LARGE_LOG_RATIO and differs from what Ratios has by a constant of the row; all inputs may be overwritten.
        """
        raise NotImplementedError

    def at_kl(self, kl: float) -> float:
        """About its value where log-ratios are small, normally distributed, and forward KL is ``kl`` nats."""
        return kl

    def of_moments(self, log_partition: Tensor, mean_logit: Tensor, entropy: Tensor) -> Tensor:
        """[R] from log Σ e^z_s, Σ p z_s and H(p). Only where the gradient by z_s is q − p: nothing else is stored."""
        raise NotImplementedError

    def of_top_k(self, log_q: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Value [R] of k + 1 outcomes (k tokens, and "another") and its gradient by z_s [R, V].

        log_q: [R, V] log-probabilities of the candidate. ids, log_p: [R, k], the reference's likeliest tokens.
        """
        raise NotImplementedError


@cache
def divergences() -> dict[str, type[Divergence]]:
    """Every divergence by name, in alphabetical order: the files of this folder that define one."""
    package = importlib.import_module(__package__)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in names if not _is_triton(name)}
    classes = {name: _divergence_of(module) for name, module in modules.items()}
    return {name: entry for name, entry in classes.items() if entry is not None}


def _is_triton(name: str) -> bool:
    return name.endswith(TRITON_SUFFIX)


def _divergence_of(module: ModuleType) -> type[Divergence] | None:
    """The subclass that a module defines itself, not one that it imports; None where it defines none."""
    classes = (entry for entry in vars(module).values() if isinstance(entry, type) and issubclass(entry, Divergence))
    own = (entry for entry in classes if entry is not Divergence and entry.__module__ == module.__name__)
    return next(own, None)


@cache
def row_functions(name: str) -> ModuleType:
    """The Triton row functions of a divergence: ``NAME_triton.py``, see ``triton_kernels.rows_kernel``."""
    return importlib.import_module(f"{__package__}.{name}{TRITON_SUFFIX}")
