"""Reads a built picture set: tar shards of transparent pictures, and rows that say how to compose them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from PIL import Image

from sfumato.errors import DataError

CACHED_PICTURES = 8192  # decoded, 16 KiB each at 64 px: 128 MiB
MAX_SIDE = 4096
REBUILD = "Build the set again: sfumato data build illustrations."

Split = Literal["train", "test"]


class Layer(TypedDict):
    """One transparent picture and the box [x, y, width, height] it fills, as fractions of the side."""

    picture: str
    box: Sequence[float]


class Row(TypedDict):
    """One example: a plain background (red, green, blue in 0..255), layers from back to front, and its words.

    `captions` holds the canonical caption first; `attributes` the same facts for programs.
    """

    id: str
    captions: list[str]
    split: Split
    kind: str
    background: Sequence[int]
    layers: list[Layer]
    attributes: dict[str, Any]


class Member(NamedTuple):
    """Where the bytes of a picture lie."""

    shard: Path
    offset: int
    size: int


class Pictures:
    """A picture set in a folder: `pictures-*.tar` and `metadata.jsonl`.

    Decoded pictures are kept (the last 8192), and reading from several threads is safe.
    Raises DataError for a folder, row or picture that cannot be read.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.members = index_shards(self.root)
        self.all_rows = read_rows(self.root / "metadata.jsonl", self.members)
        self._decoded = lru_cache(maxsize=CACHED_PICTURES)(self._decode)

    def rows(self, split: Split | None = None) -> list[Row]:
        """The rows of one split in the order of the file; all of them for None."""
        return [row for row in self.all_rows if split in (None, row["split"])]

    def picture(self, key: str) -> Image.Image:
        """The RGBA picture stored as `key`; shared, so copy it before you draw on it."""
        return self._decoded(key)

    def image(self, row: Row, size: int) -> Image.Image:
        """`row` composed as an RGB picture of (size, size) pixels."""
        canvas = Image.new("RGB", (size, size), tuple(row["background"]))
        for layer in row["layers"]:
            x, y, width, height = (round(value * size) for value in layer["box"])
            picture = self.picture(layer["picture"])
            if picture.size != (width, height):
                picture = picture.resize((max(width, 1), max(height, 1)), Image.Resampling.LANCZOS)
            canvas.paste(picture, (x, y), picture)
        return canvas

    def _decode(self, key: str) -> Image.Image:
        member = self.members[key]
        with member.shard.open("rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
        try:
            with Image.open(io.BytesIO(data), formats=["WEBP", "PNG"]) as opened:
                if max(opened.size) > MAX_SIDE:
                    raise DataError(
                        f"picture {key!r} is {opened.size}, at most {MAX_SIDE} a side are read", REBUILD
                    )
                return opened.convert("RGBA")
        except (OSError, Image.DecompressionBombError) as error:
            raise DataError(
                f"picture {key!r} in {member.shard} cannot be decoded: {error}", REBUILD
            ) from error


def index_shards(root: Path) -> dict[str, Member]:
    """Key (the member's name without its suffix) -> place, of every picture in the shards of `root`."""
    shards = sorted(root.glob("pictures-*.tar"))
    if not shards:
        raise DataError(f"{root} holds no pictures-*.tar", REBUILD)
    members: dict[str, Member] = {}
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as archive:
                for info in archive:
                    if info.isreg():
                        members[info.name.rpartition(".")[0]] = Member(shard, info.offset_data, info.size)
        except tarfile.TarError as error:
            raise DataError(f"{shard} is damaged: {error}", REBUILD) from error
    return members


def read_rows(path: Path, members: dict[str, Member]) -> list[Row]:
    """The rows of a `metadata.jsonl`, each checked for its fields and for pictures that exist."""
    if not path.is_file():
        raise DataError(f"{path} is missing", REBUILD)
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(checked(json.loads(line), members))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path}, line {number}: {error!r}", REBUILD) from error
    return rows


def checked(row: dict[str, Any], members: dict[str, Member]) -> Row:
    """`row` with all fields of Row in range; ValueError, TypeError or KeyError where it is not."""
    background = [int(value) for value in row["background"]]
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise ValueError(f"background {background} is not three values in 0..255")
    if row["split"] not in ("train", "test"):
        raise ValueError(f"split {row['split']!r} is not train or test")
    if not row["captions"] or not all(isinstance(caption, str) for caption in row["captions"]):
        raise ValueError("captions must be a list of at least one string")
    layers: list[Layer] = []
    for layer in row["layers"]:
        box = [float(value) for value in layer["box"]]
        if len(box) != 4 or not all(-1 <= value <= 2 for value in box):
            raise ValueError(f"box {box} is not four values in -1..2")
        if layer["picture"] not in members:
            raise KeyError(f"no picture {layer['picture']!r} in the shards")
        layers.append({"picture": layer["picture"], "box": box})
    return Row(
        id=str(row["id"]),
        captions=list(row["captions"]),
        split=row["split"],
        kind=str(row["kind"]),
        background=background,
        layers=layers,
        attributes=dict(row["attributes"]),
    )
