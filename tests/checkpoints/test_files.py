"""Files of weights: formats, what is refused before it is mapped, that a failed write spares the old file."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.checkpoints import files
from sfumato.checkpoints.ckpt.sources import MAX_EMPTY
from sfumato.checkpoints.files import (
    MAX_HEADER,
    MAX_TENSORS,
    open_file,
    read_tensors,
    write_atomically,
    write_tensors,
)
from sfumato.checkpoints.source import TensorInfo
from sfumato.errors import CheckpointError, ResourceError

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.5], dtype=torch.float16)}


def raw(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of this header, which may be bytes or anything that is JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[object], begin: object, end: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "a.safetensors"
    transposed = {"t": torch.arange(6.0).reshape(2, 3).T, **TENSORS}
    write_tensors(path, transposed, {"key": "value"})
    tensors, metadata = read_tensors(path)
    assert metadata == {"key": "value"}
    assert tensors.keys() == transposed.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == transposed[name].dtype and torch.equal(tensor, transposed[name])
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]
    first = path.read_bytes()
    write_tensors(path, transposed, {"key": "value"})
    assert path.read_bytes() == first


class Disk:
    """Counts the calls that a write makes to the disk, and fails the one it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
        self.calls: list[str] = []
        self.fail_at = fail_at
        monkeypatch.setattr(files, "save_file", self.wrapped("write", files.save_file, torn=True))
        monkeypatch.setattr(os, "fsync", self.wrapped("fsync", os.fsync))
        monkeypatch.setattr(Path, "replace", self.wrapped("rename", Path.replace))

    def wrapped(self, name: str, function: Callable[..., Any], torn: bool = False) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 != self.fail_at:
                return function(*arguments)
            if torn:  # half of the file is written when the disk is full
                Path(str(arguments[1])).write_bytes(b"half a fi")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call


@pytest.mark.parametrize("fail_at", range(4))
def test_a_failure_at_any_point_leaves_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"weight": torch.zeros(3)}, {})
    with monkeypatch.context() as patch:
        disk = Disk(patch, fail_at)
        with pytest.raises(ResourceError, match=r"cannot write .*a\.safetensors: No space left") as caught:
            write_tensors(path, {"weight": torch.ones(3)}, {})
    assert disk.calls == ["write", "fsync", "rename", "fsync"][: fail_at + 1]
    assert "Check free space" in caught.value.hint
    renamed = disk.calls.count("fsync") == 2  # only the folder's entry may then be lost, not the file
    assert torch.equal(read_tensors(path)[0]["weight"], torch.full((3,), float(renamed)))
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ResourceError, match="Not a directory"):
        write_tensors(tmp_path / "file" / "a.safetensors", TENSORS, {})


ONE = entry([1], 0, 4)
BAD = {  # name -> (content, what it is refused for)
    "empty": (b"", "it is empty"),
    "no header": (b"\x08", "first bytes"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "it is a picture"),
    "a web page": (b"<!DOCTYPE html><html>", "it is a web page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    "a tar archive": (bytes(257) + b"ustar" + bytes(250), "tar archive"),
    "packed": (b"\x1f\x8b" + bytes(100), "unpack it first"),
    "header longer than the file": ((10_000).to_bytes(8, "little") + b"{}", "10000 bytes long, the file has"),
    "header of 2^63 bytes": ((2**63).to_bytes(8, "little") + b"{}", "at most"),
    "no JSON": (raw(b"{nonsense}"), "Expecting"),
    "no text": (raw(b"{\xff\xfe\xfd"), "decode"),
    "a list": (raw([1, 2]), "first bytes"),
    "nested beyond recursion": (raw(b'{"a":' + b"[" * 99_000 + b"]" * 99_000 + b"}"), "recursion"),
    "lists without end": (raw(b'{"a":[' + b"[]," * 300_000 + b"0]}"), "far more lists"),
    "numbers without end": (raw(b'{"a":[' + b"1," * 900_000 + b"0]}"), "far more lists"),
    "entries without end": (
        raw(b'{"__metadata__":{' + b'"a":"",' * 210_000 + b'"b":""}}'), "far more lists"),
    "an entry that is none": (raw({"a": 3}), "where and what 'a' is"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "where and what"),
    "offsets of text": (raw({"a": entry([1], "0", "4")}, bytes(4)), "where and what"),
    "fractional offsets": (raw({"a": entry([1], 0, 4.0)}, bytes(4)), "where and what"),
    "offsets that are truths": (raw({"a": entry([0], False, False)}), "where and what"),
    "offsets beyond the end": (raw({"a": entry([2], 0, 8)}, bytes(4)), "its header describes"),
    "bytes after the end": (raw({"a": ONE}, bytes(5)), "its header describes"),
    "bytes without tensors": (raw({}, bytes(5)), "its header describes"),
    "a hole": (raw({"a": ONE, "b": entry([1], 8, 12)}, bytes(12)), "'b' begins at 8"),
    "an overlap": (raw({"a": ONE, "b": ONE}, bytes(4)), "'b' begins at 0"),
    "a shape that lies": (raw({"a": entry([1000, 1000], 0, 4)}, bytes(4)), "in 4 bytes"),
    "a negative shape": (raw({"a": entry([-1], 0, 4)}, bytes(4)), "where and what"),
    "an overflowing shape": (raw({"a": entry([2**62, 2**62], 0, 0)}), "in 0 bytes"),
    "nothing times 2^62": (raw({"a": entry([0, 2**62], 0, 0)}), "in 0 bytes"),
    "an unknown type": (raw({"a": entry([1], 0, 4, "C1024")}, bytes(4)), "where and what"),
    "metadata that is no text": (raw({"__metadata__": {"a": 1}}), "metadata are not texts"),
    "metadata that is no table": (raw({"__metadata__": []}), "metadata are not texts"),
    "too many dimensions": (raw({"a": entry([1] * 9, 0, 4)}, bytes(4)), "where and what"),
    "too many tensors": (
        raw({str(i): entry([1], i, i + 1, "U8") for i in range(MAX_TENSORS + 1)}, bytes(MAX_TENSORS + 1)),
        f"at most {MAX_TENSORS} are read"),
    "too many empty tensors": (
        raw({str(i): entry([0], 0, 0) for i in range(MAX_EMPTY + 1)}), "without an element"),
    "a name twice": (raw(b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2), bytes(4)),
                     "one name twice"),
    "a control character": (raw({"a\0": ONE}, bytes(4)), "control characters"),
    "a name written backwards": (raw({"\u202ea": ONE}, bytes(4)), "control characters"),
    "a name too long": (raw({"a" * 2000: ONE}, bytes(4)), "too long"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "cause"), BAD.values(), ids=list(BAD))
def test_what_is_no_whole_file_is_refused(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for mmap in (True, False):
        with pytest.raises(CheckpointError, match=rf"bad\.safetensors.*{cause}"):
            open_file(path, mmap=mmap)
    with pytest.raises(CheckpointError, match=cause):
        read_tensors(path)


def test_a_header_of_rare_letters_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rare.safetensors"
    header = json.dumps({"__metadata__": {"a": "🎨" * 300}, "b": ONE}, ensure_ascii=False).encode()
    path.write_bytes(raw(header, bytes(4)))
    open_file(path)
    monkeypatch.setattr(files, "MAX_WIDE", 1000)
    with pytest.raises(CheckpointError, match="not plain ASCII"):
        open_file(path)


@pytest.mark.parametrize("mmap", [True, False])
def test_the_format_is_told_by_the_first_bytes(tmp_path: Path, mmap: bool) -> None:
    """Every format under every extension, in capitals too."""
    for extension in ("safetensors", "ckpt", "PT", "bin", "txt"):
        path = tmp_path / f"a.{extension}"
        write_tensors(path, TENSORS, {"key": "value"})
        assert open_file(path, mmap=mmap).format == "safetensors"
        torch.save(TENSORS, path)
        assert open_file(path, mmap=mmap).format == "ckpt, zip"
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
        source = open_file(path, mmap=mmap)
        assert source.format == "ckpt, legacy"
        assert all(torch.equal(source.tensor(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("mmap", [True, False])
def test_a_source_of_safetensors(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        **TENSORS,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2),
        "..": torch.ones(1).bfloat16(),
    }
    write_tensors(path, tensors, {"key": "value"})
    source = open_file(path, mmap=mmap)
    assert source.path == path and source.metadata == {"key": "value"} and source.notes == ()
    assert source.infos == {name: TensorInfo(each.dtype, tuple(each.shape)) for name, each in tensors.items()}
    for name, wanted in tensors.items():
        assert torch.equal(source.tensor(name), wanted) and source.tensor(name).dtype == wanted.dtype
    before = path.read_bytes()
    source.tensor("weight").fill_(7)
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        source.tensor("x")


def test_opening_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {})
    handle = files.safe_open(path, framework="pt")

    class Unread:
        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return handle.get_tensor(name)

    read: list[str] = []
    monkeypatch.setattr(files, "safe_open", lambda *_, **__: Unread())
    source = open_file(path)
    assert source.infos.keys() == TENSORS.keys() and read == []
    source.tensor("bias")
    assert read == ["bias"]


def test_numbers_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    for filler in range(4):
        path = tmp_path / f"{filler}.safetensors"
        content = json.dumps({"a": entry([2], 0, 8)}).encode() + b" " * filler
        path.write_bytes(raw(content, torch.tensor([1.0, 2.0]).numpy().tobytes()))
        for mmap in (True, False):
            found = open_file(path, mmap=mmap).tensor("a")
            assert found.tolist() == [1, 2] and found.data_ptr() % 4 == 0


def test_another_file_in_its_place_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_tensors(path, TENSORS, {})
    write_tensors(other, {"weight": torch.ones(3), "bias": torch.ones(1)}, {})
    copied = open_file(path, mmap=False)
    real = files.safe_open
    with monkeypatch.context() as patch:  # between the check of the header and the library's own look
        patch.setattr(files, "safe_open", lambda _, framework: real(other, framework=framework))
        swapped = open_file(path)
    with pytest.raises(CheckpointError, match="changed since it was opened, weight"):
        swapped.tensor("weight")
    os.replace(other, path)
    with pytest.raises(CheckpointError, match="changed since it was opened, weight"):
        copied.tensor("weight")


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot open .*a\.safetensors: Permission denied") as caught:
        open_file(path)
    assert "permissions" in caught.value.hint


def test_metadata_of_null_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw({"__metadata__": None, "a": ONE}, bytes(4)))
    assert open_file(path, mmap=False).metadata == {}


def test_many_tensors_open_soon(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw({f"model.{i}.weight": entry([1], i, i + 1, "U8") for i in range(5000)}, bytes(5000)))
    started = time.process_time()
    open_file(path)
    assert time.process_time() - started < 10


def test_a_header_too_long_to_parse_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little") + b"{")
        file.truncate(2 * MAX_HEADER)  # a hole: nothing on the disk
    monkeypatch.setattr(files.json, "loads", lambda _: pytest.fail("parsed"))
    with pytest.raises(CheckpointError, match="header would be"):
        read_tensors(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {"key": "value"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_tensors(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "device", "fifo"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path(os.devnull)
    elif kind == "fifo":
        os.mkfifo(path)  # opening one would wait forever
    with pytest.raises(CheckpointError, match="No such file" if kind == "missing" else "folder or a device"):
        read_tensors(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
OFFSETS = st.lists(st.integers(-1, 12) | JSON, max_size=3)
SHAPES = st.lists(st.integers(-1, 3) | JSON, max_size=4)
ENTRIES = JSON | st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BOOL", "F8_E4M3", "F4", "U64", "X"]) | JSON, "shape": SHAPES | JSON},
    optional={"data_offsets": OFFSETS | JSON, "more": JSON},
)
NAMES = st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=2)
HEADERS = st.dictionaries(NAMES, ENTRIES, max_size=3)
ANY_EXAMPLES = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def tensors_or_refusal(path: Path) -> dict[str, Tensor]:
    try:
        tensors, metadata = read_tensors(path)
    except CheckpointError:
        return {}
    assert all(isinstance(value, str) for value in metadata.values())
    return {name: tensor.clone() for name, tensor in tensors.items()}  # touches every byte


@ANY_EXAMPLES
@given(header=HEADERS, data=st.binary(max_size=12))
def test_no_header_gives_another_exception(tmp_path: Path, header: dict[str, object], data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw(header, data))
    tensors_or_refusal(path)


@ANY_EXAMPLES
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_flipped_bytes_give_another_exception(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    path = tmp_path / "a.safetensors"
    content = bytearray(safetensors.torch.save(TENSORS, {"key": "value"}))
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    tensors_or_refusal(path)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path, length: int) -> None:
    """Its first two bytes are those that a pickle of protocol 2 to 5 begins with."""
    path = tmp_path / "file.safetensors"
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header += b" " * (length - len(header))
    path.write_bytes(length.to_bytes(8, "little") + header + b"\0\0\x80\x3f")
    assert float(open_file(path).tensor("weight")) == 1
