"""What is put around a guidance: limits in sigma, a rescaled result, further branches to lead away from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.guidance import Combine, cfg
from sfumato.diffusion.prediction import PREDICTIONS

Adjust = Callable[[Tensor, float, Mapping[str, Tensor], Tensor], Tensor]
"""adjust(x, sigma, predictions, guided) -> guided: one more thing done to a guided x0."""

FOLLOW = cfg(1.0)
"""The condition followed as it is, with no guidance: the branch "cond" alone."""


@dataclass(frozen=True)
class Limited:
    """`combine` where low < sigma <= high, the branch "cond" alone elsewhere."""

    combine: Combine
    low: float
    high: float

    def needs(self, sigma: float, /) -> Collection[str]:
        """What `combine` needs inside, "cond" outside."""
        return self._at(sigma).needs(sigma)

    def __call__(self, x: Tensor, sigma: float, predictions: Mapping[str, Tensor], /) -> Tensor:
        """The guided x0."""
        return self._at(sigma)(x, sigma, predictions)

    def rows(self, start: int, stop: int, /) -> Limited:
        """The same for these images alone."""
        return replace(self, combine=self.combine.rows(start, stop))

    def _at(self, sigma: float) -> Combine:
        return self.combine if self.low < sigma <= self.high else FOLLOW


@dataclass(frozen=True)
class Adjusted:
    """`combine`, and then `adjust`, which reads the branches `reads`.

    alone: whether it is also done where `combine` has a single branch, so that nothing is guided yet.
    """

    combine: Combine
    adjust: Adjust
    reads: tuple[str, ...] = ()
    alone: bool = True

    def needs(self, sigma: float, /) -> Collection[str]:
        """What `combine` needs, and what `adjust` reads."""
        names = self.combine.needs(sigma)
        return list(dict.fromkeys([*names, *self.reads])) if self._applies(names) else names

    def __call__(self, x: Tensor, sigma: float, predictions: Mapping[str, Tensor], /) -> Tensor:
        """The adjusted x0."""
        guided = self.combine(x, sigma, predictions)
        applies = self._applies(self.combine.needs(sigma))
        return self.adjust(x, sigma, predictions, guided) if applies else guided

    def rows(self, start: int, stop: int, /) -> Adjusted:
        """The same for these images alone."""
        return replace(self, combine=self.combine.rows(start, stop))

    def _applies(self, names: Collection[str]) -> bool:
        return self.alone or len(names) > 1


def interval(combine: Combine, low: float, high: float) -> Combine:
    """Guidance for noise levels low < sigma <= high alone (Kynkäänniemi et al. 2024).

    Elsewhere only "cond" is computed. `InputError` unless 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise errors.InputError(
            f"guidance from sigma {high:g} down to {low:g}", "Allowed is 0 <= low <= high; high may be inf."
        )
    return Limited(combine, low, high)


def interval_of_steps(sigmas: Sequence[float], start: float, stop: float) -> tuple[float, float]:
    """(low, high) for `interval`, from the fractions of a run at which guidance starts and stops.

    Guided are the steps from floor(start * n) up to, not including, floor(stop * n). sigmas: the n + 1
    levels of the run. start 0 leaves no upper limit and stop 1 no lower one, whatever a sampler does between
    its levels. `InputError` unless 0 <= start <= stop <= 1.
    """
    if not 0 <= start <= stop <= 1:
        raise errors.InputError(
            f"guidance from {start:g} to {stop:g} of the steps", "Allowed is 0 <= start <= stop <= 1."
        )
    count = len(sigmas) - 1
    first, last = (
        math.floor(fraction * count + 1e-9) for fraction in (start, stop)
    )  # 0.29 * 100 is 28.99...
    if first == last:
        return 0.0, 0.0
    return (0.0 if last == count else sigmas[last]), (math.inf if first == 0 else sigmas[first])


def rescale(combine: Combine, phi: float, prediction: str) -> Combine:
    """The guided prediction with the spread that "cond" has (Lin et al. 2024, section 3.4).

    guided * (phi * std(cond) / std(guided) + 1 - phi), with the standard deviation of each picture, on what
    the network predicts: on its x0 it would be another method. phi: 0 leaves it, 1 is the full correction,
    the paper takes 0.7. prediction: a name in `PREDICTIONS`. Nothing is done where a single branch is
    computed. `InputError` for a phi outside 0 to 1 or an unknown prediction.
    """
    if not 0 <= phi <= 1:
        raise errors.InputError(f"the rescaling phi is {phi:g}", "Allowed is 0 to 1; the paper takes 0.7.")
    if prediction not in PREDICTIONS:
        raise errors.InputError(
            f"there is no prediction {prediction!r}", errors.nearest(prediction, PREDICTIONS)
        )
    kind = PREDICTIONS[prediction]

    def adjust(x: Tensor, sigma: float, predictions: Mapping[str, Tensor], guided: Tensor) -> Tensor:
        alpha = 1 / math.sqrt(1 + sigma**2)

        def raw(x0: Tensor) -> Tensor:
            return kind.target(x0, (x - x0) / sigma, alpha, sigma * alpha)

        changed = raw(guided)
        spread = per_image(torch.std, changed).clamp_min(torch.finfo(x.dtype).tiny)
        factor = phi * per_image(torch.std, raw(predictions["cond"])) / spread + (1 - phi)
        return kind.to_x0(changed * factor, x * alpha, alpha, sigma * alpha)

    return Adjusted(combine, adjust, ("cond",), alone=False) if phi else combine


def away_from(combine: Combine, branch: str, scale: float) -> Combine:
    """`combine` plus scale * (cond - branch): away from what the branch, a worse prediction, would give."""

    def adjust(x: Tensor, sigma: float, predictions: Mapping[str, Tensor], guided: Tensor) -> Tensor:
        return guided + scale * (predictions["cond"] - predictions[branch])

    return Adjusted(combine, adjust, ("cond", branch)) if scale else combine


def pag(combine: Combine, scale: float) -> Combine:
    """Perturbed-attention guidance (Ahn et al. 2024): away from the branch "perturbed".

    That branch has the condition of "cond" and a predictor of the same network whose self-attention is
    disturbed by a patch. scale: 0 is off, 3 is usual. Smoothed-energy guidance (Hong 2024) is the
    same with another patch.
    """
    return away_from(combine, "perturbed", scale)


def autoguidance(scale: float, combine: Combine = FOLLOW) -> Combine:
    """Guidance by a weaker version of the model (Karras et al. 2024): away from the branch "weak".

    weak + scale * (cond - weak), or as much on top of another guidance. "weak" has the condition of "cond"
    and the predictor of a smaller or less trained model with the same latents. scale: 1 is off.
    """
    return away_from(combine, "weak", scale - 1)


def per_image(reduce: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """A number for each image, (b, 1, ...), from tensors (b, ...) of equal shape.

    Reduced image by image, so that the rounding cannot depend on the batch.
    """
    numbers = [reduce(*rows) for rows in zip(*(value.unbind() for value in values), strict=True)]
    return torch.stack(numbers).reshape(-1, *[1] * (values[0].ndim - 1))
