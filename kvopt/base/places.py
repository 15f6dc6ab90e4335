"""Where a base's files are: the built-in model, a fetched hub id, a folder, or a converted GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from kvopt.base import builtin, hub
from kvopt.base.gguf import save_gguf_as_folder
from kvopt.config.model import BUILTIN_BASE
from kvopt.errors import InputError, counted
from kvopt.storage.files import sha256_file

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
GGUF_LAYOUT = 2  # part of the folder's name; raise it when the conversion changes


def locate(base: str, revision: str | None, say: Callable[[str], None], *, weights: bool = True) -> Path:
    """The local folder with the config, tokenizer and weights of ``base``, fetched or converted if need be; without
    ``weights``, those of a hub model are not fetched. Raises InputError."""
    if base == BUILTIN_BASE:
        return builtin.builtin_folder(say)
    path, where = Path(base).expanduser(), f"model.base {base}"
    if base.lower().endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"no such GGUF file: {path.resolve()}", where=where)
        return _converted(path, say)
    if path.is_dir():
        return checked_folder(path, where)
    if path.exists():
        raise InputError("is a file; a base is a model folder, a hub id or a .gguf file", where=where)
    if base.startswith((".", "/", "~")) or not HUB_ID.fullmatch(base):
        raise InputError(
            f"no such folder: {path.resolve()}", where=where, fix=f"give a model folder, a hub id or {BUILTIN_BASE}"
        )
    return checked_folder(hub.snapshot(base, revision, weights=weights), where, weights=weights)


def checked_folder(folder: Path, where: str, *, weights: bool = True) -> Path:
    """The folder, where it holds a model. Raises InputError for one that does not."""
    if not (folder / "config.json").is_file():
        fix = "an adapter or context folder is not a base; give the model that it belongs to"
        raise InputError("the folder has no config.json", where=where, fix=fix)
    if not hub.has_tokenizer(folder):
        raise InputError("the base has no tokenizer", where=where, fix="save its tokenizer into the folder")
    if weights and not hub.weight_files(folder):
        raise InputError("the folder has no weights (*.safetensors or pytorch_model*.bin)", where=where)
    if weights and (absent := hub.missing_weights(folder)):
        what = f"the folder lacks {counted(len(absent), 'weight file')} that its index names, first {absent[0]}"
        raise InputError(what, where=where, fix="complete it")
    if (folder / "adapter_config.json").is_file():  # transformers would put the adapter on top of the weights
        raise InputError(
            "the folder holds a whole model and an adapter (adapter_config.json), which would be applied to it",
            where=where,
            fix="move the adapter_* files away if they are merged, else merge them first",
        )
    return folder


def _converted(file: Path, say: Callable[[str], None]) -> Path:
    digest = sha256_file(file)
    folder = hub.cache_folder() / "bases" / f"gguf-{digest[:32]}-v{GGUF_LAYOUT}"
    if (folder / "source.json").is_file():
        return folder
    with hub.locked(folder):
        if not (folder / "source.json").is_file():
            say(f"converting {file.name} to bf16 safetensors (once)")
            save_gguf_as_folder(file, folder, {"source": f"gguf:{digest}"})
    return folder


def source_of(folder: Path) -> str | None:
    """Where a converted base came from, as its folder says; None for any other."""
    file = folder / "source.json"
    return json.loads(file.read_text(encoding="utf-8"))["source"] if file.is_file() else None
