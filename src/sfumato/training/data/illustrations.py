"""A built illustration set (`sfumato data build illustrations`): rows compose RGBA pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageOps

from sfumato.data.pictures import Pictures, Row, Split
from sfumato.errors import DataError, InputError, nearest


class Illustrations:
    """An illustration set as a data set."""

    def __init__(
        self, root: Path, size: tuple[int, int], channels: int, split: Split, repeats: Mapping[str, int]
    ) -> None:
        self.pictures = Pictures(root)
        kinds = {kind for row in self.pictures.rows() for kind in _kinds(row)}
        for kind in repeats.keys() - kinds:
            raise InputError(f"data.repeats names {kind!r}, a kind that {root} lacks", nearest(kind, kinds))
        times = [(row, _times(row, repeats)) for row in self.pictures.rows(split)]
        self.rows = [row for row, shown in times if shown]
        if not self.rows:
            raise DataError(
                f"{root} has no {split} rows with repeats {dict(repeats)}", "Build the set again."
            )
        self.order = [index for index, row in enumerate(self.rows) for _ in range(_times(row, repeats))]
        self.size = size
        self.mode = "L" if channels == 1 else "RGB"
        content = json.dumps([self.rows, sorted(repeats.items())], sort_keys=True).encode()
        self.digest = hashlib.sha256(content).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def picture(self, index: int) -> Image.Image:
        height, width = self.size
        square = self.pictures.image(self.rows[index], max(height, width))
        return ImageOps.fit(square, (width, height)).convert(self.mode)

    def captions(self, index: int) -> list[str]:
        return self.rows[index]["captions"]


def _kinds(row: Row) -> list[str]:
    """What `repeats` may call a row: "drawing/fluent", "drawing"."""
    style = row["attributes"].get("style")
    return [row["kind"]] if style is None else [f"{row['kind']}/{style}", row["kind"]]


def _times(row: Row, repeats: Mapping[str, int]) -> int:
    """How often an epoch shows a row: the most particular of its names counts."""
    return next((repeats[kind] for kind in _kinds(row) if kind in repeats), 1)
