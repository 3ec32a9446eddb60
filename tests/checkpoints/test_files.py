"""Safetensors files: what is refused before it is mapped, and that a failed write spares the old file."""

from __future__ import annotations

import errno
import json
import os
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
from sfumato.checkpoints.files import MAX_HEADER, MAX_TENSORS, read_tensors, write_atomically, write_tensors
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


BAD = {
    "empty": b"",
    "no header": b"\x08",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "header longer than the file": (10_000).to_bytes(8, "little") + b"{}",
    "header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": raw(b"{nonsense}"),
    "no text": raw(b"\xff\xfe\xfd"),
    "a list": raw([1, 2]),
    "nested beyond recursion": raw(b"[" * 200_000 + b"]" * 200_000),
    "an entry that is none": raw({"a": 3}),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "offsets of text": raw({"a": entry([1], "0", "4")}, bytes(4)),
    "fractional offsets": raw({"a": entry([1], 0, 4.0)}, bytes(4)),
    "offsets beyond the end": raw({"a": entry([2], 0, 8)}, bytes(4)),
    "bytes after the end": raw({"a": entry([1], 0, 4)}, bytes(5)),
    "a hole": raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "an overlap": raw({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),
    "a shape that lies": raw({"a": entry([1000, 1000], 0, 4)}, bytes(4)),
    "a negative shape": raw({"a": entry([-1], 0, 4)}, bytes(4)),
    "an overflowing shape": raw({"a": entry([2**62, 2**62], 0, 0)}),
    "an unknown type": raw({"a": entry([1], 0, 4, "C1024")}, bytes(4)),
    "metadata that is no text": raw({"__metadata__": {"a": 1}}),
    "too many dimensions": raw({"a": entry([1] * 9, 0, 4)}, bytes(4)),
    "too many tensors": raw({str(i): entry([0], 0, 0) for i in range(MAX_TENSORS + 1)}),
}


@pytest.mark.parametrize("content", BAD.values(), ids=list(BAD))
def test_what_is_no_whole_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        read_tensors(path)


def test_a_header_too_long_to_parse_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
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
