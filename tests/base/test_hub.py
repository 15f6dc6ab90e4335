"""Bases from the hub, against a server that answers as the hub does: what is fetched, what is completed, and what is
used without a network."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from kvopt.base import hub, identity
from kvopt.base.loading import load_base, load_tokenizer
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError
from tests.tiny import tiny_folder

COMMIT = "a" * 40
NAME = "acme/tiny"


@dataclass
class Served:
    """The repository's files, the local cache, and the files that were fetched."""

    repository: Path
    cache: Path
    fetched: list[str] = field(default_factory=list)

    @property
    def snapshot(self) -> Path:
        return self.cache / "models--acme--tiny" / "snapshots" / COMMIT

    @property
    def weights(self) -> list[str]:
        """The weight files fetched since the last look, which forgets them."""
        names = [name for name in self.fetched if name.endswith(".safetensors")]
        self.fetched.clear()
        return names

    def remove(self, name: str) -> None:
        """Forget a file of the cache, as an interrupted download leaves it."""
        link = self.snapshot / name
        link.resolve().unlink()
        link.unlink()


def _sharded(folder: Path) -> None:
    """The weights in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, shards = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = dict(zip(shards, (names[: len(names) // 2], names[len(names) // 2 :]), strict=True))
    for shard, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A hub on this machine with one repository, large files by their SHA-256 and small ones by git's hash."""
    here = Served(tmp_path / "hub", tmp_path / "cache")
    shutil.copytree(tiny_folder("llama"), here.repository)
    _sharded(here.repository)
    for name in ("README.md", ".gitattributes"):
        (here.repository / name).write_text("of no use to a base")

    def entry(path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        facts = {"type": "file", "path": path.name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if path.suffix == ".safetensors":
            facts["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        return facts

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[:2] == ["api", "models"] and "tree" in parts:
                self.answer(json.dumps([entry(path) for path in sorted(here.repository.iterdir())]).encode())
            elif parts[:2] == ["api", "models"]:
                self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
            elif "resolve" in parts:
                path = here.repository / parts[-1]
                facts = entry(path)
                etag = facts["lfs"]["oid"] if "lfs" in facts else facts["oid"]
                if self.command == "GET":
                    here.fetched.append(path.name)
                self.answer(path.read_bytes(), ETag=f'"{etag}"', **{"X-Repo-Commit": COMMIT})
            else:
                self.answer(b"")

        def answer(self, body: bytes, **headers: str) -> None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield here
    server.shutdown()
    server.server_close()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


CONFIG = ModelConfig(base=NAME, dtype="float32", device="cpu")


def test_a_tokenizer_comes_without_weights_and_the_rest_when_it_is_needed(served: Served) -> None:
    load_tokenizer(CONFIG)
    assert served.weights == []
    load_base(CONFIG)
    assert len(served.weights) == 2
    load_base(CONFIG)
    load_tokenizer(CONFIG)
    assert served.fetched == []


def test_what_is_whole_is_used_without_a_network_whatever_else_the_hub_has(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_base(CONFIG)
    assert {"README.md", ".gitattributes"}.isdisjoint(served.fetched)
    served.remove("generation_config.json")  # the hub lists it, a base does without
    offline(monkeypatch)
    assert load_base(CONFIG).geometry.layers == 3
    load_tokenizer(CONFIG)


def test_an_incomplete_snapshot_is_completed_and_only_that(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    load_base(CONFIG)
    served.fetched.clear()
    served.remove("model-00002-of-00002.safetensors")
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(InputError, match=r"without 1 weight file, first model-00002.*in the local hub cache, and"):
            load_base(CONFIG)
        load_tokenizer(CONFIG)
    load_base(CONFIG)
    assert served.weights == ["model-00002-of-00002.safetensors"]


def test_an_older_caches_half_snapshot_is_seen_by_its_index(served: Served) -> None:
    """huggingface_hub before 2.0 kept no list of files, and calls any folder complete."""
    load_base(CONFIG)
    served.fetched.clear()
    served.remove("model-00001-of-00002.safetensors")
    for listing in served.cache.rglob("trees"):
        shutil.rmtree(listing)
    load_base(CONFIG)
    assert served.weights == ["model-00001-of-00002.safetensors"]


def test_what_is_nowhere_is_one_line(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(InputError, match=r"model.base acme/tiny: not in the local hub cache, and the hub cannot"):
        load_base(CONFIG)


def test_the_hash_of_a_blob_is_its_name(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(CONFIG)
    files = hub.weight_files(served.snapshot)
    assert base.identity["weights"] == identity.weights_sha256(hub.weight_files(served.repository))
    with monkeypatch.context() as patch:
        patch.setattr(identity, "sha256_file", lambda path: pytest.fail(f"{path} was read"))
        assert identity.weights_sha256(files) == base.identity["weights"]
    files[0].resolve().rename(served.cache / "elsewhere")
    files[0].unlink()
    files[0].symlink_to(served.cache / "elsewhere")  # any other link says nothing of what it points to
    read = list[Path]()
    monkeypatch.setattr(identity, "sha256_file", lambda path: read.append(path) or "0" * 64)
    identity.weights_sha256(files)
    assert read == [files[0]]


def test_a_folder_that_lacks_a_file_of_its_index_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    _sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks 1 weight file that its index names, first model-00002"):
        load_base(ModelConfig(base=str(folder), device="cpu"))
