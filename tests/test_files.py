"""Files are written whole or not at all, and what a process that died left beside them goes at the next write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvopt.errors import KvoptError
from kvopt.storage import files
from kvopt.storage.files import append_line, mend_last_line, remove_partials, replacing_directory, write_bytes

ROOT = Path(__file__).parents[1]
DIES = """
import os, signal, sys
from kvopt.storage import files
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_bytes(sys.argv[1], b"half")
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("name", ["rows.jsonl", "n" * 200 + ".validation.safetensors"])
def test_what_a_killed_write_left_goes_at_the_next_write_of_the_same_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_bytes(path, b"before")
    done = subprocess.run([sys.executable, "-c", DIES, str(path)], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"before"
    (left,) = [one for one in names(tmp_path) if one != name]
    assert len(left) <= 255
    write_bytes(tmp_path / "other", b"")
    assert left in names(tmp_path), "that of another file stays"
    write_bytes(path, b"after")
    assert names(tmp_path) == sorted([name, "other"])
    assert path.read_bytes() == b"after"


def test_what_a_living_process_is_writing_stays(tmp_path: Path) -> None:
    mine = tmp_path / (files._partial_start(tmp_path / "a", os.getpid()) + "xyz.partial")
    mine.write_bytes(b"half")
    write_bytes(tmp_path / "a", b"whole")
    assert mine.read_bytes() == b"half"


def test_a_file_is_put_in_place_by_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy could be seen half done."""
    write_bytes(tmp_path / "a", b"before")

    def refuse(*_: object) -> None:
        raise OSError(5, "refused")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KvoptError, match="refused"):
        write_bytes(tmp_path / "a", b"after")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_a_line_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "lines"
    append_line(path, "one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KvoptError, match="the disk is full"):
        append_line(path, "two")
    assert path.read_bytes() == b"one\n"
    path.write_bytes(b"one\ntw")
    mend_last_line(path)
    assert path.read_bytes() == b"one\n"
    mend_last_line(tmp_path / "none")


@pytest.mark.parametrize("clean", ["the same folder again", "the whole directory"])
def test_a_folder_that_was_about_to_be_replaced_comes_back(tmp_path: Path, clean: str) -> None:
    """The process died between the two renames: the old folder has another name, the new one is not in place."""
    (tmp_path / "there" / "sub").mkdir(parents=True)
    (tmp_path / "there").rename(tmp_path / ".there.abc123.partial.old")
    (tmp_path / ".there.abc123.partial").mkdir()

    class Died(Exception):
        pass

    def again() -> None:
        with replacing_directory(tmp_path / "there"):
            raise Died

    if clean == "the whole directory":
        remove_partials(tmp_path)
    else:
        with pytest.raises(Died):
            again()
    assert names(tmp_path) == ["there"]
    assert (tmp_path / "there" / "sub").is_dir()
