"""Masked diffusion: any denoiser draws inside a mask alone, hard or soft (Levin and Fried 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.prediction import GuidedDenoiser


@dataclass(frozen=True)
class Masked:
    """A denoiser that knows the picture outside its mask; made by `masked`."""

    denoise: GuidedDenoiser
    known: Tensor
    noise: Tensor
    mask: Tensor
    levels: tuple[float, ...] = ()

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        """x0 like x: drawn inside the mask, `known` outside."""
        free = self.free(sigma)
        return torch.lerp(self.known, self.denoise(self._seen(x, sigma, free), sigma), free)

    def parts(self, x: Tensor, sigma: float, /) -> tuple[Tensor, Tensor]:
        """(guided, unguided) x0, both with what is known."""
        free = self.free(sigma)
        guided, unguided = self.denoise.parts(self._seen(x, sigma, free), sigma)
        return torch.lerp(self.known, guided, free), torch.lerp(self.known, unguided, free)

    def rows(self, start: int, stop: int, /) -> Masked:
        """The same for the images start..stop of the batch alone."""
        return replace(
            self,
            denoise=self.denoise.rows(start, stop),
            known=self.known[start:stop],
            noise=self.noise[start:stop],
            mask=self.mask[start:stop],
        )

    def free(self, sigma: float) -> Tensor:
        """The share of each latent that is drawn at this noise level, like `mask`.

        Soft masks are thresholded (Levin and Fried 2023, algorithm 1): a latent of grey g is held until the
        share g of the run is left, just as image-to-image of strength g would begin there.
        """
        if not self.levels:
            return self.mask
        steps = len(self.levels) - 1
        done = max(0, sum(level >= sigma for level in self.levels) - 1)
        return (self.mask >= (steps - done) / steps - 1e-6).to(self.mask.dtype)

    def _seen(self, x: Tensor, sigma: float, free: Tensor) -> Tensor:
        """What the network sees: outside the mask the known picture, as noisy as the rest."""
        return torch.lerp(self.known + sigma * self.noise, x, free)


def masked(
    denoise: GuidedDenoiser, known: Tensor, noise: Tensor, mask: Tensor, soft: Sequence[float] | None = None
) -> Masked:
    """A denoiser that draws where `mask` is 1 and gives `known` where it is 0.

    known: (b, c, ...), what the picture is. noise: like it, the noise that sampling starts from. mask:
    (b, 1, ...) in 0..1; values between blend. soft: the noise levels of the run, its last included; the
    mask's values then say how much of the run each latent takes part in. `InputError` for shapes that do not
    fit.
    """
    shape = (known.shape[0], 1, *known.shape[2:])
    if noise.shape != known.shape or mask.shape != shape:
        raise errors.InputError(
            f"the mask has shape {tuple(mask.shape)} and the noise {tuple(noise.shape)}",
            f"They should be {shape} and {tuple(known.shape)}.",
        )
    return Masked(denoise, known, noise, mask, tuple(soft or ()))
