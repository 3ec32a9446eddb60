"""Classifier guidance: a classifier of noised samples steers the denoiser (Dhariwal and Nichol 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.prediction import GuidedDenoiser
from sfumato.diffusion.schedule import Schedule

# form -> the variance that the gradient is multiplied by, from (sigma, target); see `classifier_guided`.
FORMS: dict[str, Callable[[float, float], float]] = {
    "eps": lambda sigma, target: sigma**2,
    "mean": lambda sigma, target: target**2,
}


class LogProbability(Protocol):
    """log p(y | x, sigma) of what each image of the batch is wanted to be; differentiable in x."""

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        """(b,) of x: (b, ...) in variance-exploding coordinates, x = x0 + sigma * noise."""
        ...

    def rows(self, start: int, stop: int, /) -> LogProbability:
        """The same for the images start..stop of the batch alone."""
        ...


@dataclass(frozen=True)
class ClassProbability:
    """A classifier network as a `LogProbability`.

    network(x, t) -> logits (b, classes), x in variance-preserving coordinates and t (b,) float32, trained
    with `schedule`; labels: (b,) long, the class that each image is to have.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    schedule: Schedule
    labels: Tensor

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        t = torch.full((x.shape[0],), self.schedule.timestep(sigma), dtype=torch.float32, device=x.device)
        logits = self.network(x / math.sqrt(1 + sigma**2), t)
        return logits.to(x.dtype).log_softmax(dim=1).gather(1, self.labels[:, None]).squeeze(1)

    def rows(self, start: int, stop: int, /) -> ClassProbability:
        return replace(self, labels=self.labels[start:stop])


@dataclass(frozen=True)
class ClassifierGuided:
    """A guided denoiser, steered further; made by `classifier_guided`."""

    denoise: GuidedDenoiser
    log_probability: LogProbability
    scale: float
    form: str
    sigmas: tuple[float, ...]
    batched: bool

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        return self._steered(self.denoise(x, sigma), x, sigma)

    def parts(self, x: Tensor, sigma: float, /) -> tuple[Tensor, Tensor]:
        """(guided and steered, unguided) x0."""
        guided, unguided = self.denoise.parts(x, sigma)
        return self._steered(guided, x, sigma), unguided

    def rows(self, start: int, stop: int, /) -> ClassifierGuided:
        part = self.log_probability.rows(start, stop)
        return replace(self, denoise=self.denoise.rows(start, stop), log_probability=part)

    def _steered(self, denoised: Tensor, x: Tensor, sigma: float) -> Tensor:
        target = next((level for level in self.sigmas if level < sigma), 0.0)
        weight = self.scale * FORMS[self.form](sigma, target)
        if weight == 0:
            return denoised
        gradient = log_probability_gradient(self.log_probability, x, sigma, batched=self.batched)
        return denoised + weight * gradient


def classifier_guided(
    denoise: GuidedDenoiser,
    log_probability: LogProbability,
    scale: float,
    *,
    form: Literal["eps", "mean"] = "eps",
    sigmas: Sequence[float] | None = None,
    batched: bool = True,
) -> ClassifierGuided:
    """Steer a denoiser towards what `log_probability` is the probability of.

    A denoiser is x + sigma^2 grad log p(x) (Tweedie's formula), and by Bayes' rule the gradient of
    log p(x | y) is that of log p(x) plus that of log p(y | x). So, in variance-exploding coordinates,

    - "eps", for any sampler, adds scale * sigma^2 * grad log p(y | x). It is the paper's algorithm 2, which
      takes sqrt(1 - abar) grad from eps. With scale 1 and a perfect classifier it is the denoiser of the
      class; more exaggerates.
    - "mean", for samplers that draw from DDPM's posterior (ddpm with the small variance, ddim and euler_a
      with eta 1), adds scale * target^2 * grad. That moves the mean of the step by scale * variance * grad,
      the paper's algorithm 1: the posterior's mean holds x0 with the weight 1 - target^2 / sigma^2, and its
      variance is target^2 times that. Both forms agree as steps get small.

    scale: 0 and more; 0 never asks the classifier. sigmas: the levels of the run, descending, as the sampler
    gets them: the form "mean" needs them, and takes the first one below sigma as the step's target. batched:
    False asks the classifier for one image at a time, so that a picture cannot depend on its batch.
    `InputError` for another form, a scale that is negative or not finite, or "mean" without sigmas.
    """
    if form not in FORMS:
        raise errors.InputError(
            f"there is no form of classifier guidance {form!r}", errors.nearest(form, FORMS)
        )
    if not 0 <= scale < math.inf:
        raise errors.InputError(f"the scale of classifier guidance is {scale}; allowed is 0 and more")
    if form == "mean" and sigmas is None:
        raise errors.InputError(
            "the form 'mean' of classifier guidance needs the noise levels of the run",
            "Give sigmas, or use the form 'eps'.",
        )
    return ClassifierGuided(denoise, log_probability, scale, form, tuple(sigmas or ()), batched)


def log_probability_gradient(
    log_probability: LogProbability, x: Tensor, sigma: float, *, batched: bool = True
) -> Tensor:
    """grad_x log p(y | x, sigma), like x; works where gradients are off, and leaves x as it is."""
    if not batched:
        each = [
            log_probability_gradient(log_probability.rows(i, i + 1), x[i : i + 1], sigma)
            for i in range(x.shape[0])
        ]
        return torch.cat(each)
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        # Images do not see each other, so the gradient of the sum holds that of each.
        (gradient,) = torch.autograd.grad(log_probability(leaf, sigma).sum(), leaf)
    return gradient
