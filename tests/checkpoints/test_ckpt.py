"""Checkpoints of torch.save: harmless ones give their tensors, hostile ones are refused with the cause."""

from __future__ import annotations

import os
import re
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from benign import Benign, benign
from hostile import FLOATS, Member, Zip, archive, hostile, item, legacy, program, storage, tensor

from sfumato.checkpoints.ckpt import archive as ckpt_zip
from sfumato.checkpoints.ckpt import legacy as ckpt_legacy
from sfumato.checkpoints.ckpt import sources as ckpt
from sfumato.checkpoints.ckpt import tensors as ckpt_tensors
from sfumato.checkpoints.files import open_file
from sfumato.checkpoints.load import is_finite
from sfumato.checkpoints.source import TensorInfo
from sfumato.errors import CheckpointError, UnsafeCheckpointError

SMALL = 200_000  # bytes


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> list[Benign]:
    return list(benign(tmp_path_factory.mktemp("benign")))


@pytest.fixture(scope="module")
def bad() -> Mapping[str, bytes]:
    return {name: content for name, content in hostile("/nowhere", floods=False) if len(content) < SMALL}


def bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def test_harmless_files_give_every_tensor(harmless: list[Benign]) -> None:
    assert len(harmless) >= 30
    for each in harmless:
        for mmap in (True, False):
            source = open_file(each.path, mmap=mmap)
            assert source.infos.keys() == each.tensors.keys(), each.name
            for name, wanted in each.tensors.items():
                found = source.tensor(name)
                assert source.infos[name] == TensorInfo(wanted.dtype, tuple(wanted.shape)), (each.name, name)
                assert found.dtype == wanted.dtype and found.shape == wanted.shape, (each.name, name)
                assert torch.equal(bits(found), bits(wanted)), (each.name, name)
                assert not found.numel() or found.data_ptr() % found.dtype.itemsize == 0, (each.name, name)
        assert all(any(cls in note for note in source.notes) for cls in each.classes), each.name


def test_hostile_files_are_refused_and_touch_nothing(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "file.ckpt"
    names: set[str] = set()
    for number, (name, content) in enumerate(hostile(str(canary), floods=False)):
        if len(content) < SMALL and number % 3 == 0:  # benchmarks/soak/hostile.py takes them all
            path.write_bytes(content)
            with pytest.raises(CheckpointError) as caught:
                open_file(path)
            assert str(path) in str(caught.value) and caught.value.hint, name
            assert len(caught.value.message) < 1000 and caught.value.message.isprintable(), name
            names.add(name)
    assert len(names) > 500 and not canary.exists()


CAUSES = {  # hostile file -> what it must be refused for
    "zip, GLOBAL os:system": "asks for os.system",
    "legacy, STACK_GLOBAL builtins:eval": "asks for builtins.eval",
    "zip, GLOBAL evil:Evil": "calls evil.Evil",
    "zip, os:system as the persistent id": "asks for os.system",
    "legacy, os:system in its system": "asks for os.system",
    "zip, Payload of protocol 4": "system",
    "zip, os:system INST": "asks for|opcode INST",
    "zip, a table nested 100 deep": "nest deeper",
    "zip, a table doubled 30 times": "more than 60000 entries",
    "zip, a table containing itself": "nest deeper",
    "zip, a table with one dotted name twice": "two tensors of the name 'a.b'",
    "zip, a table with two tensors of one name": "two entries of the name 'a'",
    "zip, a table with a NUL in a name": "control characters",
    "zip, a table with a name written backwards": "control characters",
    "zip, a table with a name of 2,000 letters": "too long",
    "zip, a table with an empty name": "''",
    "zip, a table of nothing": "no tensors",
    "zip, a table of a tensor alone": "no table of tensors",
    "zip, a table of a model": "an object of torch.nn.Module, not a state dict",
    "zip, tensor beyond its storage": "tensor t reaches to element 4 of a storage of 4",
    "zip, tensor stride beyond its storage": "reaches to element 4",
    "zip, tensor negative offset": "from 0 up",
    "zip, tensor negative stride": "from 0 up",
    "zip, tensor expanded to a terabyte": "would have 1099511627776 elements out of a storage of 4",
    "zip, tensor expanded a little": "would have 5 elements",
    "zip, tensor empty and huge": "no file could hold",
    "zip, tensor rank 9": "at most 8 numbers",
    "zip, tensor shape longer than stride": "2 sides and 1 strides",
    "zip, tensor shape of booleans": "from 0 up",
    "zip, storage that says more than it has": "should have 1000 torch.float32 and has 16 bytes",
    "zip, storage that says less than it has": "and has 16 bytes",
    "zip, storage of a missing key": "has none",
    "zip, storage of an unknown class": "asks for torch.CudaStorage",
    "zip, storage of a dtype for a class": "no kind or size that exists",
    "zip, storage of -1 elements": "no kind or size that exists",
    "zip, storage that is no storage": "has no storage",
    "zip, storage in two sizes": "described in two ways",
    "zip, storage in two types": "described in two ways",
    "zip, storage with eight parts": "refers to something outside",
    "legacy, storage view beyond the end": "no kind or size that exists",
    "legacy, storage view too short for its tensor": "reaches to element 3 of a storage of 2",
    "zip, v3 of an unknown dtype": "number format that is not known",
    "zip, v3 beyond its bytes": "reaches to element 4 of a storage of 4",
    "zip, deflated storage": "compressed or encrypted",
    "zip, method 12": "compressed or encrypted",
    "zip, encrypted 1": "compressed or encrypted",
    "zip, two data.pkl of one name": "two members of the name",
    "zip, two data.pkl in two folders": "2 members data.pkl",
    "zip, no data.pkl": "0 members data.pkl",
    "zip, data.pkl without a folder": "in one folder",
    "zip, data.pkl in two levels": "in one folder",
    "zip, member '../escape'": "a member of the name '../escape'",
    "zip, member '/absolute'": "a member of the name",
    "zip, member 'a\\\\b'": "a member of the name",
    "zip, member 'a\\x00b'": "a member of the name",
    "zip, size 17 in the directory": "compressed or encrypted|differ|overlaps|lies|has not",
    "zip, size 1000 in the header": "header and directory differ",
    "zip, a terabyte in zip64 fields": "1099511627776 bytes, which the file has not",
    "zip, another name in the header": "header and directory differ",
    "zip, storage inside the pickle": "header and directory differ|overlaps",
    "zip, storage beyond the file": "lies outside",
    "zip, wrong checksum of the pickle": "checksum",
    "zip, a comment": "does not lie before its end",
    "zip, bytes after the end": "does not end like a zip",
    "zip, a second archive after the end": "directory does not lie before its end",
    "zip, more members than there are": "directory ends too early|directory is damaged",
    "zip, fewer members than there are": "longer than its members",
    "zip, directory at 1": "does not lie before its end",
    "zip, the numbers big-endian": "little-endian",
    "zip, TorchScript's constants": "TorchScript",
    "zip, TorchScript's code": "TorchScript",
    "zip, a zip64 end that differs": "two ends",
    "zip, a zip64 end elsewhere": "lies somewhere else",
    "tar, torch 0.1.10": "tar archive",
    "stranger, a web page": "web page",
    "stranger, a git-lfs pointer": "git-lfs",
    "stranger, a bare pickle": "asks|refers|torch.save did not write",
    "stranger, a pickle of a number": "torch.save did not write",
    "legacy, big-endian": "little-endian",
    "legacy, another version": "than 1001",
    "legacy, keys that are numbers": "list its storages",
    "legacy, a missing key": "not that of its tensors",
    "legacy, one key too many": "not that of its tensors",
    "legacy, a key twice": "not that of its tensors",
    "legacy, a storage among the keys": "outside of its data",
    "legacy, count 5": "5 elements, its tensors say 4",
    "legacy, count 5 said twice": "5 elements, which the file has not",
    "legacy, bytes after the end": "4 bytes after its last storage",
    "legacy, no numbers": "ends before storage",
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_named(name: str, bad: Mapping[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    path.write_bytes(bad[name])
    with pytest.raises(CheckpointError, match=CAUSES[name]) as caught:
        open_file(path)
    assert isinstance(caught.value, UnsafeCheckpointError) == bool(
        re.search("asks for|calls|refers to something|system", CAUSES[name])
    )


LIMITS = {
    "MAX_TENSORS": (ckpt, 3, "more than 3 tensors"),
    "MAX_ENTRIES": (ckpt, 3, "at most 3 are read|more than 3 entries"),
    "MAX_NAMES": (ckpt, 7, "more than 7 letters"),
    "MAX_EMPTY": (ckpt, 3, "4 tensors without an element"),
}  # fmt: skip


@pytest.mark.parametrize("limit", LIMITS)
def test_what_is_counted(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, value, cause = LIMITS[limit]
    path = tmp_path / "file.ckpt"
    torch.save({f"t{index}": torch.empty(0) for index in range(4)}, path)
    open_file(path)
    monkeypatch.setattr(module, limit, value)
    with pytest.raises(CheckpointError, match=cause):
        open_file(path)


def test_entries_around_the_state_dict_are_counted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1)}, **{f"n{index}": index for index in range(4)}}, path)
    open_file(path)
    monkeypatch.setattr(ckpt, "MAX_ENTRIES", 3)
    with pytest.raises(CheckpointError, match="a table of 5 entries, at most 3 are read"):
        open_file(path)


def test_containers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.ckpt"
    limits = (
        (ckpt_zip, "MAX_ENTRIES"), (ckpt_zip, "MAX_DIRECTORY"), (ckpt_zip, "MAX_PICKLE"),
        (ckpt_legacy, "MAX_STORAGES"),
    )  # fmt: skip
    for module, limit in limits:
        saved = {"a": torch.ones(1), "b": torch.ones(1)}
        torch.save(saved, path, _use_new_zipfile_serialization=module is ckpt_zip)
        open_file(path)
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, 1)
            with pytest.raises(CheckpointError, match="at most 1"):
                open_file(path)


def test_views_of_one_storage_may_not_stand_for_far_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    where = storage(count=250_000)
    body = {f"t{index}": tensor((250_000,), (1,), where=where) for index in range(4)}
    path.write_bytes(archive(program(body), storages={"0": bytes(1_000_000)}).build())
    with pytest.raises(CheckpointError, match="would have 4000000 bytes"):
        open_file(path)
    path.write_bytes(archive(program(dict(list(body.items())[:3])), storages={"0": bytes(1_000_000)}).build())
    assert len(open_file(path).infos) == 3


def test_opening_reads_no_tensor_and_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    torch.save({"state_dict": {f"t{index}": torch.zeros(2_000_000) for index in range(4)}}, path)
    for mmap in (True, False):
        tracemalloc.start()
        source = open_file(path, mmap=mmap)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        assert source.infos["t3"] == TensorInfo(torch.float32, (2_000_000,))
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        source.tensor("x")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_file_that_changes_under_us_is_noticed(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "file.ckpt"
    torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=new)
    content, source = path.read_bytes(), open_file(path, mmap=False)
    os.truncate(path, len(content) // 2)
    with pytest.raises(CheckpointError, match=r"file\.ckpt changed since it was opened, a cannot be read"):
        source.tensor("a")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read a in .*file\.ckpt: No such file"):
        source.tensor("a")


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.ckpt"
    torch.save({"a": torch.ones(1000)}, path)
    monkeypatch.setattr(ckpt_tensors, "_identity", lambda _: (0,))  # as if it were cut after it was looked at
    source = open_file(path, mmap=False)
    os.truncate(path, 2000)
    with pytest.raises(CheckpointError, match="ends inside a"):
        source.tensor("a")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "file.ckpt"
    torch.save({"a": torch.ones(10)}, path, _use_new_zipfile_serialization=new)
    before = path.read_bytes()
    open_file(path).tensor("a").fill_(7)
    assert path.read_bytes() == before
    assert torch.equal(open_file(path).tensor("a"), torch.ones(10))


def test_mapped_tensors_share_their_storage_as_they_were_saved(tmp_path: Path) -> None:
    path, base = tmp_path / "file.ckpt", torch.arange(12.0).reshape(3, 4)
    torch.save({"base": base, "turned": base.T}, path)
    source = open_file(path)
    turned = source.tensor("turned")
    assert turned.stride() == (1, 4) and torch.equal(turned, base.T)
    turned[0, 0] = 9
    assert source.tensor("base")[0, 0] == 9


def test_scalars_are_metadata_and_the_rest_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    saved = {
        "state_dict": {"a": torch.ones(1), "kind": "inner"}, "epoch": 3, "name": "style",
        "optimizer": {"lr": 1}, "hyper_parameters": {"parameterization": "v", "sizes": [1]}, "bad\nname": 1,
    }  # fmt: skip
    torch.save(saved, path)
    source = open_file(path)
    assert source.format == "ckpt, zip" and source.path == path
    assert source.metadata == {
        "epoch": "3",
        "name": "style",
        "kind": "inner",
        "hyper_parameters.parameterization": "v",
    }
    assert source.notes == ("left out, no tensors: optimizer, hyper_parameters",)


def test_zip64(tmp_path: Path) -> None:
    """A storage of 4 GiB and one behind it, in a file that is nearly all hole."""
    path = tmp_path / "file.ckpt"
    large, wide, checksum = 2**32 + 64, 0xFFFFFFFF, zlib.crc32(FLOATS)
    body = {
        "zeros": tensor((large // 4,), (1,), where=storage("0", large // 4)),
        "t": tensor(where=storage("1")),
    }
    first = archive(program(body), storages={}).build()
    start = first.index(b"PK\1\2")
    directory, count = first[start : first.index(b"PK\5\6")], 2
    with path.open("wb") as file:
        file.write(first[:start])
        for key, size, content in (("0", large, b""), ("1", 16, FLOATS)):
            name, at = f"archive/data/{key}".encode(), file.tell()
            sizes = struct.pack("<2H2Q", 1, 16, size, size)
            both = (wide, wide) if size == large else (size, size)
            file.write(
                struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, *both, len(name), 20) + name + sizes
            )
            file.seek(size - len(content), os.SEEK_CUR)
            file.write(content)
            extra = sizes if size == large else struct.pack("<2HQ", 1, 8, at)
            place = at if size == large else wide
            fields = (45, 45, 0, 0, 0, 0, checksum, *both, len(name), len(extra), 0, 0, 0, 0, place)
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + name + extra
            count += 1
        offset = file.tell()
        end = (44, 45, 45, 0, 0, count, count, len(directory), offset)
        file.write(directory + struct.pack("<4sQ2H2L4Q", b"PK\6\6", *end))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, offset + len(directory), 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), wide, 0))
    with zipfile.ZipFile(path) as other:  # another reader sees the same
        assert other.getinfo("archive/data/0").file_size == large and other.read("archive/data/1") == FLOATS
    for mmap in (True, False):
        source = open_file(path, mmap=mmap)
        assert source.infos["zeros"].shape == (large // 4,)
        assert source.tensor("t").tolist() == [[1, 2], [3, 4]]


def test_many_tensors_open_soon(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    torch.save({f"model.block.{index}.weight": torch.zeros(1) for index in range(2500)}, path)
    started = time.process_time()
    open_file(path)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        (-2, "does not end like a zip"),
        (-14, "several archives"),
        (-16, "several archives"),
        (-18, "several archives"),
    ],
    ids=["a comment that is not there", "members here", "disk of the directory", "disk"],
)
def test_ends_that_say_more_than_there_is(tmp_path: Path, place: int, cause: str) -> None:
    path = tmp_path / "file.ckpt"
    content = bytearray(archive(program({"t": tensor()})).build())
    content[place] += 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=cause):
        open_file(path)


def test_a_member_that_overlaps_another_is_refused(tmp_path: Path) -> None:
    """A header that lies inside another member's bytes would be right for both."""
    inner = Zip([Member("archive/data/1", FLOATS)]).build()
    inner = inner[: inner.index(b"PK\1\2")]
    members = [Member("archive/data.pkl", program({"t": tensor()})), Member("archive/data/0", inner)]
    at = len(Zip(members).build()[: Zip(members).build().index(b"PK\1\2")]) - len(inner)
    path = tmp_path / "file.ckpt"
    whole = Zip([*members, Member("archive/data/1", FLOATS, offset=at)])
    path.write_bytes(whole.build())
    with pytest.raises(CheckpointError, match="overlaps another"):
        open_file(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2]
)
def test_values_that_are_not_finite_are_seen(value: float, dtype: torch.dtype) -> None:
    weight = torch.full((1000,), 60_000.0).to(dtype)  # in half precision their sum would be infinite
    assert is_finite(weight)
    weight[777] = torch.tensor(value).to(dtype)
    assert not is_finite(weight)
    assert is_finite(torch.arange(3)) and is_finite(torch.empty(0))


def test_a_legacy_file_needs_its_numbers_aligned(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    for filler in range(4):  # the pickles' length decides where the numbers lie
        path.write_bytes(legacy({"t": tensor(where=storage(legacy=True)), "x" * filler: 1}))
        for mmap in (True, False):
            found = open_file(path, mmap=mmap).tensor("t")
            assert found.tolist() == [[1, 2], [3, 4]] and found.data_ptr() % 4 == 0


def test_an_unlikely_pickle_costs_no_more_than_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(archive(program(item([tensor()] * 3))).build())
    with pytest.raises(CheckpointError, match="no table of tensors"):
        open_file(path)
