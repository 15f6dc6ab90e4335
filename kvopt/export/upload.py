"""``--push-to-hub``: an export as a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from kvopt.base.hub import HUB_FAILURES
from kvopt.errors import InputError, KvoptError

PUSH_FAILURES: tuple[type[Exception], ...] = (*HUB_FAILURES, HFValidationError, OfflineModeIsEnabled)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def check_repository(name: str) -> None:
    """Raise InputError, before any work, for a name that is no USER/REPOSITORY."""
    if not REPOSITORY.fullmatch(name):
        raise InputError(f"{name!r} is no repository", where="--push-to-hub", fix="give USER/NAME")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Create ``repository`` if need be and upload the folder's files; returns its address.

    Raises KvoptError when the hub cannot be reached or refuses, in one line; the folder stays as it is.
    """
    check_repository(repository)
    try:
        api = HfApi()
        created = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=f"kvopt export: {folder.name}")
    except LocalTokenNotFoundError as error:
        raise InputError("no token for the hub", where="--push-to-hub", fix="run: hf auth login") from error
    except PUSH_FAILURES as error:
        reason = " ".join(str(error).split())[:300]
        raise KvoptError(f"{repository}: cannot be pushed: {reason}; the export stays in {folder}") from error
    return str(created)
