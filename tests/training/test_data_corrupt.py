"""Files that cannot be used: each is named before a run, and put aside and replaced in one."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import DataError
from sfumato.training.data import PictureSet, Position, batches, groups, held_out, open_data
from sfumato.training.data.report import as_json, as_text
from sfumato.training.data.scan import scan
from sfumato.training.settings_data import DataConfig


def picture(number: int, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    colour = np.random.default_rng(number).integers(0, 255, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(colour).save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def flipped(content: bytes) -> bytes:
    return content[:60] + bytes(40) + content[100:]


ANIMATION = {"save_all": True, "append_images": [Image.new("RGB", (10, 8), "red")], "duration": 50}
CONTENTS = {
    "empty": (b"", "it is empty"),
    "cut short": (picture(0)[:150], "truncated|broken"),
    "flipped bits": (flipped(picture(0)), "broken|decompress|truncated"),
    "no picture": (b"once upon a time", "cannot identify"),
    "web page": (b"<!DOCTYPE html><html>404", "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
    "bomb": (png_that_claims(60_000, 60_000), "decompression bomb"),
    "large": (png_that_claims(9_000, 9_000), "the most is 64 million"),
    "another format": (picture(0, "TIFF"), "cannot identify"),
}


def spoil(folder: Path, kind: str, number: int) -> str:
    """Make one unusable thing; returns its name."""
    name = f"bad-{kind.replace(' ', '-')}-{number}.png"
    path = folder / name
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind][0])
    elif kind == "folder":
        path.mkdir()
    elif kind == "link loop":
        path.symlink_to(path)
    elif kind == "link to nothing":
        path.symlink_to(folder / "nothing")
    elif kind == "caption":
        path.write_bytes(picture(number))
        path.with_suffix(".txt").write_bytes(b"caf\xe9")
    elif kind == "wrong extension":
        path.write_bytes(picture(number, "JPEG"))
    elif kind == "animated":
        path.write_bytes(picture(number, "PNG", **ANIMATION))
    elif kind == "no caption":
        path.write_bytes(picture(number))
    return name


REASONS = {
    **{kind: words for kind, (_, words) in CONTENTS.items()},
    "folder": "it is a folder",
    "link loop": "a loop of links",
    "link to nothing": "a link to nothing",
    "caption": "Save it as UTF-8|can't decode",
    "wrong extension": "it is a JPEG picture, not PNG",
    "animated": "2 frames",
    "no caption": "it has no caption",
}
ODD = {"wrong extension", "animated", "no caption"}


GOOD = [picture(number) for number in range(16)]


def good(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"{number:04d}.png").write_bytes(GOOD[number % 16])
        (folder / f"{number:04d}.txt").write_text(f"picture {number}")


def test_a_hundred_bad_files_of_a_thousand_are_named(tmp_path: Path) -> None:
    good(tmp_path, 900)
    kinds = [list(REASONS)[number % len(REASONS)] for number in range(100)]
    assert len(set(kinds)) == 16
    names = {spoil(tmp_path, kind, number): kind for number, kind in enumerate(kinds)}
    found = scan(tmp_path)
    told = {finding.name: finding for finding in found.findings if not finding.reason.startswith("it has no")}
    told |= {finding.name: finding for finding in found.findings if finding.name not in told}
    assert told.keys() == names.keys()
    for name, kind in names.items():
        assert told[name].used == (kind in ODD)
        assert any(word in told[name].reason for word in REASONS[kind].split("|")), (kind, told[name])
    assert {finding.name for finding in found.unusable} == {n for n, kind in names.items() if kind not in ODD}
    assert f", {len(found.unusable)} unusable, " in as_text(found).splitlines()[-1]
    assert len(json.loads(as_json(found))["unusable"]) == len(found.unusable)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(tmp_path, 3)
    opening = Path.open

    def refusing(self: Path, *arguments: Any, **keywords: Any) -> Any:
        if self.name == "0001.png":
            raise PermissionError(13, "Permission denied", str(self))
        return opening(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refusing)
    (finding,) = scan(tmp_path).findings
    assert finding.name == "0001.png" and "Permission denied" in finding.reason


def test_the_command_tells_and_exits_with_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sfumato.cli.data import check

    good(tmp_path, 30)
    assert check(tmp_path, size=8) == 0
    told = "30 pictures, 30 with captions, 0 classes, 0 unusable, 0 odd\n"
    assert capsys.readouterr().out.startswith(told + "7x9: 30")
    name = spoil(tmp_path, "empty", 0)
    assert check(tmp_path, json=True) == 4
    assert json.loads(capsys.readouterr().out)["unusable"] == {name: "it is empty"}


def opened(root: Path, out: Path | None, **keys: Any) -> PictureSet:
    values = {"path": root, "size": 8, "max_bad": 0.2, **keys}
    data = open_data(DataConfig.model_validate(values), "train", out)
    assert isinstance(data, PictureSet)
    return data


def trained_on(data: PictureSet, count: int, seen: int = 0) -> tuple[list[list[Position]], torch.Tensor]:
    stream = batches(data, groups(data, 7, seen, 5), 2)
    found = list(islice(stream, count))
    stream.close()
    return [group for group, _ in found], torch.cat([pictures.flatten() for _, pictures in found])


@pytest.mark.parametrize("buckets", [False, {"min": 8, "max": 16, "step": 4, "rarest": 1}])
def test_replacements_hang_on_the_files_not_on_when_they_were_found(tmp_path: Path, buckets: Any) -> None:
    """A run that meets bad files, one that knows them, and one resumed in between see the same."""
    root, out = tmp_path / "set", tmp_path / "out"
    root.mkdir()
    good(root, 60)
    bad = [spoil(root, kind, 0) for kind in ("empty", "cut short", "no picture", "caption", "bomb")]
    groups_met, met = trained_on(opened(root, out, buckets=buckets), 30)
    first = opened(root, out, buckets=buckets)
    groups_known, known = trained_on(first, 30)
    assert groups_met == groups_known and torch.equal(met, known)
    groups_late, late = trained_on(opened(root, out, buckets=buckets), 10, seen=100)
    assert groups_late == groups_met[20:] and torch.equal(late, met[len(met) * 2 // 3 :])
    listed = {json.loads(line)["name"] for line in (out / "quarantine.jsonl").read_text().splitlines()}
    assert listed == {name for name in bad if not held_out(name)} and len(listed) >= 4
    names = {first.records[position.index].name for group in groups_met for position in group}
    assert not names & set(bad) and len(names) > 50


def test_a_file_that_goes_while_training_leaves_the_order_as_it_was(tmp_path: Path) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    root.mkdir()
    good(root, 60)
    data = opened(root, out)
    before, _ = trained_on(data, 12)
    gone = next(record.name for record in data.records)
    (root / gone).unlink()
    after, _ = trained_on(data, 12)
    (root / gone).with_suffix(".txt").unlink()
    again = opened(root, out)
    assert again.digest == data.digest and len(again) == len(data)
    resumed, _ = trained_on(again, 12)
    assert resumed == after
    for first, second in zip(chain(*before), chain(*after), strict=True):
        assert (first.epoch, first.place) == (second.epoch, second.place)
        assert first == second or data.records[first.index].name == gone
    assert before != after


def test_too_many_stop_the_run(tmp_path: Path) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    root.mkdir()
    good(root, 50)
    for number in range(3):
        spoil(root, "empty", number)
    data = opened(root, out, max_bad=0.04)
    with pytest.raises(DataError, match=r"(?s)3 of 53 pictures cannot be used.*it is empty.*data.max_bad"):
        trained_on(data, 30)
    assert len(trained_on(opened(root, tmp_path / "other", max_bad=0.06), 30)[0]) == 30
    with pytest.raises(DataError, match=r"cannot read .*it is empty"):
        trained_on(opened(root, None), 30)


def test_the_list_survives_a_kill(tmp_path: Path) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    root.mkdir()
    good(root, 50)
    spoil(root, "empty", 0)
    data = opened(root, out)
    found, _ = trained_on(data, 30)
    path = out / "quarantine.jsonl"
    path.write_text(path.read_text() + '{"name": "x", "rea')
    assert trained_on(opened(root, out), 30)[0] == found
    path.write_text('{"name": 5}\n')
    with pytest.raises(DataError, match="a line that is no entry"):
        opened(root, out)


def test_every_warning_is_told_once(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    good(root, 40)
    name = spoil(root, "empty", 0)
    told: list[str] = []
    config = DataConfig(path=root, size=8, max_bad=0.1)
    data = open_data(config, "train", tmp_path / "out", told.append)
    assert isinstance(data, PictureSet)
    trained_on(data, 40)
    assert told == [f"not used: {name}: it is empty"]
    held = open_data(config, "test", tmp_path / "out")
    assert all(held.picture(index).size == (8, 8) for index in range(len(held)))
    shown = Counter(os.fspath(path.name) for path in data.paths)
    assert shown[name] == 1, "it keeps its place in the order"
