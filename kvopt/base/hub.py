"""Model folders from the Hugging Face hub and from kvopt's own cache; what is cached is used first, and nothing waits
long for a network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

from kvopt.errors import InputError, counted
from kvopt.storage.files import parsed_json
from kvopt.storage.locks import acquire_lock

HUB_FAILURES: tuple[type[Exception], ...] = (
    *(kind for kind in HfHubHTTPError.__mro__ if kind.__name__.endswith("HTTPError") and issubclass(kind, Exception)),
    LocalEntryNotFoundError,
    OSError,
)
"""What an answer or a connection that fails raises: errors of the hub's own client, httpx or its successor."""
TIMEOUT = 4.0  # seconds until the hub counts as unreachable
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
IGNORED_FILES = ["*/*", "consolidated*", "adapter_*"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def cache_folder() -> Path:
    """``$KVOPT_CACHE``, or ``$XDG_CACHE_HOME/kvopt``, or ``~/.cache/kvopt``; not created."""
    if chosen := os.environ.get("KVOPT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvopt"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock beside ``path`` against other processes; it is released when the process ends, however it ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(path.with_name(f".{path.name}.lock"))
    except OSError as error:
        fix = "set KVOPT_CACHE to a folder you can write to"
        raise InputError(f"no permission to write ({error.strerror})", where=str(path.parent), fix=fix) from error
    with lock:
        yield


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers would load from ``folder``: safetensors if there are any, else PyTorch
    files."""
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        if files := sorted(
            file for file in folder.glob(pattern) if not file.name.startswith(("adapter_", "consolidated"))
        ):
            return files
    return []


def missing_weights(folder: Path) -> list[str]:
    """The weight files that the index of ``folder`` names and that are not there; none without an index."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        try:
            named = parsed_json((folder / index).read_bytes())["weight_map"].values()
            return sorted({str(name) for name in named if not (folder / str(name)).is_file()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return []


def has_tokenizer(folder: Path) -> bool:
    """Whether any file in ``folder`` can hold a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def unreachable() -> str | None:
    """Why the hub cannot be used now, in a few words, or None when it answers."""
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "offline mode is on (HF_HUB_OFFLINE)"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except HUB_FAILURES as error:
        return f"the hub cannot be reached ({type(error).__name__})"
    return None


def snapshot(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a hub model: the local hub cache when all that is needed is there, else a download, which fetches
    what is missing. Without ``weights``, config and tokenizer are all that is needed.

    Raises InputError when the id is unknown, gated, or neither cached nor reachable.
    """
    where = f"model.base {name}"
    if (folder := _cached(name, revision, weights)) is not None:
        return folder
    if reason := unreachable():
        folder = _cached_folder(name, revision)
        if folder is not None and _is_complete(folder, weights):  # as far as anything that is loaded from it goes
            return folder
        fix = "check the name and the network, or give a local folder or .gguf file"
        raise InputError(f"{_found(folder)} the local hub cache, and {reason}", where=where, fix=fix)
    try:
        return download(name, revision, weights=weights)
    except GatedRepoError as error:
        raise InputError("access to this hub model needs permission", where=where, fix="log in to the hub") from error
    except RepositoryNotFoundError as error:
        raise InputError("no such model on the hub", where=where, fix="check the id or log in to the hub") from error
    except HUB_FAILURES as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the download failed: {reason}", where=where, fix="run again to resume it") from error


def _cached(name: str, revision: str | None, weights: bool) -> Path | None:
    """The folder in the local hub cache, None where something that kvopt would ask for is missing."""
    for patterns in _patterns(weights):
        try:
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision,
                    local_files_only=True,
                    allow_patterns=patterns,
                    ignore_patterns=IGNORED_FILES,
                )
            )
        except LocalEntryNotFoundError:  # nothing there, or less than the hub had
            continue
        if _is_complete(folder, weights):
            return folder
    return None


def _cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder of a revision in the local hub cache, however much of it is there."""
    place = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(place).parent if isinstance(place, str) else None


def _is_complete(folder: Path, weights: bool) -> bool:
    """Whether all that a base is loaded from is there."""
    described = (folder / "config.json").is_file() and has_tokenizer(folder)
    return described and (not weights or (bool(weight_files(folder)) and not missing_weights(folder)))


def _found(folder: Path | None) -> str:
    """What is missing, before "the local hub cache"."""
    if folder is None:
        return "not in"
    if absent := missing_weights(folder):
        return f"without {counted(len(absent), 'weight file')}, first {absent[0]}, in"
    return f"without {'weights' if has_tokenizer(folder) else 'a tokenizer'} in"


def _patterns(weights: bool) -> list[list[str]]:
    """What is asked for, one call after the other: config and tokenizer, with safetensors, or else PyTorch files."""
    return [[*SMALL_FILES, kind] for kind in ("*.safetensors", "pytorch_model*.bin")] if weights else [SMALL_FILES]


def download(name: str, revision: str | None = None, target: Path | None = None, *, weights: bool = True) -> Path:
    """Fetch config, tokenizer and weights (safetensors, else PyTorch files) of the repository's top folder."""
    for patterns in _patterns(weights):
        folder = Path(
            snapshot_download(
                name, revision=revision, local_dir=target, allow_patterns=patterns, ignore_patterns=IGNORED_FILES
            )
        )
        if weight_files(folder):
            break
    return folder
