"""The original's `ldm.modules.distributions.distributions` around this package's Gaussian."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.nn.autoencoder import LOGVAR_RANGE, DiagonalGaussian


class DiagonalGaussianDistribution(DiagonalGaussian):
    """A Gaussian with independent components from its parameters (b, 2c, ...): mean, then log-variance.

    deterministic: of zero variance, so that every sample is the mean.
    """

    parameters: Tensor
    deterministic: bool

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        mean, logvar = parameters.chunk(2, dim=1)
        super().__init__(mean, logvar.clamp(*LOGVAR_RANGE))
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "deterministic", deterministic)

    @property
    def std(self) -> Tensor:
        """Standard deviation, (b, c, ...)."""
        return torch.zeros_like(self.mean) if self.deterministic else super().std

    @property
    def var(self) -> Tensor:
        """Variance, (b, c, ...)."""
        return torch.zeros_like(self.mean) if self.deterministic else self.logvar.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, (b, c, ...), of `generator` or, as in the original, of torch's global one on the CPU."""
        device = "cpu" if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """KL(self || other) in nats, (b,), where None is N(0, I); the original's [0] if deterministic."""
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            return super().kl()
        ratio = (self.logvar - other.logvar).exp()
        distance = (self.mean - other.mean).square() / other.logvar.exp()
        return 0.5 * (distance + ratio - 1.0 - self.logvar + other.logvar).flatten(1).sum(dim=1)

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of `sample` in nats, summed over `dims`; [0] for a deterministic one."""
        if self.deterministic:
            return torch.zeros(1)
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=tuple(dims))
