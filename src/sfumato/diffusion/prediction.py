"""What a network predicts, and the step from a network to a denoiser (Salimans and Ho 2022).

`PREDICTIONS` defines eps, v and x0 once, for training (`target`) and for sampling (`to_x0`).
`Predictor` is the only place that knows a network's input scale, output scale and timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sfumato import errors
from sfumato.conditioning import Conditioning
from sfumato.diffusion.schedule import Schedule

Amplitude = Tensor | float
Denoiser = Callable[[Tensor, float], Tensor]
"""The denoiser seam D(x, sigma) -> x0: x = x0 + sigma * noise, sigma > 0 is a float, the answer like x."""


class GuidedDenoiser(Protocol):
    """A denoiser that also gives its parts, for the few samplers that ask for them."""

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor: ...

    def parts(self, x: Tensor, sigma: float, /) -> tuple[Tensor, Tensor]:
        """(guided, unguided) x0: what `__call__` gives, and what nothing asked for would give."""
        ...

    def rows(self, start: int, stop: int, /) -> GuidedDenoiser:
        """The same for the images start..stop of the batch alone."""
        ...


@dataclass(frozen=True)
class Unguided:
    """A plain denoiser as a `GuidedDenoiser`: nothing guides it, and it treats every image alike."""

    function: Denoiser

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        return self.function(x, sigma)

    def parts(self, x: Tensor, sigma: float, /) -> tuple[Tensor, Tensor]:
        denoised = self.function(x, sigma)
        return denoised, denoised

    def rows(self, start: int, stop: int, /) -> Unguided:
        return self


ConditionalDenoiser = Callable[[Tensor, float, Conditioning], Tensor]
"""P(x, sigma, cond) -> x0: a denoiser whose conditions are not bound yet; see `Predictor`."""


class Network(Protocol):
    """The network seam: x (b, c, ...) in variance-preserving coordinates, t (b,) float32 -> raw, like x."""

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, /) -> Tensor: ...


@dataclass(frozen=True)
class Prediction:
    """One kind of prediction, in variance-preserving coordinates x = alpha * x0 + sigma * noise.

    target(x0, noise, alpha, sigma) is what the network learns to give; to_x0(raw, x, alpha, sigma) is the
    clean sample that an answer `raw` at `x` means. alpha and sigma are floats or tensors that broadcast.
    """

    name: str
    target: Callable[[Tensor, Tensor, Amplitude, Amplitude], Tensor]
    to_x0: Callable[[Tensor, Tensor, Amplitude, Amplitude], Tensor]


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(  # Ho et al. 2020, eq. 14
        name="eps",
        target=lambda x0, noise, alpha, sigma: noise,
        to_x0=lambda raw, x, alpha, sigma: (x - sigma * raw) / alpha,
    ),
    "v": Prediction(  # Salimans and Ho 2022, appendix D
        name="v",
        target=lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
        to_x0=lambda raw, x, alpha, sigma: alpha * x - sigma * raw,
    ),
    "x0": Prediction(
        name="x0",
        target=lambda x0, noise, alpha, sigma: x0,
        to_x0=lambda raw, x, alpha, sigma: raw,
    ),
}


def paired(name: str, schedule: Schedule) -> Prediction:
    """The prediction of that name, if it can be used with `schedule`; training and sampling both ask here.

    `InputError` for an unknown name, and for eps with zero terminal SNR, where the last timestep shows the
    network nothing but the noise it should predict (Lin et al. 2024, section 3.2).
    """
    if name not in PREDICTIONS:
        raise errors.InputError(f"there is no prediction {name!r}", errors.nearest(name, PREDICTIONS))
    if name == "eps" and schedule.config.zero_terminal_snr:
        raise errors.InputError(
            "a network that predicts eps cannot be used with zero_terminal_snr",
            'Use prediction "v" or "x0", or a schedule without zero_terminal_snr.',
        )
    return PREDICTIONS[name]


class Predictor:
    """A network as a conditional denoiser P(x, sigma, cond) -> x0 in variance-exploding coordinates.

    network: see `Network`; prediction: a name in `PREDICTIONS`; dtype: what the network takes, None for the
    dtype of x. For eps these are k-diffusion's c_skip = 1, c_out = -sigma and c_in = 1 / sqrt(1 + sigma^2).
    """

    def __init__(
        self, network: Network, schedule: Schedule, prediction: str, dtype: torch.dtype | None = None
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.prediction = paired(prediction, schedule)
        self.dtype = dtype

    def __call__(self, x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        """x0 as seen from x = x0 + sigma * noise. x: (b, c, ...) float32; sigma > 0; the result is like x."""
        alpha = 1 / math.sqrt(1 + sigma**2)
        x_vp = x * alpha
        t = torch.full((x.shape[0],), self.schedule.timestep(sigma), dtype=torch.float32, device=x.device)
        raw = self.network(x_vp if self.dtype is None else x_vp.to(self.dtype), t, cond)
        return self.prediction.to_x0(raw.to(x.dtype), x_vp, alpha, sigma * alpha)
