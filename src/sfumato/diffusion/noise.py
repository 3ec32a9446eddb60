"""Noise that belongs to a picture, not to its batch: a generator per image, never the global one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.philox import PhiloxGenerator

NEARLY_PARALLEL = 0.9995  # cosine from which on a straight line is as good as an arc, and safe to divide

Draw = Callable[[Sequence[int]], Tensor]
"""draw(shape) -> the next standard normal values of one stream, float32, on the CPU."""


def cpu_draw(seed: int) -> Draw:
    """torch's own CPU generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda shape: torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def philox_draw(seed: int) -> Draw:
    """What a GPU's generator draws; see `PhiloxGenerator`."""
    return PhiloxGenerator(seed).normal


SOURCES: dict[str, Callable[[int], Draw]] = {"cpu": cpu_draw, "philox": philox_draw}


@dataclass(frozen=True)
class NoiseConfig:
    """Which noise the seeds stand for; the default is plain noise of torch's CPU generator.

    source: "cpu", or "philox" for the values that an NVIDIA GPU would draw.
    eta_seed_delta: the later steps' noise is that of seed + delta; 0 goes on with the start's generator.
    variation_seed, variation_strength: image i starts on the arc between the noise of its own seed (0) and
        of variation_seed + i (1).
    variation_by: "image" takes one angle between two noises; "column" one for every channel and column, as
        A1111's pictures are made.
    seed_resize: latent (height, width), or as many sides as samples have. The start noise of that size, the
        one that a picture of that size has, is centred on the wanted size: cut off where it is larger, and
        surrounded by the seed's noise of the wanted size where it is smaller.

    `InputError` for an unknown name, a strength outside 0..1 or without a seed, a side below 1.
    """

    source: Literal["cpu", "philox"] = "cpu"
    eta_seed_delta: int = 0
    variation_seed: int | None = None
    variation_strength: float = 0.0
    variation_by: Literal["image", "column"] = "image"
    seed_resize: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for given, allowed, what in (
            (self.source, SOURCES, "source of noise"),
            (self.variation_by, ("image", "column"), "kind of variation"),
        ):
            if given not in allowed:
                raise errors.InputError(f"there is no {what} {given!r}", errors.nearest(given, allowed))
        if not 0 <= self.variation_strength <= 1:
            raise errors.InputError(f"variation_strength is {self.variation_strength}; allowed is 0 to 1")
        if self.variation_strength > 0 and self.variation_seed is None:
            raise errors.InputError(
                f"variation_strength is {self.variation_strength}, and there is no variation_seed",
                "Give the seed of the noise to vary towards.",
            )
        if self.seed_resize is not None and min(self.seed_resize, default=0) < 1:
            raise errors.InputError(f"seed_resize is {self.seed_resize}; allowed are sides of 1 and more")


PLAIN = NoiseConfig()


class ImageNoise:
    """The start noise and the fresh noise of a batch; row i depends on seeds[i], i's variation and `shape`.

    seeds: one per image, each in -2^63 .. 2^64 - 1. shape: of one image, without the sample axis. device:
    where the values go after being drawn on the CPU, so that every machine draws the same. start: given
    start noise, shaped (b, *shape), or `shape` or (1, *shape) as one for all images, taken as it is: it is
    neither varied nor resized; the noise of the later steps is the same with and without it. config: see
    there. `InputError` where the start or seed_resize has another shape.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        *,
        device: torch.device,
        start: Tensor | None = None,
        config: NoiseConfig = PLAIN,
    ) -> None:
        self._shape = tuple(shape)
        self._device = device
        self._batch = (len(seeds), *self._shape)
        source, delta = SOURCES[config.source], config.eta_seed_delta
        streams = [source(seed) for seed in seeds]
        drawn = [draw(self._shape) for draw in streams]  # even if not used: later noise is never start noise
        self._streams = [source((seed + delta) % 2**64) for seed in seeds] if delta else streams
        if start is not None:
            self._start = self._given(start)
            return
        own = enumerate(zip(seeds, drawn, strict=True))
        self._start = torch.stack([_start(config, seed, index, noise) for index, (seed, noise) in own])

    def initial(self) -> Tensor:
        """Start noise, (b, *shape) float32, standard normal unless given; the same at every call."""
        return self._start.to(self._device)

    def __call__(self, sigma: float, target: float) -> Tensor:
        """Fresh standard normal noise for a step, (b, *shape) float32."""
        return torch.stack([draw(self._shape) for draw in self._streams]).to(self._device)

    def _given(self, start: Tensor) -> Tensor:
        batch, shape = self._batch, self._shape
        if tuple(start.shape) not in (batch, (1, *shape), shape):
            raise errors.InputError(
                f"the start noise has shape {tuple(start.shape)}; allowed are {batch} and {shape}",
                "Give one noise per image, or one for all of them.",
            )
        return start.to(torch.float32).expand(batch).clone()


def slerp(share: float, first: Tensor, second: Tensor, *, axis: int | None = None) -> Tensor:
    """The point at `share` of the arc from `first` (0) to `second` (1), like them (Shoemake 1985).

    The arc keeps the length of noise, which a straight line shortens; the line replaces it between vectors
    that are parallel or nearly so. axis: None takes a tensor as one vector, else it is many, along that axis.
    """
    axes = tuple(range(first.ndim)) if axis is None else (axis,)
    norms = [torch.linalg.vector_norm(each, dim=axes, keepdim=True) for each in (first, second)]
    cosine = (first * second).sum(dim=axes, keepdim=True) / (norms[0] * norms[1])
    angle = torch.acos(cosine.clamp(-NEARLY_PARALLEL, NEARLY_PARALLEL))
    arc = (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / torch.sin(angle)
    return torch.where(cosine.abs() > NEARLY_PARALLEL, torch.lerp(first, second, share), arc)


def centred(inner: Tensor, outer: Tensor) -> Tensor:
    """`outer` with the middle of `inner` laid over its own, (c, *s) both; cut alike on opposite sides."""
    source, place = [slice(None)], [slice(None)]
    for given, wanted in zip(inner.shape[1:], outer.shape[1:], strict=True):
        before = (wanted - given) // 2
        length = given + 2 * min(before, 0)
        source.append(slice(max(-before, 0), max(-before, 0) + length))
        place.append(slice(max(before, 0), max(before, 0) + length))
    result = outer.clone()
    result[tuple(place)] = inner[tuple(source)]
    return result


def _start(config: NoiseConfig, seed: int, index: int, own: Tensor) -> Tensor:
    """The start noise of the image `index`; `own` is what its seed gives at the wanted size."""
    source, resize = SOURCES[config.source], config.seed_resize
    shape = tuple(own.shape) if resize is None else (own.shape[0], *resize)
    if len(shape) != own.ndim:
        raise errors.InputError(
            f"seed_resize is {resize}; samples of shape {tuple(own.shape)} have {own.ndim - 1} sides",
            "Give as many.",
        )
    noise = own if shape == tuple(own.shape) else source(seed)(shape)
    if config.variation_strength > 0:
        assert config.variation_seed is not None
        other = source((config.variation_seed + index) % 2**64)(shape)
        axis = 1 if config.variation_by == "column" else None
        noise = slerp(config.variation_strength, noise, other, axis=axis)
    return noise if noise.shape == own.shape else centred(noise, own)
