"""The clean samples a diffusion run learns from: latents encoded once and kept, or pictures as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.files import read_metadata, read_tensors, write_tensors
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.training.data import Dataset, Position, batches, to_tensor

ENCODE_BATCH = 64


class Pictures:
    """Pixel space: batches of pictures (b, c, h, w) in -1..1, decoded as they are needed."""

    def __init__(self, dataset: Dataset, workers: int) -> None:
        self.dataset, self.workers = dataset, workers

    def batches(self, order: Iterator[Position], size: int) -> Iterator[tuple[list[Position], Tensor]]:
        return batches(self.dataset, order, size, self.workers)

    def fixed(self, indices: list[int]) -> Tensor:
        return torch.stack([to_tensor(self.dataset.picture(index)) for index in indices])


class CachedLatents:
    """Posteriors of every picture, as mean and standard deviation in float16, in memory and in one file.

    Both are kept, not samples, so every epoch draws anew and a change of `scale` needs no new cache.
    """

    def __init__(
        self,
        dataset: Dataset,
        autoencoder: AutoencoderKL,
        scale: float,
        path: Path,
        digest: str,
        device: torch.device,
        progress: Callable[[int, int], None],
    ) -> None:
        self.scale = scale
        key = hashlib.sha256(f"{dataset.digest} {digest}".encode()).hexdigest()
        if not (path.exists() and read_metadata(path).get("key") == key):
            mean, std = _encode(dataset, autoencoder, device, progress)
            write_tensors(path, {"mean": mean, "std": std}, {"key": key})
        tensors, _ = read_tensors(path)
        self.mean, self.std = tensors["mean"], tensors["std"]

    def batches(self, order: Iterator[Position], size: int) -> Iterator[tuple[list[Position], Tensor]]:
        while True:
            group = [next(order) for _ in range(size)]
            indices = [position.index for position in group]
            noise = torch.stack(
                [torch.randn(self.mean.shape[1:], generator=p.generator("posterior")) for p in group]
            )
            yield group, (self.mean[indices].float() + self.std[indices].float() * noise) * self.scale

    def fixed(self, indices: list[int]) -> Tensor:
        return self.mean[indices].float() * self.scale


@torch.no_grad()
def _encode(
    dataset: Dataset, autoencoder: AutoencoderKL, device: torch.device, progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    means, stds = [], []
    for start in range(0, len(dataset), ENCODE_BATCH):
        indices = range(start, min(start + ENCODE_BATCH, len(dataset)))
        pictures = torch.stack([to_tensor(dataset.picture(index)) for index in indices]).to(device)
        posterior = autoencoder.encode(pictures)
        means.append(posterior.mean.half().cpu())
        stds.append((0.5 * posterior.logvar).exp().half().cpu())
        progress(indices.stop, len(dataset))
    return torch.cat(means), torch.cat(stds)
