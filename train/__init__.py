"""Students: models that are trained under sampled and learned contexts, and then measured.

Installed as ``kvopt.train``. For training loops of others, such as ``transformers.Trainer``, it offers
:class:`ContextDataset`, :class:`ContextCollator` and the callbacks :class:`ContextClock`, :class:`StateAdaptive`,
:class:`ForgettingProbe` and :class:`WordingProbe`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvopt.train.callbacks import ContextClock, ForgettingProbe, StateAdaptive, WordingProbe
    from kvopt.train.context_dataset import ContextCollator, ContextDataset

__all__ = ["ContextClock", "ContextCollator", "ContextDataset", "ForgettingProbe", "StateAdaptive", "WordingProbe"]


def __getattr__(name: str) -> Any:
    """What is offered, loaded when it is first asked for: commands load no more of this package than they need."""
    if name in ("ContextDataset", "ContextCollator"):
        from kvopt.train import context_dataset

        return getattr(context_dataset, name)
    if name in __all__:
        from kvopt.train import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module 'kvopt.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
