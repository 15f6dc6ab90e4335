"""An export that is killed while it writes: nothing at its place, and nothing left over after the next try."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvopt.contexts.context import KVContext
from kvopt.contexts.folder import save_context
from kvopt.storage.files import replacing_directory
from tests.tiny import tiny_base

KILLED = """
import os, signal, sys
from pathlib import Path
import kvopt.export.writing as writing

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

writing.card = die  # all files of the format are written, kvopt-export.json too
writing.export(sys.argv[1], "hf-cache", Path(sys.argv[2]))
"""


def in_folder(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_export_leaves_nothing_at_its_place_and_its_leftover_goes_at_the_next_try(tmp_path: Path) -> None:
    base = tiny_base("llama")
    geometry = base.geometry
    import torch

    states = torch.randn(4, geometry.layers, 2, geometry.kv_heads, geometry.head_dim)
    context = tmp_path / "kv-4"
    save_context(KVContext("kv-4", states), context, base)
    out = tmp_path / "exports" / "there"
    done = subprocess.run([sys.executable, "-c", KILLED, str(context), str(out)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    (leftover,) = in_folder(out.parent)
    assert leftover.startswith(".there.")
    from kvopt.export.writing import export

    export(str(context), "hf-cache", out)
    assert in_folder(out.parent) == {"there"}
    assert ".writing" not in in_folder(out)


def test_a_folder_that_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with replacing_directory(tmp_path / "a") as first:
        (first / "file").write_text("first")
        with replacing_directory(tmp_path / "a") as second:
            (second / "file").write_text("second")
        assert (tmp_path / "a" / "file").read_text() == "second"
        assert (first / "file").is_file()
    assert (tmp_path / "a" / "file").read_text() == "first"
    assert in_folder(tmp_path) == {"a"}


def test_leftovers_of_other_folders_stay(tmp_path: Path) -> None:
    other = tmp_path / ".a.b.xyz.partial"
    other.mkdir()
    (tmp_path / ".a.xyz.partial").mkdir()
    with replacing_directory(tmp_path / "a"):
        pass
    assert in_folder(tmp_path) == {"a", other.name}
