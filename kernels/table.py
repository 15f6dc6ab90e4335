"""Which backend is fastest, by device, D and V: ``backends.json``, and before it what ``kvopt bench kl --write-table``
measured on this machine, which is kept in the user's cache.

One entry per kind of device: "cpu", "cuda", "rocm", or a GPU's own name where it was measured. ``measured`` says on
what and with which times, or is null: then the choice is computed from traffic and products (on a GPU store-free tiles
up to D = 1024, where writing logits would take longer than the products). ``choices`` are tried in order; the first
whose ``max_features`` (D) and ``max_vocabulary`` (V), where given, are not exceeded holds.
"""

from __future__ import annotations

import json
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvopt.kernels.options import KernelInputError, KLOptions
from kvopt.kernels.user_files import read_mapping, user_file, write_mapping

PATH = Path(__file__).with_name("backends.json")
USERS = "backends.json"
"""The name of the user's own table."""

USES = {
    "torch": KLOptions(backend="torch", rows="eager"),
    "torch compiled rows": KLOptions(backend="torch", rows="compiled"),
    "triton rows": KLOptions(backend="triton-rows"),
    "triton store-free": KLOptions(backend="triton-store-free"),
}
"""Names in the table and the options that ask for them."""

NOISE = 0.1
"""A difference in time that is not worth a less plain backend."""

CONTRACT = 1e-2
"""Gradient error above which a backend is never chosen, however fast."""


@lru_cache
def load_table() -> dict[str, Any]:
    """The table that comes with the package, with the user's own entries in place of its."""
    own = read_mapping(user_file(USERS))
    unusable = [kind for kind, entry in own.items() if not _is_entry(entry)]
    if unusable:
        warnings.warn(f"{user_file(USERS)}: its entry {unusable[0]!r} is not used; measure it again", stacklevel=2)
    return json.loads(PATH.read_text("utf-8")) | {kind: entry for kind, entry in own.items() if kind not in unusable}


def _is_entry(entry: Any) -> bool:
    """Whether the choices of an entry are some that this version knows, the last for every size."""
    try:
        choices = entry["choices"]
        return all(choice["use"] in USES for choice in choices) and set(choices[-1]) == {"use"}
    except (TypeError, KeyError, IndexError):
        return False


def device_kind(device: torch.device) -> str:
    """The table's name for a device: a measured GPU's own, else "cuda", "rocm" or "cpu" (any other kind, too)."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    return name if name in load_table() else "rocm" if torch.version.hip else "cuda"


def best_use(kind: str, features: int, vocabulary: int, table: dict[str, Any] | None = None) -> str:
    """The name in USES that the table gives for a kind of device, D and V."""
    for choice in (table or load_table())[kind]["choices"]:
        if features <= choice.get("max_features", features) and vocabulary <= choice.get("max_vocabulary", vocabulary):
            return choice["use"]
    raise KernelInputError(f"the backend table has no choice for {kind}, D = {features}, V = {vocabulary}")


def write_table(report: dict[str, Any], kind: str, path: Path | None = None) -> list[dict[str, Any]]:
    """Replaces the entry of ``kind`` by what a benchmark of USES measured; returns its choices.

    Args:
        report: as ``benchmark.run`` returns it, with implementations named "kvopt: " + a name in USES.
        path: the table; default: the user's own.
    """
    path = path or user_file(USERS)
    measured: list[dict[str, Any]] = []
    fastest: dict[tuple[int, int], str] = {}
    for entry in report["shapes"]:
        times: dict[str, float] = {}
        for name, result in entry["results"].items():
            worst = max(errors["gradient"] for errors in result["errors"].values())
            if name.removeprefix("kvopt: ") in USES and worst <= CONTRACT:
                times[name.removeprefix("kvopt: ")] = round(result["median_ms"], 1)
        if times:
            measured.append({"shape": list(entry["shape"]), "milliseconds": times})
            fastest[entry["shape"][1], entry["shape"][2]] = _winner(times)
    if not measured:
        raise KernelInputError("no backend was measured; the table stays as it is")
    choices = _choices(fastest)
    facts = {**report["environment"], "dtype": report["dtype"], "shapes": measured}
    write_mapping(path, read_mapping(path) | {kind: {"measured": facts, "choices": choices}})
    load_table.cache_clear()
    return choices


def _winner(times: dict[str, float]) -> str:
    """The plainest (first in USES) of those that are within NOISE of the fastest."""
    return next(use for use in USES if use in times and times[use] <= (1 + NOISE) * min(times.values()))


def _choices(fastest: dict[tuple[int, int], str]) -> list[dict[str, Any]]:
    """Rules from the fastest at each measured (D, V): each holds up to half way (geometrically) to the next."""
    if len(set(fastest.values())) == 1:
        return [{"use": next(iter(fastest.values()))}]
    choices = []
    sizes = sorted({d for d, _ in fastest})
    for d, next_d in zip(sizes, [*sizes[1:], None], strict=True):
        words = sorted(v for features, v in fastest if features == d)
        for v, next_v in zip(words, [*words[1:], None], strict=True):
            choice: dict[str, Any] = {} if next_d is None else {"max_features": round((d * next_d) ** 0.5)}
            choice |= {} if next_v is None else {"max_vocabulary": round((v * next_v) ** 0.5)}
            choices.append({**choice, "use": fastest[d, v]})
    return choices
