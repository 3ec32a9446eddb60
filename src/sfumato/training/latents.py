"""The clean samples a diffusion run learns from: latents encoded once and kept, or pictures as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import InputError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.vq import VQModel
from sfumato.training.data import WHOLE, Dataset, Placed, Position, Share, ahead, batches, to_tensor
from sfumato.training.rows import Columns, Part, filled, planned

ENCODE_BATCH = 64
ENCODE_PIXELS = 64 * 128 * 128  # of a batch that is encoded: fewer pictures where they are larger
REPORTED = 16 * ENCODE_BATCH  # pictures between two reports of progress

Batch = tuple[list[Position], Tensor]
Progress = Callable[[int, int], None]


class Source(Protocol):
    """Clean samples (b, c, h, w) of a data set."""

    def batches(self, order: Iterator[list[Position]]) -> Generator[Batch, None, None]:
        """The samples of `groups`, with the positions of the pictures that could be read."""
        ...

    def fixed(self, indices: list[int]) -> Tensor:
        """The samples of these pictures, always the same."""
        ...


class Pixels:
    """Pixel space: pictures in -1..1, decoded as they are needed."""

    def __init__(self, dataset: Dataset, workers: int) -> None:
        self.dataset, self.workers = dataset, workers

    def batches(self, order: Iterator[list[Position]]) -> Generator[Batch, None, None]:
        return batches(self.dataset, order, self.workers)

    def fixed(self, indices: list[int]) -> Tensor:
        return torch.stack([to_tensor(self.dataset.picture(index)) for index in indices])


class CachedLatents:
    """Posteriors of every picture, as mean and standard deviation in float16, in memory-mapped files.

    Both are kept, not samples, so every epoch draws anew and a change of `scale` needs no new cache. Where
    pictures are mirrored by chance, both sides are kept. shape: (channels, h, w) of a latent of the data
    set's usual size. path: of the first file, others stand beside it with numbers, of 256 MB each; encoding
    that was killed goes on with the file it was at. digest: the autoencoder's. progress: is told (encoded,
    of). share: of several processes with one folder each encodes its files. workers: threads that decode.

    Raises `InputError` for pictures that are cut at random, and for buckets that the autoencoder cannot take.
    """

    def __init__(
        self,
        dataset: Dataset,
        autoencoder: AutoencoderKL | VQModel,
        scale: float,
        shape: tuple[int, ...],
        path: Path,
        digest: str,
        progress: Progress,
        share: Share = WHOLE,
        workers: int = 2,
    ) -> None:
        self.dataset, self.scale = dataset, scale
        self._autoencoder, self._progress, self._workers = autoencoder, progress, workers
        if isinstance(dataset, Placed) and dataset.random_crop:
            raise InputError(
                "pictures that are cut at random cannot be encoded ahead",
                'Set data.crop = "center"; data.buckets cuts little.',
            )
        self.sides = 2 if isinstance(dataset, Placed) and dataset.flip > 0 else 1
        self._done, self._of = 0, len(dataset) * self.sides
        parts = self._plan(shape)
        key = hashlib.sha256(f"{dataset.digest} {digest} {self.sides}".encode()).hexdigest()
        self._parts = filled(path, key, parts, self._encode, share)
        self._where = torch.empty(self._of, 2, dtype=torch.int32)  # (file, place in it) of every row
        for number, part in enumerate(parts):
            self._where[list(part.rows), 0] = number
            self._where[list(part.rows), 1] = torch.arange(len(part.rows), dtype=torch.int32)
        self._pass_over(parts)

    @property
    def mean(self) -> Tensor:
        """(n, c, h, w) float16 of all pictures of one size, in memory; not mirrored."""
        return self._column("mean", range(0, self._of, self.sides))

    @property
    def std(self) -> Tensor:
        """Standard deviations beside `mean`."""
        return self._column("std", range(0, self._of, self.sides))

    def batches(self, order: Iterator[list[Position]]) -> Generator[Batch, None, None]:
        for group in order:
            places, rows = group, [position.index for position in group]
            if isinstance(self.dataset, Placed):
                places = [self.dataset.sound(position) for position in group]
                rows = [each.index * self.sides + self.dataset.flipped(each) for each in places]
            mean, std = self._column("mean", rows).float(), self._column("std", rows).float()
            noise = torch.stack(
                [torch.randn(mean.shape[1:], generator=place.generator("posterior")) for place in places]
            )
            yield places, (mean + std * noise) * self.scale

    def fixed(self, indices: list[int]) -> Tensor:
        return self._column("mean", [index * self.sides for index in indices]).float() * self.scale

    def _column(self, name: str, rows: Sequence[int]) -> Tensor:
        """(len(rows), c, h, w) float16; `ValueError` where they differ in size."""
        where = self._where[list(rows)].tolist()
        found = [self._parts[number][name][place] for number, place in where]
        if len({value.shape for value in found}) > 1:
            raise ValueError("latents of several sizes have no common tensor; take a batch of `groups`")
        return torch.stack(found)

    def _plan(self, shape: tuple[int, ...]) -> list[Part]:
        """Files of one size of latents each, in the order of the sizes."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        factor = self._autoencoder.downsampling
        for index in range(len(self.dataset)):
            own = shape
            if isinstance(self.dataset, Placed) and self.dataset.bucketed:
                height, width = self.dataset.size(index)
                if height % factor or width % factor:
                    raise InputError(
                        f"a bucket has {height}x{width} pixels; this autoencoder takes multiples of {factor}",
                        "Set data.buckets.step to a multiple of it.",
                    )
                own = (shape[0], height // factor, width // factor)
            by_shape.setdefault(own, []).extend(index * self.sides + side for side in range(self.sides))
        parts = []
        for own, rows in sorted(by_shape.items()):
            columns: Columns = {
                "mean": (own, torch.float16),
                "std": (own, torch.float16),
                "whole": ((), torch.uint8),  # 0 where the picture cannot be used
            }
            parts += planned(rows, columns, ENCODE_BATCH)
        return parts

    @torch.no_grad()
    def _encode(self, part: Part) -> dict[str, Tensor]:
        """The columns of one file. A picture that cannot be read is encoded as black, and marked."""
        device = next(self._autoencoder.parameters()).device
        *_, height, width = part.columns["mean"][0]
        pixels = height * width * self._autoencoder.downsampling**2
        size = max(1, min(ENCODE_BATCH, ENCODE_PIXELS // pixels))
        rows = [list(part.rows[start : start + size]) for start in range(0, len(part.rows), size)]
        means, stds, whole = [], [], []
        with closing(ahead(iter(rows), self._decoded, self._workers)) as decoded:
            for pictures, usable in decoded:
                posterior = self._autoencoder.encode(pictures.to(device))
                means.append(posterior.mean.half().cpu())
                stds.append(posterior.std.half().cpu())
                whole.append(usable)
                if self._done % REPORTED < len(usable):
                    self._progress(self._done + len(usable), self._of)
                self._done += len(usable)
        return {"mean": torch.cat(means), "std": torch.cat(stds), "whole": torch.cat(whole)}

    def _decoded(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """(pictures (b, c, h, w), which of them could be read (b,) uint8)."""
        found = [self._picture(row) for row in rows]
        like = next((picture for picture in found if picture is not None), None)
        if like is None:
            like = self.dataset.picture(rows[0] // self.sides)
            if isinstance(self.dataset, Placed):
                height, width = self.dataset.size(rows[0] // self.sides)
                like = like.resize((width, height))
        black = Image.new(like.mode, like.size)
        pictures = torch.stack([to_tensor(black if picture is None else picture) for picture in found])
        return pictures, torch.tensor([picture is not None for picture in found], dtype=torch.uint8)

    def _picture(self, row: int) -> Image.Image | None:
        index, side = divmod(row, self.sides)
        if isinstance(self.dataset, Placed):
            return self.dataset.variant(index, flipped=side == 1)
        return self.dataset.picture(index)

    def _pass_over(self, parts: Sequence[Part]) -> None:
        """Tell the data set of pictures that were found to be unusable when they were encoded."""
        if not isinstance(self.dataset, Placed):
            return
        for part, tensors in zip(parts, self._parts, strict=True):
            for place in (tensors["whole"] == 0).nonzero().flatten().tolist():
                reason = "it could not be read when it was encoded"
                self.dataset.unusable(part.rows[place] // self.sides, reason)
