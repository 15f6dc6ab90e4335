"""Shared fixtures. Tests are seeded, run offline, and use one thread a worker; slow tests run only when asked for
(``-m slow``). Tests marked gpu run on the CPU unless ``KVOPT_TEST_DEVICE`` names another device."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings

from kvopt import cli
from kvopt.base.loading import Base, load_base
from kvopt.config.model import ModelConfig
from tests.tiny import MODELS, TOKENIZERS, tiny_base, tiny_tokenizer

settings.register_profile("kvopt", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("kvopt")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def kvopt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in ``tmp_path``; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kvopt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err  # type: ignore[return-value]

    return run


@pytest.fixture(scope="session")
def llama() -> Base:
    """Tiny Llama with the ChatML tokenizer."""
    return tiny_base("llama")


@pytest.fixture(scope="session")
def qwen3() -> Base:
    """Tiny Qwen3 with the tokenizer without a chat template."""
    return tiny_base("qwen3")


@pytest.fixture(scope="session")
def gemma3() -> Base:
    """Tiny Gemma 3 with the Gemma-like tokenizer."""
    return tiny_base("gemma3")


@pytest.fixture(scope="session", params=MODELS)
def base(request: pytest.FixtureRequest) -> Base:
    """Each tiny base in turn."""
    return tiny_base(request.param)


@pytest.fixture(scope="session", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> object:
    """Each tiny tokenizer in turn."""
    return tiny_tokenizer(request.param)


@pytest.fixture(scope="session")
def smollm2() -> Base:
    """The built-in base in float32, from the user's cache, made on first use (for tests marked slow)."""
    return load_base(ModelConfig(dtype="float32", device="cpu"))
