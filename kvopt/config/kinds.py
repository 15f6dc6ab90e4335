"""Families: things of one kind, one file each in one folder, chosen in the YAML by their ``kind``.

A member's file holds its options, a subclass of :class:`Options`, and what it does with them. A family is found by its
files and listed nowhere, so adding a member adds one file: ``multi_token.py`` is ``kind: multi-token``. Members load
without torch, because a config is checked, and its schema printed, before anything is computed.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, cast

from pydantic import Field

from kvopt.config.section import FrozenSection


class Options(FrozenSection):
    """The settings of one member; ``kind`` names it."""

    if TYPE_CHECKING:  # each member declares it, at the place where its dump has it
        kind: str


Member = TypeVar("Member", bound=Options)


@dataclass(frozen=True)
class Family(Generic[Member]):
    """The members of one folder; ``Member`` is what all their options are.

    Attributes:
        package: the folder as a package; its ``__init__`` may load no torch. Files that begin with ``_`` are no
            members.
        title: what a member is called in messages.
    """

    package: str
    title: str

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds by the names of their files, in alphabetical order; loads none of them."""
        spec = importlib.util.find_spec(self.package)
        folders = spec.submodule_search_locations if spec else None
        names = [module.name for module in pkgutil.iter_modules(folders or []) if not module.name.startswith("_")]
        return tuple(sorted(name.replace("_", "-") for name in names))

    def values(self) -> list[Any]:
        """Everything that the members' files define themselves, in the order of the files; loads all of them."""
        modules = [importlib.import_module(f"{self.package}.{kind.replace('-', '_')}") for kind in self.kinds]
        return [value for module in modules for name, value in vars(module).items() if not name.startswith("_")]

    def options(self, kind: str) -> type[Member]:
        """The options of a kind. Raises KeyError for an unknown one."""
        if kind not in self.kinds:
            raise KeyError(f"no {self.title} {kind!r}; there are {', '.join(self.kinds)}")
        return cast(type[Member], _options_in(f"{self.package}.{kind.replace('-', '_')}"))

    @cached_property
    def members(self) -> Mapping[str, type[Member]]:
        """The options of every kind; loads all files."""
        return {kind: self.options(kind) for kind in self.kinds}

    def union(self, only: Callable[[type[Member]], bool] = lambda member: True) -> Any:
        """The type of a key that holds one member: the options of its ``kind``.

        Args:
            only: which of the members the key may hold; default: any.
        """
        return Annotated[reduce(or_, filter(only, self.members.values())), Field(discriminator="kind")]

    def complete(self, **types: Any) -> None:
        """Give members whose options hold other members the unions that they name in their annotations: these exist
        only when all files are loaded.
        """
        for member in self.members.values():
            member.model_rebuild(_types_namespace=types)


@cache
def _options_in(module: str) -> type[Options]:
    """The one class of options that a member's file defines."""
    loaded = importlib.import_module(module)
    classes = [
        value
        for value in vars(loaded).values()
        if isinstance(value, type) and issubclass(value, Options) and value.__module__ == module
        and "kind" in value.__annotations__
    ]  # fmt: skip
    if len(classes) != 1:
        raise TypeError(f"{module} must define one class of options with a kind, it has {len(classes)}")
    return classes[0]
