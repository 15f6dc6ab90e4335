"""Files are written whole or not at all, and one value has one hash."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from kvopt.errors import InputError, KvoptError
from kvopt.storage.files import (
    canonical_json,
    file_name,
    fits_checksum,
    read_json,
    read_record_file,
    read_text,
    remove_partials,
    replacing_directory,
    sha256_bytes,
    sha256_file,
    sha256_json,
    with_checksum,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
)
from kvopt.storage.locks import acquire_lock
from kvopt.storage.tensors import check_tensors, read_tensors, stored_key, write_tensors

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def reordered(value: object) -> object:
    """The same JSON value with the entries of every object in the opposite order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(list(value))}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def failing(error: OSError) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# ---- hashes


@given(JSON)
def test_the_order_of_entries_changes_no_hash(value: object) -> None:
    assert sha256_json(reordered(value)) == sha256_json(value)
    assert json.loads(canonical_json(value)) == value


def test_hashes_are_those_of_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'
    assert sha256_json({"b": 1, "a": 2}) == sha256_json({"a": 2, "b": 1}) == sha256_bytes(b'{"a":2,"b":1}')
    assert sha256_json([1, 2]) != sha256_json([2, 1])
    assert sha256_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


@pytest.mark.parametrize("write", [write_json, lambda path, value: write_jsonl(path, [1, value])])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_is_not_written(write: Callable[..., None], value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path / "a", {"a": [value]})
    assert not list(tmp_path.iterdir())


def test_a_file_s_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "a") == sha256_bytes(b"abc" * 100_000)


# ---- one file


def test_writers_write_what_they_say(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "folder" / "t.txt", "é\r\n")
    write_json(tmp_path / "j.json", {"b": "雨", "a": 1})
    write_jsonl(tmp_path / "l.jsonl", [{"a": "雨"}, 2])
    assert (tmp_path / "new" / "folder" / "t.txt").read_bytes() == "é\r\n".encode()
    assert (tmp_path / "j.json").read_text("utf-8") == '{\n  "b": "雨",\n  "a": 1\n}\n'
    assert (tmp_path / "l.jsonl").read_text("utf-8") == '{"a": "雨"}\n2\n'
    assert stat.S_IMODE((tmp_path / "j.json").stat().st_mode) == 0o644
    assert {path.name for path in tmp_path.iterdir()} == {"new", "j.json", "l.jsonl"}


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_bytes(path, b"old")
    monkeypatch.setattr(os, call, failing(OSError(28, "No space left on device")))
    with pytest.raises(KvoptError, match=r"a\.json: the disk is full; .*run the same command again"):
        write_bytes(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


def test_no_reader_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the rename the old bytes are there, and the new ones are whole and flushed when it comes."""
    path, seen, flushed = tmp_path / "a", [], []
    write_bytes(path, b"old")
    replace, fsync = os.replace, os.fsync

    def note_flush(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_size)
        assert path.read_bytes() == (b"new" * 1000 if seen else b"old")
        fsync(descriptor)

    def note(source: str, target: str | Path) -> None:
        seen.append((Path(source).read_bytes(), Path(target).read_bytes(), Path(source).parent, list(flushed)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "replace", note)
    write_bytes(path, b"new" * 1000)
    assert seen == [(b"new" * 1000, b"old", tmp_path, [3000])]
    assert len(flushed) == 2, "the folder is flushed after the rename"
    assert path.read_bytes() == b"new" * 1000


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(122, "Disk quota exceeded"), KvoptError, "the disk quota is used up"),
        (PermissionError(13, "Permission denied"), InputError, "no permission to write"),
        (OSError(30, "Read-only file system"), InputError, "no permission to write"),
        (OSError(27, "File too large"), KvoptError, "the file is larger than this system allows"),
        *(
            (OSError(number, os.strerror(number)), InputError, f"cannot be written: {os.strerror(number)}")
            for number in (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
        ),
        (OSError(5, "Input/output error"), KvoptError, "cannot be written: Input/output error"),
    ],
)
def test_what_stops_a_write_is_one_line(
    error: OSError, kind: type[KvoptError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", failing(error))
    with pytest.raises(KvoptError) as raised:
        write_bytes(tmp_path / "a", b"x")
    assert type(raised.value) is kind
    assert str(tmp_path / "a") in str(raised.value)
    assert message in str(raised.value)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "half.json").write_text('{"a": ')
    for name, message in (("latin", "at byte 3"), (".", "cannot be read"), ("none", "no such file")):
        with pytest.raises(InputError, match=message):
            read_text(tmp_path / name)
    for name, message in (("list.json", "not a JSON object"), ("half.json", "cannot be read as JSON")):
        with pytest.raises(InputError, match=message):
            read_json(tmp_path / name)
    with pytest.raises(InputError, match=rf"none: no such file in {tmp_path}") as raised:
        read_text(Path(os.path.relpath(tmp_path / "none")), "write it")
    assert "write it" in str(raised.value)


def test_a_byte_order_mark_goes_and_line_ends_stay(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_text(tmp_path / "a") == "one\r\ntwo\n"


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert read_record_file(path, 2) is None
    write_json(path, {"format_version": 2, "a": 1})
    assert read_record_file(path, 2) == {"format_version": 2, "a": 1}
    with pytest.raises(InputError, match="format version 2, this kvopt reads 3"):
        read_record_file(path, 3)


def test_a_name_as_a_file_name() -> None:
    assert file_name("kv-8_b.c") == "kv-8_b.c"
    assert file_name("a/b c:ü") == "a_b_c_ü"


def test_an_object_says_whether_its_entries_are_those_that_were_written() -> None:
    whole = with_checksum({"b": [1, 2.5, None], "a": {"text": "雨"}})
    assert list(whole) == ["b", "a", "checksum"]
    assert fits_checksum(json.loads(json.dumps(whole, indent=2)))
    assert with_checksum(whole) == whole
    for changed in (whole | {"b": [1, 2.5]}, whole | {"c": 1}, whole | {"checksum": "x"}, {"checksum": None}):
        assert not fits_checksum(changed)
    assert not fits_checksum(whole | {"a": {"text": "\ud800"}})
    assert fits_checksum({"b": 1}), "of a version without checksums"


# ---- folders


def test_a_folder_takes_the_place_of_the_old_one_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "very" / "deep" / "out"
    for text in ("old", "new"):
        with replacing_directory(path) as place:
            (place / text).write_text(text)
            assert place.parent == path.parent
            assert path.exists() == (text == "new"), "what was there before stays until then"
        assert [child.name for child in path.iterdir()] == [text]
        assert [child.name for child in path.parent.iterdir()] == ["out"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_block_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    with replacing_directory(tmp_path / "out") as place:
        (place / "old").write_text("old")

    def fail(place: Path) -> None:
        (place / "new").write_text("new")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replacing_directory(tmp_path / "out") as place:
        fail(place)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/old"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replacing_directory(tmp_path / "out") as place:
        (place / "old").write_text("old")
    rename = os.rename

    def second_fails(source: Path, target: Path) -> None:
        if target == tmp_path / "out" and (Path(source) / "new").exists():
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(KvoptError, match="Input/output error"), replacing_directory(tmp_path / "out") as place:
        (place / "new").write_text("new")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/old"]


def test_leftovers_go_but_not_what_another_process_writes(tmp_path: Path) -> None:
    dead, living, other = (tmp_path / f".{name}.partial" for name in ("out.x1", "out.x2", "outer.x3"))
    for folder in (dead, living, other):
        folder.mkdir()
        (folder / "half").write_text("half")
    with acquire_lock(living / ".writing"), replacing_directory(tmp_path / "out") as place:
        assert not dead.exists()
        (place / "whole").write_text("whole")
    assert sorted(child.name for child in tmp_path.iterdir()) == sorted(["out", living.name, other.name])
    write_bytes(tmp_path / "out" / ".a.9.partial", b"half")
    remove_partials(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]


# ---- tensors


@pytest.fixture(params=["several", "one of one row", "none of it"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shape = {"several": (40, 7), "one of one row": (1, 1), "none of it": (0, 5)}[request.param]
    tensors = {"hidden": torch.randn(shape).to(torch.bfloat16), "counts": torch.arange(shape[0])}
    write_tensors(tmp_path / "t.safetensors", {k: t for k, t in tensors.items() if shape[0] > 1 or k == "hidden"}, "k")
    return tmp_path / "t.safetensors"


def refusal(path: Path) -> str | None:
    """What reading says of a file; None for a good one."""
    try:
        read_tensors(path)
    except InputError as error:
        return str(error)
    return None


def test_a_flipped_bit_anywhere_in_a_file_of_tensors_is_found(stored: Path) -> None:
    whole = stored.read_bytes()
    check_tensors(stored)
    assert (int.from_bytes(whole[:8], "little") + 8) % 8 == 0, "tensors begin where they can be read in place"
    start, missed = 8 + int.from_bytes(whole[:8], "little"), []
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        stored.write_bytes(changed)
        if (line := refusal(stored)) is None:
            missed.append(place)
        else:
            assert line.startswith(f"{stored}: is damaged")
            assert "\n" not in line
    key = whole[:start].index(b'"key":"k"')
    assert set(missed) < set(range(key, key + 9)), "of another key: who reads compares it"


def test_a_file_of_tensors_without_a_hash_is_read_as_an_older_version_s(tmp_path: Path) -> None:
    path, tensors = tmp_path / "t.safetensors", {"a": torch.arange(6.0)}
    path.write_bytes(save(tensors, metadata={"key": "old"}))
    assert stored_key(path) == "old"
    assert torch.equal(read_tensors(path)["a"], tensors["a"])


def test_a_header_of_any_length_is_damage_and_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}" * 9)
        with pytest.raises(InputError, match="is damaged"):
            read_tensors(path)


def test_tensors_come_back_with_their_key_and_a_damaged_file_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = tmp_path / "t.safetensors", {"a": torch.arange(6).reshape(2, 3).T, "b": torch.ones(2)}
    assert stored_key(path) is None
    write_tensors(path, tensors, "k1")
    assert stored_key(path) == "k1"
    assert all(torch.equal(value, tensors[name]) for name, value in read_tensors(path).items())
    assert read_tensors(path).keys() == tensors.keys()
    whole = path.read_bytes()
    write_tensors(path, tensors, "k1")
    assert path.read_bytes() == whole
    path.write_bytes(save(tensors | {"a": tensors["a"].contiguous()}))
    assert stored_key(path) is None, "of something else"
    with monkeypatch.context() as patched:
        patched.setattr("kvopt.storage.tensors.safe_open", failing(OSError(5, "Input/output error")))
        assert stored_key(path) is None
    for damaged in (whole[:-3], whole[:4], b""):
        path.write_bytes(damaged)
        assert stored_key(path) is None
    shutil.rmtree(tmp_path)
    assert stored_key(path) is None
