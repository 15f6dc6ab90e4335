"""The config file: one strict YAML document, checked whole before any work starts.

Unknown keys are errors with a suggestion; paths are relative to the config file; ``--set a.b=c`` changes one value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvopt.builtin_base import NAME as BUILTIN_BASE
from kvopt.dataset import DataConfig
from kvopt.errors import InputError
from kvopt.files import read_text
from kvopt.keep import take_marks
from kvopt.model import ModelConfig
from kvopt.mutate.config import MutationsConfig
from kvopt.optimize import ContextConfig
from kvopt.template import Template
from kvopt.train.config import StudentConfig
from kvopt.train.evaluation.config import EvaluateConfig
from kvopt.train.study.config import StudyConfig

Checked = TypeVar("Checked", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MessageConfig(_Section):
    """One chat message of the template."""

    role: Literal["system", "user", "assistant", "tool", "developer"] = Field(description="who says it")
    content: str = Field(description="text with {{slots}}; {{keep:words}} must not change in mutations")


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
        """The checked template, without ``{{keep:…}}`` marks. Raises InputError."""
        return take_marks(self._source(base_dir))[0]

    def kept(self, base_dir: Path) -> tuple[str, ...]:
        """The literals marked ``{{keep:…}}``. Raises InputError."""
        return take_marks(self._source(base_dir))[1]

    def _source(self, base_dir: Path) -> Template:
        if self.file is not None:
            return Template.from_file(base_dir / self.file)
        if self.text is not None:
            return Template.from_text(self.text)
        return Template.from_messages([message.model_dump() for message in self.messages or []])


class ReferenceConfig(_Section):
    """How the reference is kept."""

    storage: Literal["hidden", "moments"] = Field(
        "hidden",
        description="hidden states of gold tokens in the model's dtype; moments: float32 moments of the training rows"
        " beside them, which take 2 float32 head products a step instead of 3 (see kernels/README.md for where that"
        " pays)",
    )
    batch_size: int = Field(16, ge=1, description="bodies a batch")


class ScoreConfig(_Section):
    """How contexts are scored."""

    batch_size: int = Field(16, ge=1, description="bodies a batch")
    resamples: int = Field(2000, ge=100, description="bootstrap draws of the 95 % intervals")
    best: int = Field(5, ge=0, description="how many of the best mutations are scored on the validation rows")


class ReportConfig(_Section):
    """What the report shows of single validation examples."""

    examples: int = Field(3, ge=0, le=50, description="from the worst to the best, evenly spread; 0 shows none")
    contexts: int = Field(6, ge=0, le=20, description="learned contexts beside original, best mutation and none")
    top_k: int = Field(5, ge=1, le=50, description="tokens listed where a context would rather say something else")
    max_new_tokens: int = Field(32, ge=1, description="greedy answers are cut here")


class Config(_Section):
    """Everything that a run depends on."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run directory, runs/NAME")
    seed: int = Field(0, ge=0, lt=2**31, description="of everything random")
    model: ModelConfig = Field(ModelConfig(), description="the frozen base")
    template: TemplateConfig = Field(description="the template C")
    data: DataConfig = Field(description="inputs V and gold outputs Y")
    reference: ReferenceConfig = Field(ReferenceConfig(), description="the base's answers under the template")
    mutations: MutationsConfig = Field(MutationsConfig(), description="other wordings of the template")
    score: ScoreConfig = Field(ScoreConfig(), description="KL, NLL and agreement of contexts")
    contexts: list[ContextConfig] = Field(default_factory=list, description="contexts to learn, in order")
    report: ReportConfig = Field(ReportConfig(), description="what the report shows of single validation examples")
    students: list[StudentConfig] = Field(
        default_factory=list, description="students to train on contexts of the run, in order"
    )
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="how kvopt evaluate measures base and students")
    study: StudyConfig | None = Field(None, description="what kvopt study compares")

    @model_validator(mode="after")
    def _unique_names(self) -> Config:
        names = [context.name for context in self.contexts]
        for name in {n for n in names if names.count(n) > 1}:
            raise ValueError(f"two contexts are named {name!r}")
        for name in names:
            if name in ("original", "none"):
                raise ValueError(f"{name!r} is the name of a built-in context")
            if re.fullmatch(r"m\d{3,}", name):
                raise ValueError(f"{name!r} is the name of a mutation; name the context otherwise")
        for context in self.contexts:
            kind, _, argument = context.init.partition(":")
            if kind == "context" and argument in names and names.index(argument) >= names.index(context.name):
                raise ValueError(f"context {context.name!r} starts from {argument!r}, which must come before it")
        students = [student.name for student in self.students]
        for name in {n for n in students if students.count(n) > 1}:
            raise ValueError(f"two students are named {name!r}")
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
    config = build_config(read_tree(path, overrides), str(path))
    base_dir = path.resolve().parent
    return _with_local_base(config, base_dir), base_dir


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The parsed document of a YAML file after ``overrides``. Raises InputError."""
    text = read_text(path, "kvopt init writes a starter config")
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise InputError("is not a mapping of sections", where=str(path), mend="kvopt init writes a starter config")
    for override in overrides:
        _assign(tree, override)
    return tree


def _with_local_base(config: Config, base_dir: Path) -> Config:
    """A base in a folder or file beside the config, by its whole path (hub ids and the built-in name stay)."""
    place = base_dir / config.model.base
    if config.model.base == BUILTIN_BASE or Path(config.model.base).is_absolute() or not place.exists():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"base": str(place.resolve())})})


def build_config(tree: dict[str, Any], where: str) -> Config:
    """The checked config of a parsed document. Raises InputError, one line, for the first thing that is wrong."""
    return build_model(Config, tree, where)


def build_model(model: type[Checked], tree: dict[str, Any], where: str) -> Checked:
    """As :func:`build_config`, for another kind of document."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _input_error(error, where, model) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping (YAML would silently keep the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor; keys beside it may stand in it too
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
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
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}", where=where) from None
    except (RecursionError, ValueError) as error:  # ValueError: dates that do not exist
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"not valid YAML: {reason}", where=where) from None


def _assign(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError(f"{override!r} is not an assignment", where="--set", mend="write --set a.b=value")
    node: Any = tree
    keys = path.split(".")
    while len(keys) > 1:
        if isinstance(node, list):
            keys = _joined_name(node, keys)
            if len(keys) == 1:
                break
        node = _child(node, keys.pop(0), path)
    if isinstance(node, list):
        node[_position(node, keys[-1], path)] = _parse_yaml(value, f"--set {path}")
    elif isinstance(node, dict):
        node[keys[-1]] = _parse_yaml(value, f"--set {path}")
    else:
        raise InputError(f"{path} leads into a plain value", where="--set")


def _joined_name(items: list[Any], keys: list[str]) -> list[str]:
    """Names of list items may hold dots: the leading keys that together are one are joined."""
    names = {item["name"] for item in items if isinstance(item, dict) and isinstance(item.get("name"), str)}
    for end in range(len(keys), 1, -1):
        if ".".join(keys[:end]) in names:
            return [".".join(keys[:end]), *keys[end:]]
    return keys


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


_PLAIN = {
    "missing": "is missing",
    "model_type": "is not a mapping of keys",
    "model_attributes_type": "is not a mapping of keys",
    "dict_type": "is not a mapping of keys",
    "list_type": "is not a list",
    "tuple_type": "is not a list",
    "string_type": "is not text (write it in quotes)",
}


def _input_error(error: ValidationError, where: str, model: type[BaseModel]) -> InputError:
    """One line about the first fault; unknown keys come first, because a missing key is often a misspelt one."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    first = faults[0]
    place = _place(first["loc"], model)
    key = ".".join(str(part) for part, _ in place)
    more = f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = list(place[-1][1])
        close = difflib.get_close_matches(str(place[-1][0]), known, n=1)
        mend = f"did you mean {close[0]!r}?" if close else "known here: " + ", ".join(known)
        return InputError(f"unknown key {key!r}{more}", where=where, mend=mend)
    if first["type"].startswith("union_tag"):
        context = first.get("ctx", {})
        key += "." + context.get("discriminator", "kind").strip("'")
        given = f"unknown value {context['tag']!r}" if "tag" in context else "is missing"
        return InputError(f"{key}: {given}{more}", where=where, mend=f"one of {context.get('expected_tags', _TAGS)}")
    given = (
        "" if first["type"] == "missing" or isinstance(first["input"], dict | list) else f" (given: {_short(first)})"
    )
    message = _PLAIN.get(first["type"]) or re.sub(r"^Value error, ", "", first["msg"])
    return InputError(f"{key + ': ' if key else ''}{message}{given}{more}", where=where)


_TAGS = "none, local, endpoint, file"


def _short(fault: Any) -> str:
    text = repr(fault["input"])
    return text if len(text) <= 80 else text[:77] + "..."


def _place(location: Sequence[int | str], model: type[BaseModel]) -> list[tuple[int | str, tuple[str, ...]]]:
    """Each part of the way to a fault with the keys known there; what pydantic adds (tags of unions) is left out."""
    place: list[tuple[int | str, tuple[str, ...]]] = []
    models: list[Any] = [model]
    for part in location:
        fields: dict[str, Any] = {}
        for model in models:
            fields |= model.model_fields
        if len(models) > 1 and isinstance(part, str):  # the tag that says which of several models it is
            models = [m for m in models if part in getattr(m.model_fields["kind"].annotation, "__args__", ())]
            continue
        if part in fields:
            models = list(_models_in(fields[part].annotation))
        place.append((part, tuple(fields)))
    return place


def _models_in(annotation: Any) -> Iterable[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
