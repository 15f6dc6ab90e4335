"""kvopt: find contexts that make a language model behave as a prompt template makes it behave, and train models on
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvopt.version import VERSION as __version__

if TYPE_CHECKING:
    from kvopt.api import (
        Base,
        Comparison,
        LearnedContext,
        Task,
        compare_contexts,
        export_context,
        kl,
        learn,
        optimize_context,
        score,
    )


__all__ = [
    "Base",
    "Comparison",
    "LearnedContext",
    "Task",
    "__version__",
    "compare_contexts",
    "export_context",
    "kl",
    "learn",
    "optimize_context",
    "score",
]


def __getattr__(name: str) -> Any:
    """What :mod:`kvopt.api` offers, loaded when it is first asked for: ``import kvopt`` alone stays fast."""
    if name in __all__:
        from kvopt import api

        return getattr(api, name)
    raise AttributeError(f"module 'kvopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
