"""Where candidates come from beside rules: the local model, an endpoint, a file, or the template shortened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvopt.config.mutations import EndpointGenerator, FileGenerator, LocalGenerator, NoGenerator
from kvopt.config.shortening import ExtractGenerator
from kvopt.errors import InputError
from kvopt.mutate.generators.endpoint import EndpointParaphraser
from kvopt.mutate.generators.extract import Extracts
from kvopt.mutate.generators.file import FileVariants
from kvopt.mutate.generators.local import LocalParaphraser
from kvopt.mutate.generators.wordings import EndpointWordings
from kvopt.mutate.proposals import Complete, Generator, Proposal, Request
from kvopt.task.template import Template

__all__ = ["Complete", "Generator", "Proposal", "Request", "build_generator"]


def build_generator(
    config: NoGenerator | LocalGenerator | EndpointGenerator | FileGenerator | ExtractGenerator,
    template: Template,
    *,
    complete: Complete | None = None,
    shorten: Callable[[int], Template] | None = None,
    folder: Path = Path(),
    say: Callable[[str], None] | None = None,
) -> Generator | None:
    """The generator that the config names, None for ``kind: none``.

    Args:
        template: what is to be paraphrased.
        complete: the local model, needed for ``kind: local``.
        shorten: the template at most so many tokens long, needed for ``kind: extract``.
        folder: what a relative ``path`` is relative to.
        say: gets a line where an endpoint has no system role; None: stderr does.
    """
    match config:
        case LocalGenerator():
            if complete is None:
                raise InputError("kind: local needs a base model", where="mutations.generator")
            return LocalParaphraser(complete, config.samples, config.temperature)
        case EndpointGenerator():
            return EndpointWordings(config, say=say) if config.families else EndpointParaphraser(config, say=say)
        case FileGenerator():
            return FileVariants(folder / config.path, template)
        case ExtractGenerator():
            if shorten is None:
                raise InputError("kind: extract needs a base model", where="mutations.generator")
            return Extracts(config.tokens, shorten)
        case _:
            return None
