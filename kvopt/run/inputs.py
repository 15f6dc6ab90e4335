"""What a run reads before any model is there: config, template and data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvopt.config.document import Config, load_config
from kvopt.config.mutations import MutationsConfig
from kvopt.documents.manifest import RunManifest
from kvopt.documents.validated import read_document
from kvopt.errors import InputError
from kvopt.task.examples import Dataset, Example, load_dataset
from kvopt.task.foreign import foreign_placeholders
from kvopt.task.template import Template
from kvopt.task.template_files import configured_template, template_from_file, written_out


@dataclass(frozen=True)
class Inputs:
    """A config with what it names, read and checked.

    Attributes:
        config: as read by ``load_config``.
        base_dir: the folder that its paths are relative to.
        template: C, without ``{{keep:…}}`` marks.
        kept: the literals that these marks name.
        dataset: training, selection and validation rows.
    """

    config: Config
    base_dir: Path
    template: Template
    kept: tuple[str, ...]
    dataset: Dataset

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """All rows: train, selection and validation in this order."""
        return (*self.dataset.train, *self.dataset.selection, *self.dataset.validation)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know about template and data, one line each."""
        foreign = [] if self.config.template.literal else foreign_placeholders(self.template)
        return (*foreign, *self.dataset.warnings)

    @property
    def context_names(self) -> list[str]:
        """Names of the contexts that the config learns."""
        return [context.name for context in self.config.learned]

    @cached_property
    def written(self) -> dict[str, Template]:
        """The config's other wordings of the template, by name."""
        files = {context.name: str(context.text) for context in self.config.written}
        return {name: template_from_file(self.base_dir / file, self.template) for name, file in files.items()}

    @property
    def mutations(self) -> MutationsConfig:
        """The ``mutations`` section, with the template's marked literals among those protected."""
        section = self.config.mutations
        protect = tuple(dict.fromkeys((*section.protect, *self.kept)))
        return section.model_copy(update={"protect": protect})

    def resolved(self) -> dict[str, Any]:
        """The config as it is written down: whole, with the text of a template file in place of its path."""
        tree = self.config.model_dump(mode="json")
        tree["contexts"] = [
            item.model_dump(mode="json", include={"name", "text"} if item in self.config.written else None)
            for item in self.config.contexts
        ]
        if self.config.template.file is not None:
            tree["template"] |= {"file": None, **written_out(self.config.template, self.base_dir)}
        return tree


def read_inputs(
    config: Config, base_dir: Path, given: Mapping[str, Iterable[Mapping[str, Any]]] | None = None
) -> Inputs:
    """Read the template and the data of a config; ``given`` are rows in memory in place of its files. Raises InputError
    for the first fault.
    """
    template, kept = configured_template(config.template, base_dir)
    inputs = Inputs(config, base_dir, template, kept, load_dataset(config.data, template, base_dir, config.seed, given))
    _ = inputs.written  # a fault in one of these files is told before any work
    return inputs


def place_from(folder: Path, place: Path) -> str:
    """``place`` as a path from ``folder``, so that both can be moved together; absolute on another drive."""
    try:
        return Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return str(place.resolve())


def inputs_of_run(folder: Path, config: Path | None = None) -> Inputs:
    """What a run directory was made from. Its manifest says where the data are; ``config`` is the run's own config,
    where they have been moved. Raises InputError.
    """
    if config is not None:
        return read_inputs(*load_config(config))
    path, manifest = folder / "config.yaml", folder / "manifest.json"
    if not path.is_file():
        raise InputError("is not a run directory", where=str(folder), fix="it has no config.yaml")
    loaded, base_dir = load_config(path)
    recorded = read_document(RunManifest, manifest).config_folder if manifest.is_file() else None
    if recorded is not None:
        base_dir = (folder / recorded).resolve()
    try:
        return read_inputs(loaded, base_dir)
    except InputError as error:
        fix = "give the run's own config with --config"
        raise InputError(str(error), where=str(path), fix=fix) from None
