"""Run the notebooks of ``examples/`` and keep their outputs.

    python tools/run_notebooks.py                # run them, and write what they print into them
    python tools/run_notebooks.py --check        # run them, and write nothing: an error in a cell ends with exit code 1

Each runs in a folder of its own that is removed afterwards. They need the extra ``notebooks``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in ``folder``. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.get("metadata", {}).pop("execution", None)
        if cell.cell_type == "code":
            cell["outputs"] = [shown for output in cell["outputs"] if (shown := _plain(output, folder))]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _plain(output: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode | None:
    """An output without the place of this run, colours and warnings; None for what holds progress alone."""
    if output.output_type == "stream":
        if output.name == "stderr":
            return None
        output["text"] = CONTROL.sub("", output.text).replace(str(folder), ".")
    return output


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Run the notebooks of examples/.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    failed = False
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            try:
                notebook = run(path, Path(place))
            except CellExecutionError as error:
                print(f"{path.name}: {error}", file=sys.stderr)
                failed = True
                continue
        if not arguments.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
