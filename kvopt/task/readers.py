"""Reading rows from where they lie: JSONL, JSON arrays, CSV, Hugging Face data sets, the built-in data.

Every reader yields :class:`Record` in file order and names the file and line of what it cannot read. What the columns
mean is not known here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from kvopt.errors import InputError, counted, from_extra
from kvopt.storage.files import RELATIVE, missing_file
from kvopt.task.builtin_code import CODE_NAME, stdlib_code
from kvopt.task.builtin_data import BUILTIN_NAME, stdlib_docstrings
from kvopt.task.public_layouts import BadTurn, with_messages

BOM = b"\xef\xbb\xbf"
BUILTIN: dict[str, Callable[[str], Sequence[Any]]] = {BUILTIN_NAME: stdlib_docstrings, CODE_NAME: stdlib_code}
"""Built-in data by name: what gives the examples of a part; each has its columns as attributes, and ``where``."""
HF = "hf:"
SPLIT_NAMES = ("train", "validation", "valid", "dev", "test")


@dataclass(frozen=True, slots=True)
class Record:
    """One row: its top-level fields by column name, and ``where`` it stands (``"train.jsonl:13"``).

    Numbers are already text in the file's own spelling (``1e-3``); booleans are bool, null is None.
    """

    fields: dict[str, Any]
    where: str


def read_records(source: str, base_dir: Path, part: str) -> Iterator[Record]:
    """The rows of ``source``, which is named in the configuration of a file in ``base_dir``.

    Args:
        source: a path (``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, or a folder of ``save_to_disk``),
            ``hf:NAME[:CONFIG][:SPLIT]``, ``builtin:stdlib-docstrings`` or ``builtin:stdlib-code``.
        base_dir: what relative paths are relative to.
        part: ``"train"`` or ``"validation"``: the part of a source that has several.

    Raises:
        InputError: for whatever cannot be read, naming file and line.
    """
    if source.startswith("builtin:"):
        examples = BUILTIN.get(source.removeprefix("builtin:"))
        if examples is None:
            known = " and ".join(f"builtin:{name}" for name in BUILTIN)
            raise InputError("no such built-in data", where=source, fix=f"there are {known}")
        for example in examples(part):
            columns = asdict(example)
            yield Record(columns, columns.pop("where"))
        return
    if source.startswith(HF):
        yield from _hugging_face(source, base_dir, part)
        return
    path = base_dir / Path(source).expanduser()
    if path.is_dir():
        yield from _hugging_face(HF + source, base_dir, part)
    elif not path.exists():
        raise missing_file(path, source, RELATIVE)
    else:
        yield from _reader(source, path)(source, path)


def given_records(rows: Iterable[Mapping[str, Any]], label: str) -> Iterator[Record]:
    """Rows that are in memory, as :func:`read_records` gives those of a file; ``label`` stands for the file's name.

    Raises:
        InputError: a row is no mapping.
    """
    for number, row in enumerate(rows, 1):
        yield _record(_plain(dict(row) if isinstance(row, Mapping) else row), f"{label}:{number}")


def _reader(source: str, path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl
    if suffix in (".csv", ".tsv"):
        return _csv
    if suffix == ".json":
        with _reading(source), path.open("rb") as file:
            start = file.read(4096).removeprefix(BOM).lstrip()
        return _json_array if start.startswith(b"[") else _jsonl
    raise InputError(f"unknown data format {suffix!r}", where=source, fix="use .jsonl, .json, .csv, .tsv or hf:NAME")


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turn what the operating system says about ``source`` into an input error."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=source) from None


def _not_utf8(error: UnicodeDecodeError, where: str) -> InputError:
    byte = error.object[error.start]
    return InputError(f"not UTF-8 text (byte 0x{byte:02x})", where=where, fix="save the file as UTF-8")


# JSON


class _RepeatedKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return result


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class _Decoder(json.JSONDecoder):
    """Decodes numbers as the text they are written as; refuses NaN, Infinity and repeated keys."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=_object, parse_float=str, parse_int=str, parse_constant=_not_json)


_DECODER = _Decoder()


@contextmanager
def _parsing(where: str, line_offset: int | None = None) -> Iterator[None]:
    """Name the place of a JSON error: ``where`` is the row's line, or the file if ``line_offset`` is given."""
    try:
        yield
    except _RepeatedKey as error:
        raise InputError(f"the column {error.args[0]!r} is named twice", where=where, fix="keep one of them") from None
    except json.JSONDecodeError as error:
        fix = "one JSON object a line" if line_offset is None else None
        place = where if line_offset is None else f"{where.rsplit(':', 1)[0]}:{error.lineno}"
        raise InputError(f"broken JSON at column {error.colno}: {error.msg}", where=place, fix=fix) from None
    except RecursionError:
        raise InputError("broken JSON: nested too deeply", where=where) from None
    except ValueError as error:
        raise InputError(f"broken JSON: {error}", where=where) from None


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        kind = {list: "a list", str: "text or a number", bool: "a boolean"}.get(type(row), "null")
        raise InputError(f"the row is {kind}, not an object", where=where, fix='write {"column": "value", …}')
    return _recorded(row, where)


def _recorded(fields: dict[str, Any], where: str) -> Record:
    try:
        return Record(with_messages(fields), where)
    except BadTurn as error:
        raise InputError(str(error), where=where, fix='write {"from": "human", "value": "…"}') from None


def _jsonl(source: str, path: Path) -> Iterator[Record]:
    with _reading(source), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{source}:{number}"
            if number == 1:
                line = line.removeprefix(BOM)
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise _not_utf8(error, where) from None
            with _parsing(where):
                row = _DECODER.decode(text)
            yield _record(row, where)


def _json_array(source: str, path: Path) -> Iterator[Record]:
    with _reading(source):
        data = path.read_bytes().removeprefix(BOM)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(error, f"{source}:{line}") from None
    line, counted = 1, 0
    at = _skip_space(text, text.index("[") + 1)
    if text[at : at + 1] == "]":
        _nothing_after(text, at + 1, source)
        return
    while True:
        line, counted = line + text.count("\n", counted, at), at
        where = f"{source}:{line}"
        with _parsing(where, line_offset=line):
            row, at = _DECODER.raw_decode(text, at)
        yield _record(row, where)
        at = _skip_space(text, at)
        if text[at : at + 1] == "]":
            _nothing_after(text, at + 1, source)
            return
        with _parsing(where, line_offset=line):
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        at = _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _nothing_after(text: str, at: int, source: str) -> None:
    end = _skip_space(text, at)
    if end != len(text):
        raise InputError("text after the end of the array", where=f"{source}:{text.count(chr(10), 0, end) + 1}")


# CSV


def _csv(source: str, path: Path) -> Iterator[Record]:
    """RFC 4180: quoted fields may hold separators, doubled quotes and line breaks; the first row names the columns."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with _reading(source), path.open(encoding="utf-8-sig", newline="") as file:
        rows = _csv_rows(csv.reader(file, delimiter=delimiter, strict=True), source)
        names, where = next(rows, ([], source))
        _check_header(names, where)
        for row, where in rows:
            if len(row) != len(names):
                raise InputError(
                    f"{counted(len(row), 'field')} for {counted(len(names), 'column')}",
                    where=where,
                    fix="quote fields that hold a separator, a quote or a line break",
                )
            yield Record(dict(zip(names, row, strict=True)), where)


def _csv_rows(reader: Any, source: str) -> Iterator[tuple[list[str], str]]:
    """Rows that are not blank, each with the line it starts on."""
    while True:
        where = f"{source}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"broken CSV: {error}", where=where) from None
        except UnicodeDecodeError as error:
            raise _not_utf8(error, f"{source}, after line {reader.line_num}") from None
        if row is None:
            return
        if row:
            yield row, where


def _check_header(names: list[str], where: str) -> None:
    for name in names:
        if not name.strip():
            raise InputError("a column has no name", where=where, fix="the first row names the columns")
        if names.count(name) > 1:
            raise InputError(f"the column {name!r} is named twice", where=where, fix="rename one of them")


# Hugging Face data sets


def _hugging_face(source: str, base_dir: Path, part: str) -> Iterator[Record]:
    name, config, split = _hugging_face_name(source)
    folder = base_dir / Path(name).expanduser()
    with from_extra("data", "reading a Hugging Face data set", source):
        import datasets
    try:
        if folder.is_dir():
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises whatever its back ends raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the data set cannot be loaded: {reason}", where=source) from error
    if hasattr(loaded, "keys"):
        split, loaded = _choose_split(loaded, split, part, source)
    label = f"{name}[{split}]" if split else name
    features = getattr(loaded, "features", None) or {}
    for number, row in enumerate(loaded, 1):
        named = {column: _named(value, features.get(column)) for column, value in row.items()}
        yield _recorded(_plain(named), f"{label}:{number}")


def _named(value: Any, feature: Any) -> Any:
    """A value with class labels by their names, in lists and objects too. Data sets without labels say -1, which is
    None here.
    """
    if isinstance(value, int) and hasattr(feature, "int2str"):
        return feature.int2str(value) if value >= 0 else None
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _named(item, feature.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        return [_named(item, inner) for item in value]
    return value


def _hugging_face_name(source: str) -> tuple[str, str | None, str | None]:
    """``hf:NAME[:CONFIG][:SPLIT]``; one word after the name is a split if it is the usual name of one."""
    name, *qualifiers = source.removeprefix(HF).split(":")
    if not name or len(qualifiers) > 2:
        raise InputError(
            "not a data set name", where=source, fix="write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        )
    if len(qualifiers) == 1:
        qualifiers = ["", qualifiers[0]] if qualifiers[0].split("[")[0] in SPLIT_NAMES else [qualifiers[0], ""]
    config, split = [*qualifiers, "", ""][:2]
    return name, config or None, split or None


def _choose_split(loaded: Any, split: str | None, part: str, source: str) -> tuple[str, Any]:
    wanted = [split] if split else ["train"] if part == "train" else [name for name in SPLIT_NAMES if name != "train"]
    for name in wanted:
        if name in loaded:
            return name, loaded[name]
    there = ", ".join(loaded.keys())
    raise InputError(f"no split {wanted[0]!r} (there are: {there})", where=source, fix="add :SPLIT to the name")


def _plain(value: Any) -> Any:
    """Python values as the JSON readers give them: numbers as their JSON spelling, not-a-number as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return json.dumps(value) if value == value else None
