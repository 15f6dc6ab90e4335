"""A run of nothing but short KV caches that need no training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvopt.config.contexts import ContextConfig
from kvopt.config.document import Config
from kvopt.config.frontiers import FrontierConfig
from kvopt.config.mutations import MutationsConfig
from kvopt.errors import InputError, counted
from kvopt.run.run import Run


def bare(config: Config, contexts: Sequence[ContextConfig | FrontierConfig] = ()) -> Config:
    """The config with these contexts, the wordings of the user's own, and no mutation or student."""
    update = {"contexts": [*config.written, *contexts], "mutations": MutationsConfig(count=0), "students": []}
    return config.model_copy(update=update | {"study": None})


@contextmanager
def only_compact(
    config: Config, base_dir: Path, out: Path, tokens: Sequence[int], say: Callable[[str], None] | None = None
) -> Iterator[Run]:
    """The run, opened, of a config in which the wordings of the user's own and contexts ``compact-N`` are all there is.

    Args:
        tokens: their lengths in slots; none: a quarter of the template's tokens.

    Raises:
        InputError: a length that the template does not have.
    """
    first = Run(bare(config), base_dir, out, say=say)
    whole = len(first.task().encoded.prefix)
    lengths = sorted(set(tokens), reverse=True) or [max(1, whole // 4)]
    if lengths[0] > whole:
        raise InputError(
            f"{counted(lengths[0], 'slot')} wanted, the template has {counted(whole, 'token')}",
            where="--tokens",
            fix="ask for fewer",
        )
    contexts = [ContextConfig(name=f"compact-{n}", tokens=n, init="matched", steps=0) for n in lengths]
    run = Run(bare(config, contexts), base_dir, out, say=say)
    run.use_base(first.load_base())
    with run.opened():
        yield run
