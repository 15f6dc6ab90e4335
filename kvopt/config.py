"""The config file: one strict YAML document, checked whole before any work starts.

Unknown keys are errors with a suggestion; paths are relative to the config file; ``--set a.b=c`` changes one value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvopt.dataset import DataConfig
from kvopt.errors import InputError
from kvopt.model import ModelConfig
from kvopt.mutate.config import MutationsConfig
from kvopt.optimize import ContextConfig
from kvopt.template import Template


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MessageConfig(_Section):
    """One chat message of the template."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str


class TemplateConfig(_Section):
    """The template C: exactly one of messages, text and file."""

    messages: list[MessageConfig] | None = Field(
        None, description="chat messages, rendered with the base's chat template"
    )
    text: str | None = Field(None, description="plain text, tokenized as it is")
    file: str | None = Field(None, description="a UTF-8 file with plain template text")
    scope: Literal["leading", "all"] = Field(
        "leading", description="what contexts replace: static text before the first slot, or all static text"
    )
    end_token: bool = Field(
        True, description="gold outputs end with the end-of-turn (or EOS) token, which is scored too"
    )
    chat_kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the chat template")

    @model_validator(mode="after")
    def _one_source(self) -> TemplateConfig:
        given = [name for name in ("messages", "text", "file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of messages, text and file (given: {', '.join(given) or 'none'})")
        return self

    def build(self, base_dir: Path) -> Template:
        """The checked template. Raises InputError."""
        if self.file is not None:
            return Template.from_file(base_dir / self.file)
        if self.text is not None:
            return Template.from_text(self.text)
        return Template.from_messages([message.model_dump() for message in self.messages or []])


class ReferenceConfig(_Section):
    """How the reference is kept."""

    storage: Literal["hidden"] = Field("hidden", description="hidden states of gold tokens in the model's dtype")
    batch_size: int = Field(16, ge=1, description="bodies a batch")


class ScoreConfig(_Section):
    """How contexts are scored."""

    batch_size: int = Field(16, ge=1, description="bodies a batch")
    resamples: int = Field(2000, ge=100, description="bootstrap draws of the 95 % intervals")
    best: int = Field(5, ge=0, description="how many of the best mutations are scored on the validation rows")


class StudentConfig(_Section):
    """One student to train on contexts of the run."""

    name: str
    method: Literal["lora", "full"] = "lora"
    contexts: list[str]
    epochs: float = Field(1, gt=0)


class Config(_Section):
    """Everything that a run depends on."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run directory, runs/NAME")
    seed: int = Field(0, ge=0, lt=2**31, description="of everything random")
    model: ModelConfig = ModelConfig()
    template: TemplateConfig
    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    mutations: MutationsConfig = MutationsConfig()
    score: ScoreConfig = ScoreConfig()
    contexts: list[ContextConfig] = Field(default_factory=list, description="contexts to learn, in order")
    students: list[StudentConfig] = Field(
        default_factory=list, description="students to train (read and checked, not yet trained)"
    )

    @model_validator(mode="after")
    def _unique_names(self) -> Config:
        names = [context.name for context in self.contexts]
        for name in {n for n in names if names.count(n) > 1}:
            raise ValueError(f"two contexts are named {name!r}")
        for name in {"original", "none"} & set(names):
            raise ValueError(f"{name!r} is the name of a built-in context")
        for context in self.contexts:
            kind, _, argument = context.init.partition(":")
            if kind == "context" and argument in names and names.index(argument) >= names.index(context.name):
                raise ValueError(f"context {context.name!r} starts from {argument!r}, which must come before it")
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, Path]:
    """Read a config file; also return the folder that its paths are relative to.

    Args:
        path: a YAML file.
        overrides: ``a.b=value`` assignments, values in YAML; ``contexts.NAME.steps=5`` finds list items by their name
            or position.

    Raises:
        InputError: the file cannot be read, or something in it is wrong.
    """
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), mend="kvopt init writes a starter config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise InputError("is not a mapping of sections", where=str(path), mend="kvopt init writes a starter config")
    for override in overrides:
        _assign(tree, override)
    return build_config(tree, str(path)), path.resolve().parent


def build_config(tree: dict[str, Any], where: str) -> Config:
    """The checked config of a parsed document. Raises InputError, one line, for the first thing that is wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _input_error(error, where) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping (YAML would silently keep the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands here twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"not valid YAML: {error.problem}", where=f"{where}{line}") from None
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {error}", where=where) from None


def _assign(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError(f"{override!r} is not an assignment", where="--set", mend="write --set a.b=value")
    node: Any = tree
    keys = path.split(".")
    for key in keys[:-1]:
        node = _child(node, key, path)
    if isinstance(node, list):
        node[_position(node, keys[-1], path)] = _parse_yaml(value, f"--set {path}")
    elif isinstance(node, dict):
        node[keys[-1]] = _parse_yaml(value, f"--set {path}")
    else:
        raise InputError(f"{path} leads into a plain value", where="--set")


def _child(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, key, path)]
    if not isinstance(node, dict):
        raise InputError(f"{path} leads into a plain value", where="--set")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _position(items: list[Any], key: str, path: str) -> int:
    for position, item in enumerate(items):
        if key == str(position) or (isinstance(item, dict) and item.get("name") == key):
            return position
    raise InputError(f"{path}: no item {key!r}", where="--set", mend="use an item's name or its position from 0")


def _input_error(error: ValidationError, where: str) -> InputError:
    first = error.errors()[0]
    location = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    key = ".".join(str(part) for part in location)
    more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), list(_keys_at(location[:-1])), n=1)
        mend = f"did you mean {close[0]!r}?" if close else "known here: " + ", ".join(_keys_at(location[:-1]))
        return InputError(f"unknown key {key!r}{more}", where=where, mend=mend)
    message = re.sub(r"^Value error, ", "", first["msg"])
    given = (
        "" if first["type"] == "missing" or isinstance(first["input"], dict | list) else f" (given: {first['input']!r})"
    )
    return InputError(f"{key + ': ' if key else ''}{message}{given}{more}", where=where)


def _keys_at(location: Iterable[int | str]) -> list[str]:
    """The keys that the section at ``location`` may have."""
    model: Any = Config
    for part in location:
        if isinstance(part, int) or not hasattr(model, "model_fields"):
            continue
        field = model.model_fields.get(part)
        model = next((a for a in _models_in(field.annotation)), None) if field else None
    return list(model.model_fields) if model is not None and hasattr(model, "model_fields") else []


def _models_in(annotation: Any) -> Iterable[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
