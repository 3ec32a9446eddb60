"""The clean samples a diffusion run learns from: latents encoded once and kept, or pictures as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sfumato.checkpoints.files import read_tensors, write_tensors
from sfumato.errors import CheckpointError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.vq import VQModel
from sfumato.training.data import Dataset, Position, batches, to_tensor

ENCODE_BATCH = 64
REPORTED = 16 * ENCODE_BATCH  # pictures between two reports of progress

Batch = tuple[list[Position], Tensor]
Progress = Callable[[int, int], None]


class Source(Protocol):
    """Clean samples (b, c, h, w) of a data set."""

    def batches(self, order: Iterator[list[Position]]) -> Generator[Batch, None, None]:
        """The samples of `groups`."""
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
    """Posteriors of every picture, as mean and standard deviation in float16, in memory and in one file.

    Both are kept, not samples, so every epoch draws anew and a change of `scale` needs no new cache.
    shape: (channels, h, w) of a latent. digest: the autoencoder's. progress: is told (encoded, of).
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
    ) -> None:
        self.scale = scale
        key = hashlib.sha256(f"{dataset.digest} {digest}".encode()).hexdigest()
        cached = _cached(path, key, (len(dataset), *shape))
        if cached is None:
            mean, std = _encode(dataset, autoencoder, progress)
            write_tensors(path, {"mean": mean, "std": std}, {"key": key})
            cached = read_tensors(path)[0]
        self.mean, self.std = cached["mean"], cached["std"]

    def batches(self, order: Iterator[list[Position]]) -> Generator[Batch, None, None]:
        for group in order:
            indices = [position.index for position in group]
            noise = torch.stack(
                [torch.randn(self.mean.shape[1:], generator=p.generator("posterior")) for p in group]
            )
            yield group, (self.mean[indices].float() + self.std[indices].float() * noise) * self.scale

    def fixed(self, indices: list[int]) -> Tensor:
        return self.mean[indices].float() * self.scale


def _cached(path: Path, key: str, shape: tuple[int, ...]) -> dict[str, Tensor] | None:
    """The tensors of a cache of these pictures; None where there is none, or a damaged or another one."""
    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
    except CheckpointError:
        return None  # it costs nothing but time to make again
    whole = tensors.keys() == {"mean", "std"} and all(t.shape == shape for t in tensors.values())
    return tensors if whole and metadata.get("key") == key else None


@torch.no_grad()
def _encode(
    dataset: Dataset, autoencoder: AutoencoderKL | VQModel, progress: Progress
) -> tuple[Tensor, Tensor]:
    means, stds = [], []
    device = next(autoencoder.parameters()).device
    for start in range(0, len(dataset), ENCODE_BATCH):
        indices = range(start, min(start + ENCODE_BATCH, len(dataset)))
        pictures = torch.stack([to_tensor(dataset.picture(index)) for index in indices]).to(device)
        posterior = autoencoder.encode(pictures)
        means.append(posterior.mean.half().cpu())
        stds.append(posterior.std.half().cpu())
        if start % REPORTED == 0:
            progress(indices.stop, len(dataset))
    return torch.cat(means), torch.cat(stds)
