"""What a base is, as hashes: weights, configuration, tokenizer and chat template. Contexts learned on one identity
are refused on another."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvopt.base.hub import cache_folder
from kvopt.documents.part import BaseIdentity
from kvopt.errors import InputError, KvoptError
from kvopt.storage.files import sha256_bytes, sha256_file, sha256_json, write_json

LARGE = 1 << 30  # bytes; a larger file's hash is remembered under its path, size and modification time
SHA256 = re.compile(r"[0-9a-f]{64}")
INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


def weights_sha256(files: Sequence[Path]) -> str:
    """Hash of the contents of all weight ``files``, in order of their names (the folder they lie in does not
    matter)."""
    return sha256_json([[file.name, _content_sha256(file)] for file in sorted(files, key=lambda file: file.name)])


def _content_sha256(file: Path) -> str:
    """The hash of a file. One in the hub's cache has it as its name: large files are kept there under the SHA-256 that
    the hub gives them, and linked to.
    """
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
        return blob.name
    facts = file.stat()
    if facts.st_size < LARGE:
        return sha256_file(file)
    key = sha256_json([str(file.resolve()), facts.st_size, facts.st_mtime_ns])
    note = cache_folder() / "hashes" / f"{key}.json"
    try:
        known = json.loads(note.read_text())["sha256"]
        if isinstance(known, str) and len(known) == 64:
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = sha256_file(file)
    with contextlib.suppress(KvoptError, OSError):  # a cache that cannot be written only costs time
        write_json(note, {"file": str(file), "sha256": digest})
    return digest


def config_sha256(folder: Path) -> str:
    """Hash of ``config.json`` without the entries that say nothing about the model (name, versions, dtype it was
    saved in), and of the Python code that comes with it where it names any."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = {key: value for key, value in values.items() if key not in INCIDENTAL}
    if told.get("auto_map"):
        told["code"] = {file.name: sha256_file(file) for file in sorted(folder.glob("*.py"))}
    return sha256_json(told)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what the tokenizer does: its serialised pipeline (padding and truncation aside), or vocabulary and
    special tokens of a slow one."""
    special = {
        name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items()) if isinstance(value, str)
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sha256_json({"vocabulary": tokenizer.get_vocab(), "special": special, "class": type(tokenizer).__name__})
    pipeline = json.loads(backend.to_str())
    pipeline.pop("padding", None)
    pipeline.pop("truncation", None)
    return sha256_json({"pipeline": pipeline, "special": special})


def chat_template_sha256(tokenizer: Any) -> str | None:
    """Hash of the chat template, None for a tokenizer without one."""
    template = tokenizer.chat_template
    if template is None:
        return None
    return sha256_bytes(template.encode()) if isinstance(template, str) else sha256_json(template)


def check_base(
    recorded: BaseIdentity | None, name: str, identity: Mapping[str, str | None], folder: Path, how: str = "made for"
) -> None:
    """Compare the base that a folder was ``how``, as its record says, with the one of this name and identity. Raises
    InputError.
    """
    stored = recorded.to_json() if recorded else {}
    if stored and "weights" in identity:  # older files, and bases as they are stored, say nothing of it
        stored, identity = {"quantization": None} | stored, {"quantization": None, **identity}
    for what, digest in identity.items():
        if what in stored and stored[what] != digest:
            raise InputError(
                f"{how} base {stored.get('name')!r}, which differs from {name!r} in its {what}",
                where=str(folder),
                fix=f"use the base that it was {how}",
            )
