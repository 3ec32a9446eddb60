"""The reader: composition with transparency, resizing, and refusal of damaged sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.data import shards
from sfumato.data.pictures import Pictures
from sfumato.errors import DataError

ROW: dict[str, Any] = {
    "id": "one",
    "captions": ["a red square on a blue background"],
    "split": "train",
    "kind": "scene",
    "background": [0, 0, 255],
    "layers": [
        {"picture": "square", "box": [0, 0, 0.5, 0.5]},
        {"picture": "glass", "box": [0.25, 0.25, 0.5, 0.5]},
    ],
    "attributes": {"object": "square"},
}


def make_set(root: Path, *changes: dict[str, Any]) -> Path:
    square = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    glass = Image.new("RGBA", (16, 16), (0, 255, 0, 128))
    encoded = [("square", shards.encode(square)), ("glass", shards.encode(glass))]
    assert shards.write_shards(root, iter(encoded)) == 2
    rows = [json.dumps(ROW | change) for change in changes or ({},)]
    (root / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return root


def test_layers_are_composed_with_alpha_and_resized(tmp_path: Path) -> None:
    pictures = Pictures(make_set(tmp_path))
    (row,) = pictures.rows("train")
    image = pictures.image(row, 16)
    pixels = np.asarray(image)
    assert image.mode == "RGB" and image.size == (16, 16)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[15, 15].tolist() == [0, 0, 255]
    assert np.abs(pixels[6, 6].astype(int) - [127, 128, 0]).max() <= 1
    assert np.abs(pixels[10, 10].astype(int) - [0, 128, 127]).max() <= 1
    assert pictures.image(row, 64).size == (64, 64)


def test_boxes_may_reach_over_the_edge(tmp_path: Path) -> None:
    over = {"layers": [{"picture": "square", "box": [-0.25, 0.75, 0.5, 0.5]}]}
    pictures = Pictures(make_set(tmp_path, over))
    pixels = np.asarray(pictures.image(pictures.rows()[0], 16))
    assert pixels[15, 0].tolist() == [255, 0, 0]
    assert (pixels[:12] == [0, 0, 255]).all()


def test_splits_and_cache(tmp_path: Path) -> None:
    pictures = Pictures(make_set(tmp_path, {}, {"id": "two", "split": "test"}))
    assert [row["id"] for row in pictures.rows("train")] == ["one"]
    assert [row["id"] for row in pictures.rows("test")] == ["two"]
    assert len(pictures.rows()) == 2
    assert pictures.picture("glass") is pictures.picture("glass")


@pytest.mark.parametrize(
    "change",
    [
        {"background": [0, 0]},
        {"background": [0, 0, 256]},
        {"split": "validation"},
        {"captions": []},
        {"captions": [3]},
        {"layers": [{"picture": "absent", "box": [0, 0, 1, 1]}]},
        {"layers": [{"picture": "square", "box": [0, 0, 1]}]},
        {"layers": [{"picture": "square", "box": [0, 0, 1e9, 1]}]},
        {"attributes": None},
    ],
)
def test_damaged_rows_are_refused_with_their_line(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="line 2"):
        Pictures(make_set(tmp_path, {}, change))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures"):
        Pictures(tmp_path)
    make_set(tmp_path)
    shard = tmp_path / "pictures-00000.tar"
    data = bytearray(shard.read_bytes())
    data[512 + 12 : 512 + 30] = bytes(18)
    shard.write_bytes(data)
    pictures = Pictures(tmp_path)
    with pytest.raises(DataError, match="cannot be decoded"):
        pictures.picture("square")
    shard.write_bytes(b"no tar file" * 100)
    with pytest.raises(DataError, match="damaged"):
        Pictures(tmp_path)
    make_set(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{not json}\n")
    with pytest.raises(DataError, match="line 1"):
        Pictures(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match="missing"):
        Pictures(tmp_path)


def test_pictures_of_unlikely_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.data.pictures.MAX_SIDE", 8)
    pictures = Pictures(make_set(tmp_path))
    assert pictures.picture("square").size == (8, 8)
    with pytest.raises(DataError, match="at most 8"):
        pictures.picture("glass")


def test_shards_are_filled_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_PICTURES", 2)
    encoded = shards.encode(Image.new("RGBA", (4, 4), (1, 2, 3, 255)))
    assert shards.write_shards(tmp_path, ((str(number), encoded) for number in range(5))) == 5
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"pictures-0000{n}.tar" for n in range(3)]
    (tmp_path / "metadata.jsonl").write_text("")
    assert sorted(Pictures(tmp_path).members) == list("01234")
