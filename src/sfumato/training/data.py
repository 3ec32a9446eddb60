"""Captioned pictures for training, in an order that is a function of (seed, epoch) alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sfumato.data.pictures import Pictures, Split
from sfumato.errors import DataError

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Dataset(Protocol):
    """Pictures with captions, told apart by index."""

    digest: str
    order: Sequence[
        int
    ]  # the indices of one epoch; what is to be seen more often stands in it more than once

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Image.Image:
        """RGB or grey picture of the size asked for when the data set was opened."""
        ...

    def captions(self, index: int) -> list[str]:
        """Every caption of the picture, the canonical one first; empty where it has none."""
        ...


@dataclass(frozen=True)
class Position:
    """Where a sample stands in the run: its random numbers depend on (seed, epoch, place) and nothing else."""

    seed: int
    epoch: int
    place: int
    index: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for one purpose ("noise", "caption", ...) of this sample."""
        text = f"{self.seed}/{self.epoch}/{self.place}/{purpose}"
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        return torch.Generator().manual_seed(number >> 1)


def positions(order: Sequence[int], seed: int, start: int) -> Iterator[Position]:
    """The endless samples from image `start` of the run on; each epoch is another permutation of `order`."""
    epoch, offset = divmod(start, len(order))
    while True:
        shuffle = Position(seed, epoch, -1).generator("order")
        for place in torch.randperm(len(order), generator=shuffle)[offset:].tolist():
            yield Position(seed, epoch, place, order[place])
        epoch, offset = epoch + 1, 0


def to_tensor(picture: Image.Image) -> Tensor:
    """(c, h, w) float32 in -1..1 of an 8-bit picture."""
    pixels = np.asarray(picture, dtype=np.float32)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def batches(
    dataset: Dataset, order: Iterator[Position], size: int, workers: int
) -> Iterator[tuple[list[Position], Tensor]]:
    """(positions, pictures (b, c, h, w) in -1..1), decoded `workers` threads and two batches ahead."""

    def load(group: list[Position]) -> Tensor:
        return torch.stack([to_tensor(dataset.picture(position.index)) for position in group])

    def groups() -> Iterator[list[Position]]:
        while True:
            yield [next(order) for _ in range(size)]

    if workers == 0:
        for group in groups():
            yield group, load(group)
    with ThreadPoolExecutor(workers) as pool:
        waiting = [
            (group, pool.submit(load, group)) for group, _ in zip(groups(), range(workers + 1), strict=False)
        ]
        for group in groups():
            first, future = waiting.pop(0)
            waiting.append((group, pool.submit(load, group)))
            yield first, future.result()


def held_out(name: str, share: float = 0.05) -> bool:
    """Whether a picture belongs to the held-out split: by hash of its name, so it survives additions."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return number < share * 2**32


class Folder:
    """A folder of pictures, searched recursively, each with an optional caption in a `.txt` beside it."""

    def __init__(self, root: Path, size: tuple[int, int], channels: int, split: Split) -> None:
        found = sorted(path for path in root.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        if not found:
            raise DataError(
                f"no pictures in {root}", f"Put {', '.join(sorted(PICTURE_SUFFIXES))} files there."
            )
        names = [path.relative_to(root).as_posix() for path in found]
        chosen = [
            path for path, name in zip(found, names, strict=True) if held_out(name) == (split == "test")
        ]
        self.paths = chosen or found  # a handful of pictures may have no held-out one: then all of them serve
        self.size = size
        self.mode = "L" if channels == 1 else "RGB"
        self.order = range(len(self.paths))
        listing = "\n".join(
            f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in self.paths
        )
        self.digest = hashlib.sha256(listing.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, index: int) -> Image.Image:
        path = self.paths[index]
        try:
            with Image.open(path) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGBA")
        except (OSError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read {path}: {error}", "Remove or replace this file.") from error
        white = Image.new("RGBA", upright.size, "white")
        flat = Image.alpha_composite(white, upright).convert(self.mode)
        height, width = self.size
        return ImageOps.fit(flat, (width, height), Image.Resampling.LANCZOS)

    def captions(self, index: int) -> list[str]:
        text = self.paths[index].with_suffix(".txt")
        return [text.read_text(encoding="utf-8").strip()] if text.exists() else []


class Illustrations:
    """A built illustration set (`sfumato data build illustrations`): rows are compositions of RGBA pictures."""

    def __init__(
        self, root: Path, size: tuple[int, int], channels: int, split: Split, repeats: Mapping[str, int]
    ) -> None:
        self.pictures = Pictures(root)
        self.rows = [row for row in self.pictures.rows(split) if repeats.get(row["kind"], 1)]
        if not self.rows:
            raise DataError(
                f"{root} has no rows for {split}ing with repeats {dict(repeats)}", "Build the set again."
            )
        self.order = [
            index for index, row in enumerate(self.rows) for _ in range(repeats.get(row["kind"], 1))
        ]
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


def open_dataset(
    root: Path, size: tuple[int, int], channels: int, split: Split, repeats: Mapping[str, int] | None = None
) -> Dataset:
    """The "train" or "test" split of a folder of pictures or of a built illustration set.

    repeats: how often one epoch shows each kind of row of an illustration set, 1 where it says nothing, 0 for never.
    """
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder", "Set data.path to a folder of pictures; relative paths start here."
        )
    if (root / "metadata.jsonl").exists():
        return Illustrations(root, size, channels, split, repeats or {})
    return Folder(root, size, channels, split)
