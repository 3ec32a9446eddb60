"""Noise that belongs to a picture, not to its batch: one CPU generator per image, never the global one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato import errors


class ImageNoise:
    """The start noise and the fresh noise of a batch; row i depends on seeds[i] and `shape` only.

    seeds: one per image, each in -2^63 .. 2^64 - 1. shape: of one image, without the sample axis. device:
    where the values go after being drawn on the CPU, so that every machine draws the same. start: given
    start noise, shaped (b, *shape), or `shape` or (1, *shape) as one for all images; the noise of the later
    steps is the same with and without it. `InputError` where its shape is another.
    """

    def __init__(
        self, seeds: Sequence[int], shape: Sequence[int], *, device: torch.device, start: Tensor | None = None
    ) -> None:
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shape = tuple(shape)
        self._device = device
        drawn = self._draw()  # even if not used: else the first fresh noise would be the seed's start noise
        self._start = drawn if start is None else self._given(start)

    def initial(self) -> Tensor:
        """Start noise, (b, *shape) float32, standard normal unless given; the same at every call."""
        return self._start.to(self._device)

    def __call__(self, sigma: float, target: float) -> Tensor:
        """Fresh standard normal noise for a step, (b, *shape) float32."""
        return self._draw().to(self._device)

    def _draw(self) -> Tensor:
        rows = [torch.randn(self._shape, generator=one, dtype=torch.float32) for one in self._generators]
        return torch.stack(rows)

    def _given(self, start: Tensor) -> Tensor:
        batch = (len(self._generators), *self._shape)
        if tuple(start.shape) not in (batch, (1, *self._shape), self._shape):
            raise errors.InputError(
                f"the start noise has shape {tuple(start.shape)}; allowed are {batch} and {self._shape}",
                "Give one noise per image, or one for all of them.",
            )
        return start.to(torch.float32).expand(batch).clone()
