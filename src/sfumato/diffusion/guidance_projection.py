"""Guidance by projection: adaptive projected (Sadat et al. 2024) and Perp-Neg (Armandpour et al. 2023)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.guidance import Combine, cfg
from sfumato.diffusion.guidance_methods import per_image


def along(values: Tensor, direction: Tensor) -> Tensor:
    """The part of `values` in the direction of `direction`, image by image; all (b, ...)."""
    square = per_image(_dot, direction, direction).clamp_min(torch.finfo(values.dtype).tiny)
    return per_image(_dot, values, direction) / square * direction


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


@dataclass
class Memory:
    """A decaying sum of the differences seen, total = difference + momentum * total, a term for each sigma.

    Another evaluation at the sigma of the last one takes its place: a repeated step changes nothing, and
    the two evaluations that second-order samplers make at a level count once.
    """

    sigma: float | None = None
    before: Tensor | None = None
    total: Tensor | None = None

    def add(self, sigma: float, difference: Tensor, momentum: float) -> Tensor:
        """The sum with `difference` as its newest term."""
        if sigma != self.sigma:
            self.sigma, self.before = sigma, self.total
        if self.before is not None and self.before.shape != difference.shape:
            raise errors.InputError(
                f"this guidance remembers a run of shape {tuple(self.before.shape)}; "
                f"the sample has shape {tuple(difference.shape)}",
                "Make a new one for each run.",
            )
        self.total = difference if self.before is None else difference + momentum * self.before
        return self.total

    def rows(self, start: int, stop: int) -> Memory:
        """What is remembered of the images start..stop."""
        before, total = (None if value is None else value[start:stop] for value in (self.before, self.total))
        return Memory(self.sigma, before, total)


@dataclass(frozen=True)
class AdaptiveProjected:
    """See `apg`; `memory` belongs to one run."""

    scale: float
    eta: float
    norm_threshold: float
    momentum: float
    memory: Memory = field(default_factory=Memory)

    def needs(self, sigma: float, /) -> Collection[str]:
        """As classifier-free guidance: one branch at scale 0 and 1."""
        return cfg(self.scale).needs(sigma)

    def __call__(self, x: Tensor, sigma: float, predictions: Mapping[str, Tensor], /) -> Tensor:
        """The guided x0 (Sadat et al. 2024, algorithm 1)."""
        if self.scale in (0, 1):
            return cfg(self.scale)(x, sigma, predictions)
        cond = predictions["cond"]
        update = cond - predictions["uncond"]
        if self.momentum:
            update = self.memory.add(sigma, update, self.momentum)
        if self.norm_threshold:
            norm = per_image(_dot, update, update).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
            update = update * (self.norm_threshold / norm).clamp_max(1)
        parallel = along(update, cond)
        return cond + (self.scale - 1) * (update - parallel + self.eta * parallel)

    def rows(self, start: int, stop: int, /) -> AdaptiveProjected:
        """The same for these images, with a memory of their own."""
        memory = self.memory.rows(start, stop)
        return AdaptiveProjected(self.scale, self.eta, self.norm_threshold, self.momentum, memory)


def apg(
    scale: float, eta: float = 0.0, norm_threshold: float = 15.0, momentum: float = -0.5
) -> AdaptiveProjected:
    """Adaptive projected guidance: strong guidance without oversaturation (Sadat et al. 2024, algorithm 1).

    cond + (scale - 1) * (orthogonal + eta * parallel), of the difference cond - uncond split by the
    direction of cond, after its norm was cut at `norm_threshold` (0 leaves it) and `momentum` times the
    past differences were added (negative ones push away from them, 0 is off).
    The defaults are the paper's for Stable Diffusion XL; the norm is that of a whole picture, and grows with
    the square root of its size. What comes back remembers its run: make a new one for each.
    """
    if norm_threshold < 0 or not -1 < momentum < 1:
        raise errors.InputError(
            f"norm_threshold is {norm_threshold:g} and momentum {momentum:g}",
            "Allowed are a threshold from 0 up and a momentum between -1 and 1.",
        )
    return AdaptiveProjected(scale, eta, norm_threshold, momentum)


@dataclass(frozen=True)
class PerpendicularNegative:
    """See `perp_neg`."""

    scale: float
    neg_scale: float

    def needs(self, sigma: float, /) -> Collection[str]:
        """All three branches, unless a scale of 0 makes it plain."""
        return (
            ("cond", "uncond", "negative") if self.scale and self.neg_scale else cfg(self.scale).needs(sigma)
        )

    def __call__(self, x: Tensor, sigma: float, predictions: Mapping[str, Tensor], /) -> Tensor:
        """The guided x0."""
        if not (self.scale and self.neg_scale):
            return cfg(self.scale)(x, sigma, predictions)
        uncond = predictions["uncond"]
        positive, negative = predictions["cond"] - uncond, predictions["negative"] - uncond
        perpendicular = negative - along(negative, positive)
        return uncond + self.scale * (positive - self.neg_scale * perpendicular)

    def rows(self, start: int, stop: int, /) -> PerpendicularNegative:
        """Itself."""
        return self


def perp_neg(scale: float, neg_scale: float = 1.0) -> Combine:
    """A negative prompt that cannot undo the prompt (Armandpour et al. 2023).

    uncond + scale * (positive - neg_scale * the part of negative perpendicular to positive), where positive
    is cond - uncond and negative is negative - uncond, of the branches "cond", "uncond" (the empty prompt)
    and "negative". scale as in `cfg`; neg_scale: from 0, which leaves the negative prompt out, to about 2.
    """
    return PerpendicularNegative(scale, neg_scale)
