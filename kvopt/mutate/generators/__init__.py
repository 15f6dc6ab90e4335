"""Where candidates come from beside rules: the local model, an endpoint, a file."""

from __future__ import annotations

from pathlib import Path

from kvopt.config.mutations import EndpointGenerator, FileGenerator, LocalGenerator, NoGenerator
from kvopt.errors import InputError
from kvopt.mutate.generators.endpoint import EndpointParaphraser
from kvopt.mutate.generators.file import FileVariants
from kvopt.mutate.generators.local import LocalParaphraser
from kvopt.mutate.proposals import Complete, Generator, Proposal, Request
from kvopt.task.template import Template

__all__ = ["Complete", "Generator", "Proposal", "Request", "build_generator"]


def build_generator(
    config: NoGenerator | LocalGenerator | EndpointGenerator | FileGenerator,
    template: Template,
    *,
    complete: Complete | None = None,
    folder: Path = Path(),
) -> Generator | None:
    """The generator that the config names, None for ``kind: none``.

    Args:
        template: what is to be paraphrased.
        complete: the local model, needed for ``kind: local``.
        folder: what a relative ``path`` is relative to.
    """
    match config:
        case LocalGenerator():
            if complete is None:
                raise InputError("kind: local needs a base model", where="mutations.generator")
            return LocalParaphraser(complete, config.samples, config.temperature)
        case EndpointGenerator():
            return EndpointParaphraser(config)
        case FileGenerator():
            return FileVariants(folder / config.path, template)
        case _:
            return None
