"""Examples for gradients, for selection and for reporting: read, checked and divided before a model is loaded.

``train`` rows give gradients, ``selection`` rows choose mutations and checkpoints, ``validation`` rows are only
reported. No two of the three share slot values unless the user asks for it. Everything is deterministic; limits hold in
file order.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvopt.config.data import DataConfig, Policy
from kvopt.errors import InputError, counted
from kvopt.storage.files import canonical_json, sha256_json
from kvopt.task.columns import Columns, NoValue, as_text, find, unseen_messages
from kvopt.task.readers import Record, given_records, read_records
from kvopt.task.template import Template

SHOWN = 4  # how many places a message names


@dataclass(frozen=True, slots=True)
class Example:
    """One row: the slot values V and the gold output Y.

    Attributes:
        id: the part of the data set it was read from and its row number from 0, e.g. ``"train:12"``.
        source: file and line, e.g. ``"train.jsonl:13"``.
    """

    id: str
    values: dict[str, str]
    output: str
    source: str

    @property
    def key(self) -> tuple[str, ...]:
        """The slot values in the template's order: what makes two examples the same input."""
        return tuple(self.values.values())


@dataclass(frozen=True)
class Dataset:
    """The three parts, and what the user should know about them."""

    train: tuple[Example, ...]
    selection: tuple[Example, ...]
    validation: tuple[Example, ...]
    warnings: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Identity of the contents (ids, values, outputs, division); where the files lie does not matter."""
        digest = hashlib.sha256()
        for part in ("train", "selection", "validation"):
            digest.update(f"{part}\n".encode())
            for example in getattr(self, part):
                digest.update(canonical_json([example.id, example.values, example.output]).encode() + b"\n")
        return digest.hexdigest()


def load_dataset(
    config: DataConfig,
    template: Template,
    base_dir: Path,
    seed: int,
    given: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> Dataset:
    """Read, check and divide the data.

    Args:
        config: the ``data`` section.
        template: its slots say which columns are needed.
        base_dir: the folder that relative paths are relative to.
        seed: of the choice of rows that are set aside.
        given: rows of ``train`` and ``validation`` that are in memory; the config's names are then what messages call
            them.

    Raises:
        InputError: one line that names file and line of the first rows at fault and counts the rest.
    """
    columns = _columns(config, template)
    wanted = _patterns(config.only)
    warnings: list[str] = []

    def read(source: str, part: str) -> list[Example]:
        there = given is not None and part in given
        records = given_records(given[part], source) if there else read_records(source, base_dir, part)  # type: ignore[index]
        return _read(source, part, columns, wanted, records, warnings)

    train = read(config.train, "train")
    limit = config.limit
    if config.validation is None:
        train, validation = _set_aside(train, config.validation_fraction, seed)
    else:
        validation = read(config.validation, "validation")
    validation = _without_repeats(validation, limit.validation, config.duplicates, warnings)
    reported = {example.key for example in validation}
    if config.leakage == "drop":
        kept = [example for example in train if example.key not in reported]
        if len(kept) < len(train):
            dropped = counted(len(train) - len(kept), "row")
            warnings.append(f"{config.train}: {dropped} dropped, with values that are in validation")
        train = kept
    used = _without_repeats(train, limit.train, config.duplicates, warnings)
    _check_leakage(used, validation, config.leakage, warnings)
    is_set = "selection" in limit.model_fields_set
    used, selection = _select(train, used, reported, limit.selection, config.train, seed, warnings, is_set)
    return Dataset(tuple(used), tuple(selection), tuple(validation), tuple(warnings))


def _columns(config: DataConfig, template: Template) -> Columns:
    for name in config.columns:
        if name not in template.slots:
            near = difflib.get_close_matches(name, template.slots, 1)
            fix = f"did you mean {near[0]!r}?" if near else f"the slots are: {', '.join(template.slots)}"
            raise InputError(f"{name!r} is not a slot of the template", where="data.columns", fix=fix)
    return Columns(template.slots, config.columns, config.output)


def _patterns(only: dict[str, str]) -> dict[str, re.Pattern[str]]:
    patterns = {}
    for path, pattern in only.items():
        try:
            patterns[path] = re.compile(pattern)
        except re.error as error:
            raise InputError(f"{pattern!r} is not a regular expression: {error}", where=f"data.only.{path}") from None
    return patterns


def _is_wanted(fields: Mapping[str, Any], wanted: Mapping[str, re.Pattern[str]]) -> bool:
    """Whether every pattern is found in its column. Raises NoValue for a column that is not there."""
    return all(
        pattern.search(as_text(find(fields, path, "data.only"), f"data.only ({path!r})"))
        for path, pattern in wanted.items()
    )


def places(sources: Sequence[str]) -> str:
    """Where rows stand, ``"train.jsonl:3, 7, 9 and 12 more"``: the first places, the file named once."""
    file = sources[0].rsplit(":", 1)[0]
    rest = [s.removeprefix(f"{file}:") for s in sources[1:SHOWN]]
    more = f" and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
    return ", ".join([sources[0], *rest]) + more


def _read(
    source: str,
    part: str,
    columns: Columns,
    wanted: Mapping[str, re.Pattern[str]],
    records: Iterable[Record],
    warnings: list[str],
) -> list[Example]:
    """Every wanted row of a source as an example; the rows at fault are collected and reported together."""
    examples: list[Example] = []
    faults: dict[str, list[str]] = {}
    seen: Counter[str] = Counter()
    used: set[str] = set()
    blank: list[str] = []
    unseen: dict[str, list[str]] = {}
    for number, record in enumerate(records):
        fields, where = record.fields, record.where
        seen.update(fields.keys())
        used |= {path if path in fields else path.split(".")[0] for path in wanted}
        try:
            if not _is_wanted(fields, wanted):
                continue
            example = Example(f"{part}:{number}", columns.values(fields), columns.gold(fields), where)
        except NoValue as error:
            faults.setdefault(str(error), []).append(where)
            continue
        examples.append(example)
        used |= columns.used(fields)
        if not all(value.strip() for value in example.values.values()):
            blank.append(where)
        if what := unseen_messages(fields, columns):
            unseen.setdefault(what, []).append(where)
    if faults:
        raise _faulty(faults)
    if not examples and wanted and seen:
        raise InputError("data.only leaves no row", where=source, fix="change the pattern")
    if not examples:
        raise InputError("the data set is empty", where=source, fix="it needs at least one row")
    unused = [name for name in seen if name not in used]
    if unused:
        warnings.append(f"{source}: columns that no slot uses: {', '.join(unused)}")
    if blank:
        warnings.append(f"{places(blank)}: a slot value is empty")
    for what, rows in unseen.items():
        warnings.append(f"{places(rows)}: no slot takes {what} (add one, with its path in data.columns)")
    return examples


def _faulty(faults: dict[str, list[str]]) -> InputError:
    """The first kind of fault, its places, and how many rows have other faults."""
    what, sources = next(iter(faults.items()))
    others = sum(map(len, faults.values())) - len(sources)
    fix = None
    if "has no column" in what:
        fix = "rename the column, or map it in data.columns; data.output names the output's"
    elif "is null" in what or "is empty" in what:
        fix = "fill it in or remove the row"
    return InputError(
        what + (f"; {counted(others, 'more row')} with other faults" if others else ""), where=places(sources), fix=fix
    )


def _set_aside(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Divide by a hash of the values, so equal inputs stay together and more rows do not move the others."""
    ranks = {key: _rank(key, "validation", seed) for key in {example.key for example in examples}}
    threshold = max(fraction, min(ranks.values()))
    aside = [example for example in examples if ranks[example.key] <= threshold]
    kept = [example for example in examples if ranks[example.key] > threshold]
    if not kept:
        raise InputError("all rows have the same values", where=examples[0].source, fix="give a validation file")
    return kept, aside


def _rank(key: tuple[str, ...], purpose: str, seed: int) -> float:
    """A number in [0, 1) that depends on the values, the purpose and the seed alone."""
    return int(sha256_json([purpose, seed, key])[:13], 16) / 16**13


def _without_repeats(rows: list[Example], limit: int | None, policy: Policy, warnings: list[str]) -> list[Example]:
    """The first ``limit`` rows, after dropping repeated ones if that is the policy; else tell about them."""
    used = rows[:limit] if policy != "drop" else rows
    first: dict[tuple[str, ...], Example] = {}
    same: list[tuple[Example, Example]] = []
    contrary: list[tuple[Example, Example]] = []
    kept = []
    for example in used:
        before = first.setdefault(example.key, example)
        if before is example:
            kept.append(example)
        else:
            (same if before.output == example.output else contrary).append((before, example))
    fix = "remove them, or set data.duplicates"
    _tell(same, "repeats {}", fix, policy, warnings)
    _tell(contrary, "repeats {} with another output", fix, policy, warnings)
    return kept[:limit] if policy == "drop" else used


def _check_leakage(train: Iterable[Example], validation: list[Example], policy: Policy, warnings: list[str]) -> None:
    held_out = {example.key: example for example in reversed(validation)}
    leaks = [(held_out[example.key], example) for example in train if example.key in held_out]
    fix = "remove them from one of the two, or set data.leakage"
    _tell(leaks, "has the same values as the validation row {}", fix, policy, warnings)


def _tell(pairs: list[tuple[Example, Example]], verb: str, fix: str, policy: Policy, warnings: list[str]) -> None:
    """Raise or warn about rows that should not be there, each beside the row it goes with."""
    if not pairs:
        return
    what = f"{'the first ' if len(pairs) > 1 else ''}{verb.format(pairs[0][0].source)}"
    where = places([example.source for _, example in pairs])
    if policy == "error":
        raise InputError(what, where=where, fix=fix)
    warnings.append(f"{where}: {what}{' (dropped)' if policy == 'drop' else ''}")


def _select(
    rows: list[Example],
    train: list[Example],
    taken: set[tuple[str, ...]],
    count: int,
    source: str,
    seed: int,
    warnings: list[str],
    is_set: bool,
) -> tuple[list[Example], list[Example]]:
    """Selection rows from beyond the training rows, or else out of them; never the values of another part's row. Too
    few of them are worth a warning where a user set their ``count``.
    """
    taken = taken | {example.key for example in train}
    last = train[-1].id if train else ""
    beyond = iter(rows)
    for example in beyond:
        if example.id == last:
            break
    selection: list[Example] = []
    for example in beyond:
        if len(selection) == count:
            return train, selection
        if example.key not in taken:
            taken.add(example.key)
            selection.append(example)
    if len(selection) == count:
        return train, selection
    keys = sorted({example.key for example in train}, key=lambda key: _rank(key, "selection", seed))
    if len(keys) < 2 and not selection:
        raise InputError("too few different rows to train on and to select with", where=source, fix="give at least two")
    carved = set(keys[: min(count - len(selection), max(len(keys) // 4, 0 if selection else 1))])
    chosen = {example.key: example for example in reversed(train) if example.key in carved}
    selection = sorted([*chosen.values(), *selection], key=_row_number)
    if len(selection) < count and is_set:
        warnings.append(f"{source}: only {counted(len(selection), 'row')} for selection, not {count}")
    return [example for example in train if example.key not in carved], selection


def _row_number(example: Example) -> int:
    return int(example.id.rsplit(":", 1)[1])
