"""What installing kvopt puts on a machine: one top-level package, its data files, and nothing that needs Triton."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("kvopt", "kernels", "train", "configs", "tests")
GENERATED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", "build", "dist", ".*")

LOOK_AROUND = """
import importlib.util, importlib.resources, pathlib
import kvopt, kvopt.kernels, kvopt.train
root = pathlib.Path({root!r})
for name in ("kernels", "train", "configs", "tests", "tiny"):
    spec = importlib.util.find_spec(name)
    places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
    ours = [place for place in places if place and pathlib.Path(place).is_relative_to(root)]
    assert not ours, (name, ours)
configs = importlib.resources.files("kvopt").joinpath("configs")
files = [file for file in configs.iterdir() if file.name.endswith(".yaml")]
assert files and all(file.read_text(encoding="utf-8").strip() for file in files), files
assert importlib.resources.files("kvopt").joinpath("py.typed").is_file()
templates = importlib.resources.files("kvopt").joinpath("report", "templates")
for name in ("report.html.j2", "leaderboard.html.j2", "report.css", "report.js"):
    assert templates.joinpath(name).read_text(encoding="utf-8").strip(), name
print(pathlib.Path(kvopt.__file__).parent)
"""


def python(code: str, cwd: Path, *options: str, **environment: str) -> str:
    """Standard output of ``code`` run by this Python in ``cwd``; fails the test with its error output."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_this_installation_shows_only_kvopt_from_another_folder(tmp_path: Path) -> None:
    assert Path(python(LOOK_AROUND.format(root=str(ROOT)), tmp_path)).name == "kvopt"


def test_no_module_of_kvopt_needs_what_windows_lacks() -> None:
    missing_there = {"curses", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
    files = [file for folder in ("kvopt", "kernels", "train") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        optional = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in optional:
                names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
                assert not names & missing_there, f"{file}:{node.lineno}"


def test_kvopt_imports_without_triton(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None\nimport kvopt.kernels, kvopt.train, kvopt.cli, kvopt.run.run"
    python(code, tmp_path)


def test_command_line_answers_help(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "kvopt"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [
        re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line) for line in lines if line and line[0] != "#"
    ]
    assert all(pairs), "every line is name==version, without a local version tag"
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs if pair}


def test_constraints_pin_every_dependency_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for group in project["optional-dependencies"].values() for line in group),
    ]
    pinned = pins()
    for requirement in map(Requirement, wanted):
        if requirement.name == "kvopt":  # an extra that takes in others
            continue
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert pinned["torch"] == "2.13.0"


def test_constraints_cover_what_the_dependencies_need() -> None:
    pinned = pins()
    for name in ("torch", "transformers", "peft", "datasets", "huggingface-hub", "typer", "pytest", "mypy"):
        for requirement in map(Requirement, requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in pinned, f"{requirement} of {name}"


@pytest.mark.slow
def test_wheel_holds_one_package_and_works_from_its_own_folder(tmp_path: Path) -> None:
    source, site, away = tmp_path / "source", tmp_path / "site", tmp_path / "away"
    source.mkdir()
    away.mkdir()
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=GENERATED)
    for name in ("pyproject.toml", "README.md", "constraints.txt", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    run = [sys.executable, "-m"]
    # without --wheel: the source archive is made first and the wheel out of it, so both are held to it
    build = [*run, "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kvopt"}
    (top_level,) = (name for name in names if name.endswith("top_level.txt"))
    assert zipfile.ZipFile(wheel).read(top_level).split() == [b"kvopt"]
    missing = [
        path.relative_to(ROOT)
        for room in ("kernels", "train", "configs")
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".yaml", ".json") and f"kvopt/{path.relative_to(ROOT).as_posix()}" not in names
    ]
    assert not missing
    install = [*run, "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    assert python(LOOK_AROUND.format(root=str(tmp_path)), away, PYTHONPATH=str(site)) == str(site / "kvopt")
    python("import sys; from kvopt.cli import main; sys.argv = ['kvopt', '--help']; main()", away, PYTHONPATH=str(site))
