"""What the notes' network learns from: rows, pictures or volumes in a folder, all brought to one size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import DataError, InputError
from sfumato.images import preview, to_tensor
from sfumato.intake import DAMAGED, is_picture, open_picture
from sfumato.training.data import Position

KEPT = 1 << 30  # bytes of decoded samples that stay in memory
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ARRAY = ".npy"
METRICS = "metrics.jsonl"  # lies in the folder of every run
Batch = tuple[list[Position], Tensor]
ANIMATED = (".gif", ".webp", ".png")
LOUD = 2.0  # beyond which an array's numbers are not what training works on
NAMED = 5  # files in a warning


@dataclass(frozen=True)
class Layout:
    """What every sample is made into: channels, dims 1 to 3, sides (length,) or (height, width), depth."""

    channels: int
    dims: int
    sides: tuple[int, ...]
    depth: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, length), (channels, height, width) or (channels, depth, height, width)."""
        return (self.channels, *((self.depth or 1,) if self.dims == 3 else ()), *self.sides)


@dataclass(frozen=True)
class Entry:
    """One sample: a file, the row of a stack of arrays in it, and its class."""

    path: Path
    row: int
    label: int


class Samples:
    """A `Dataset` whose samples are tensors; those that fit into 1 GiB are decoded once.

    warnings: what was left out. classes: the sub-folders' names, by number; empty without classes.
    """

    def __init__(
        self,
        root: Path,
        entries: Sequence[Entry],
        layout: Layout,
        classes: tuple[str, ...],
        warnings: list[str],
    ) -> None:
        self.entries, self.layout, self.classes, self.warnings = list(entries), layout, classes, warnings
        self.kept: dict[int, Tensor] = {}
        self.room = KEPT
        content = [
            [each.path.relative_to(root).as_posix(), each.path.stat().st_size, each.row, each.label]
            for each in self.entries
        ]
        text = json.dumps([content, layout.shape, classes])
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    @property
    def order(self) -> Sequence[int]:
        return range(len(self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    def picture(self, index: int) -> Image.Image:
        """Something to look at: curves of a row, all slices of a volume."""
        return preview(self.sample(index))

    def captions(self, index: int) -> list[str]:
        """The name of its class."""
        return [self.classes[self.entries[index].label]] if self.classes else []

    def sample(self, index: int) -> Tensor:
        """One sample, float32 of the layout's shape, pictures in -1..1."""
        if index in self.kept:
            return _wide(self.kept[index])
        entry = self.entries[index]
        return _wide(self.keep(index, read(entry.path, self.layout)[entry.row]))

    def keep(self, index: int, stored: Tensor) -> Tensor:
        """The sample as it is stored, uint8 or float32; remembers it while there is room."""
        size = stored.numel() * stored.itemsize
        if size <= self.room:
            self.kept[index] = stored
            self.room -= size
        return stored

    def batches(self, order: Iterator[list[Position]]) -> Generator[Batch, None, None]:
        """The samples of `groups`, (b, *shape)."""
        for group in order:
            yield group, torch.stack([self.sample(position.index) for position in group])

    def labels(self, indices: Sequence[int]) -> Tensor:
        """(b,) long."""
        return torch.tensor([self.entries[index].label for index in indices])


def open_samples(
    root: Path,
    channels: int,
    dims: int,
    sides: tuple[int, ...],
    *,
    depth: int | None = None,
    classes: int | None = None,
    left_out: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Samples:
    """The samples of a folder, searched recursively, but not hidden files, `left_out`, and folders of runs.

    dims 1 takes arrays, (channels, length) in .npy files; 2 takes pictures, or arrays; 3 takes arrays
    (channels, depth, height, width), or animations, whose frames are the slices. An array may be a stack of
    samples, and of one channel may lack that axis. Files that cannot be read are left out with a warning.
    classes: how many sub-folders there have to be, whose names in order are the classes. progress: is told
    (read, of). Raises `DataError` without a sample, or where sub-folders and classes differ.
    """
    if not root.is_dir():
        raise DataError(f"dataset_path {root} is not a folder", "Give a folder; relative paths start here.")
    if dims != 1 and channels not in MODES and not any(root.rglob(f"*{ARRAY}")):
        raise InputError(
            f"{channels} channels are no picture", "Pictures have 1, 3 or 4; else use .npy files."
        )
    own = [] if left_out is None else [left_out.resolve()]
    earlier = sorted({path.parent.resolve() for path in root.rglob(METRICS)} - {root.resolve(), *own})
    found = [path for path in sorted(root.rglob("*")) if _taken(path, root, dims, [*own, *earlier])]
    names = _classes(root, found, classes)
    layout = Layout(channels, dims, sides, depth)
    entries: list[Entry] = []
    stored: list[Tensor] = []
    broken: list[str] = []
    room = KEPT
    for number, path in enumerate(found):
        try:
            rows = read(path, layout)
        except (InputError, *DAMAGED) as error:
            broken.append(f"{path.relative_to(root)} ({str(error).splitlines()[0]})")
            continue
        if layout.dims == 3 and layout.depth is None:
            layout = Layout(channels, dims, sides, rows[0].shape[1])
        label = names.index(path.relative_to(root).parts[0]) if names else 0
        for row, tensor in enumerate(rows):
            entries.append(Entry(path, row, label))
            room -= tensor.numel() * tensor.itemsize
            stored += [tensor] * (room >= 0)
        progress(number + 1, len(found))
    warnings = [f"{folder} holds an earlier run's pictures: it is left out" for folder in earlier]
    warnings += [_left_out(broken)] if broken else []
    if not entries:
        kinds = f"{ARRAY} files" if dims == 1 else "pictures"
        raise DataError("; ".join([f"no {kinds} in {root} that can be read", *warnings]), "Put some there.")
    samples = Samples(root, entries, layout, names, warnings)
    for index, tensor in enumerate(stored):
        samples.keep(index, tensor)
        if tensor.is_floating_point() and float(tensor.abs().max()) > LOUD:
            warnings.append(
                f"{entries[index].path} holds numbers up to {float(tensor.abs().max()):.3g}; training works "
                "on about -1..1: scale your arrays"
            )
            break
    return samples


def read(path: Path, layout: Layout) -> list[Tensor]:
    """The samples in a file, of the layout's shape (of any depth where it has none), uint8 or float32."""
    if path.suffix.lower() == ARRAY:
        return [_resized(torch.from_numpy(array), layout) for array in _arrays(path, layout)]
    frames = _frames(path, layout.depth) if layout.dims == 3 else [open_picture(path)]
    slices = [_pixels(frame, layout) for frame in frames]
    return [torch.stack(slices, dim=1) if layout.dims == 3 else slices[0]]


def _taken(path: Path, root: Path, dims: int, left_out: Sequence[Path]) -> bool:
    name = path.relative_to(root)
    if any(part.startswith(".") for part in name.parts) or not path.is_file():
        return False
    if any(path.resolve().is_relative_to(folder) for folder in left_out):
        return False
    suffix = path.suffix.lower()
    return suffix == ARRAY or (dims == 2 and is_picture(path)) or (dims == 3 and suffix in ANIMATED)


def _classes(root: Path, found: Sequence[Path], count: int | None) -> tuple[str, ...]:
    """The sub-folders' names, where there are to be classes."""
    if count is None:
        return ()
    names = [path.relative_to(root).parts for path in found]
    outside = [parts[0] for parts in names if len(parts) == 1]
    folders = sorted({parts[0] for parts in names if len(parts) > 1})
    if outside:
        raise DataError(
            f"num_classes is {count}, and {len(outside)} files lie in no class's folder: {outside[0]}",
            f"Put them into a folder in {root}, or set num_classes = 0.",
        )
    if len(folders) != count:
        raise DataError(
            f"num_classes is {count}, and {root} has {len(folders)} folders: {', '.join(folders[:20])}",
            f"Set num_classes = {len(folders)}.",
        )
    return tuple(folders)


def _arrays(path: Path, layout: Layout) -> list[np.ndarray]:
    """The samples (channels, ...) of an array file, float32, where they are no bytes."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise InputError("it holds no array")
    kind = array.dtype
    if kind == np.uint8 or kind == np.uint16:
        values = array.astype(np.float32) / np.float32(np.iinfo(kind).max) * 2 - 1
    elif kind.kind == "f":
        values = array.astype(np.float32)
    else:
        raise InputError(f"it holds {kind}; numbers are floats in about -1..1, uint8 or uint16")
    if not np.isfinite(values).all() or not values.size:
        raise InputError("it holds numbers that are not finite, or none")
    channels, rank = layout.channels, layout.dims
    if values.ndim == rank and channels == 1:
        stack = values[None, None]
    elif values.ndim == rank + 1 and values.shape[0] == channels:
        stack = values[None]
    elif values.ndim == rank + 1 and channels == 1:
        stack = values[:, None]
    else:
        stack = values
    if stack.ndim != rank + 2 or stack.shape[1] != channels:
        raise InputError(
            f"its shape is {values.shape}; one sample has {channels} channels and {rank} dimensions"
        )
    if layout.depth is not None and stack.shape[2] != layout.depth:
        raise InputError(f"its depth is {stack.shape[2]}, others have {layout.depth}")
    return list(stack)


def _resized(sample: Tensor, layout: Layout) -> Tensor:
    """An array at the layout's sides; its depth stays."""
    if sample.shape[-len(layout.sides) :] == layout.sides:
        return sample.contiguous()
    if layout.dims == 1:
        return F.interpolate(sample[None], layout.sides, mode="linear")[0]
    if layout.dims == 2:
        return F.interpolate(sample[None], layout.sides, mode="bilinear", antialias=True)[0]
    slices = sample.transpose(0, 1)  # (depth, channels, h, w)
    return F.interpolate(slices, layout.sides, mode="bilinear", antialias=True).transpose(0, 1).contiguous()


def _pixels(picture: Image.Image, layout: Layout) -> Tensor:
    """(channels, height, width) uint8 of a picture, stretched to the size as the notes do, on white."""
    if layout.channels not in MODES:
        raise InputError(f"a picture has no {layout.channels} channels")
    height, width = layout.sides
    mode = MODES[layout.channels]
    if picture.mode == "RGBA" and mode != "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    small = picture.convert(mode).resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.array(small)
    return torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1).contiguous()


def _frames(path: Path, depth: int | None) -> list[Image.Image]:
    """The frames of an animation, `depth` of them evenly."""
    with Image.open(path, formats=("GIF", "WEBP", "PNG")) as opened:
        count = getattr(opened, "n_frames", 1)
        wanted = count if depth is None else depth
        if count < max(wanted, 2):
            raise InputError(f"it has {count} frames of {max(wanted, 2)}")
        frames = []
        for place in range(wanted):
            opened.seek(place * count // wanted)
            frames.append(open_picture(opened))
    return frames


def _wide(stored: Tensor) -> Tensor:
    return stored if stored.is_floating_point() else stored.float() / 127.5 - 1


def _left_out(broken: Sequence[str]) -> str:
    more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return f"{len(broken)} files cannot be used and are left out: {'; '.join(broken[:NAMED])}{more}"


def sheet_rows(samples: Tensor) -> Tensor:
    """What there is to look at of samples (b, c, ...), as (b, 3, h, w) in -1..1."""
    return to_tensor([preview(sample) for sample in samples])
