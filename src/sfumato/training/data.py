"""Captioned pictures for training, in an order that is a function of (seed, epoch) alone."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sfumato.data.pictures import Pictures, Row, Split
from sfumato.errors import DataError, InputError, nearest

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
BOMB = Image.DecompressionBombError
DAMAGE = (OSError, SyntaxError, ValueError, LookupError, TypeError, struct.error, BOMB)  # as Pillow raises it


class Dataset(Protocol):
    """Pictures with captions, told apart by index.

    `digest` changes with anything that training on them would notice.
    """

    digest: str

    @property
    def order(self) -> Sequence[int]:
        """The indices that one epoch shows, before they are shuffled, so its length is an epoch's.

        An index that stands in it n times is shown n times, one that is not in it never.
        """
        ...

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Image.Image:
        """RGB or grey picture of the size asked for when the data set was opened."""
        ...

    def captions(self, index: int) -> list[str]:
        """Every caption of the picture, the canonical one first; empty where it has none."""
        ...


@dataclass(frozen=True)
class Position:
    """Where a sample stands in the run: its random numbers depend on (seed, epoch, place) and nothing else.

    `place` is where it stands in the shuffled epoch, `index` which picture of the data set it is.
    """

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


class Share(NamedTuple):
    """The part of every batch that one of several processes computes."""

    rank: int = 0
    world: int = 1


WHOLE = Share()


def groups(
    dataset: Dataset,
    seed: int,
    seen: int,
    size: int,
    share: Share = WHOLE,
    order: Sequence[int] | None = None,
) -> Iterator[list[Position]]:
    """The endless batches from image `seen` of the run on, and of each the places that are this process's.

    size: of a batch of all processes together. order: as `dataset.order`, which it is by default.
    """
    places = positions(dataset.order if order is None else order, seed, seen)
    while True:
        yield list(islice(places, size))[share.rank :: share.world]


def to_tensor(picture: Image.Image) -> Tensor:
    """(c, h, w) float32 in -1..1 of an 8-bit picture."""
    pixels = np.asarray(picture, dtype=np.float32)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def batches(
    dataset: Dataset, order: Iterator[list[Position]], workers: int
) -> Generator[tuple[list[Position], Tensor], None, None]:
    """(positions, pictures (b, c, h, w) in -1..1) of `groups`; `workers` threads decode that many ahead.

    What comes out depends on `order` alone. Close it to stop the threads.
    """

    def load(group: list[Position]) -> Tensor:
        return torch.stack([to_tensor(dataset.picture(position.index)) for position in group])

    if workers == 0:
        for group in order:
            yield group, load(group)
    pool = ThreadPoolExecutor(max(workers, 1))
    waiting: deque[tuple[list[Position], Future[Tensor]]] = deque()
    try:
        while True:
            while len(waiting) <= workers:
                group = next(order)
                waiting.append((group, pool.submit(load, group)))
            group, future = waiting.popleft()
            yield group, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def held_out(name: str, share: float = 0.05) -> bool:
    """Whether a picture belongs to the held-out split: by hash of its name, so it survives additions."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return number < share * 2**32


class Folder:
    """A folder of pictures, searched recursively, each with an optional caption in a `.txt` beside it.

    Transparency becomes white, every picture is cut to the size around its middle. Hidden files are left out.
    """

    def __init__(self, root: Path, size: tuple[int, int], channels: int, split: Split) -> None:
        names = {path: path.relative_to(root) for path in sorted(root.rglob("*"))}
        found = [path for path, name in names.items() if _is_picture(path, name)]
        if not found:
            raise DataError(f"no pictures in {root}", f"Put {', '.join(FORMATS)} files there.")
        chosen = [path for path in found if held_out(names[path].as_posix()) == (split == "test")]
        self.paths = chosen or found  # a handful of pictures may have no held-out one: then all of them serve
        self.size = size
        self.mode = "L" if channels == 1 else "RGB"
        self.texts = {path: _caption(path.with_suffix(".txt")) for path in self.paths}
        content = [[names[path].as_posix(), path.stat().st_size, self.texts[path]] for path in self.paths]
        self.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def order(self) -> Sequence[int]:
        return range(len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, index: int) -> Image.Image:
        path = self.paths[index]
        try:
            with Image.open(path, formats=sorted(set(FORMATS.values()))) as opened:
                upright = _eight_bits(ImageOps.exif_transpose(opened)).convert("RGBA")
        except DAMAGE as error:
            raise DataError(f"cannot read {path}: {error}", "Remove or replace this file.") from error
        white = Image.new("RGBA", upright.size, "white")
        flat = Image.alpha_composite(white, upright).convert(self.mode)
        height, width = self.size
        return ImageOps.fit(flat, (width, height), Image.Resampling.LANCZOS)

    def captions(self, index: int) -> list[str]:
        return self.texts[self.paths[index]]


def _is_picture(path: Path, name: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return path.suffix.lower() in FORMATS and not hidden and path.is_file()


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow itself would clip 16-bit grey to white."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))


def _caption(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        return [path.read_text(encoding="utf-8-sig").strip()]
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read {path}: {error}", "Save it as UTF-8 text.") from error


class Illustrations:
    """A built illustration set (`sfumato data build illustrations`): rows compose RGBA pictures."""

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


def open_dataset(
    root: Path, size: tuple[int, int], channels: int, split: Split, repeats: Mapping[str, int] | None = None
) -> Dataset:
    """The "train" or "test" split of a folder of pictures or of a built illustration set.

    repeats: how often one epoch shows each kind ("drawing"), or kind and style ("drawing/fluent"), of row of
    an illustration set, 1 where it says nothing, 0 for never. Raises `DataError` for pictures that cannot be
    used, `InputError` for repeats of what is not there.
    """
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder", "Set data.path to a folder of pictures; relative paths start here."
        )
    if (root / "metadata.jsonl").exists():
        return Illustrations(root, size, channels, split, repeats or {})
    if repeats:
        raise InputError(
            f"data.repeats is for illustration sets, and {root} is a folder of pictures", "Leave repeats out."
        )
    return Folder(root, size, channels, split)
