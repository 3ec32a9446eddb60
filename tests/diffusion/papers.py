"""What the papers' updates are written with in tests: variance-preserving coordinates and the noise of a run.

x_t = alpha_t x0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1. Nothing here is shared with the samplers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
OPTIONS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 3, 4, 4)
BAR = 1e-5  # of relative difference from the reference library
EXACT = 1e-11  # of relative difference between two ways to write one update


def draws(count: int) -> list[Tensor]:
    """Normal values, float64, but such that float32 holds them exactly: some schedulers round them."""
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(count, *SHAPE, generator=generator).double())


def play(values: Sequence[Tensor]) -> Callable[[float, float], Tensor]:
    tape = iter(values)
    return lambda sigma, target: next(tape)


def drawn_from(monkeypatch: pytest.MonkeyPatch, scheduler: Any, values: Sequence[Tensor]) -> None:
    tape = iter(values)
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *a, **k: next(tape))


def difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def vp(sigma: float) -> tuple[float, float]:
    """(alpha, sigma) of the papers at a noise level."""
    return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)


def eps_of(denoise: Denoise, x: Tensor, level: float) -> Tensor:
    """The network eps(x_t, t) that means this denoiser."""
    alpha, sigma = vp(level)
    return (x - alpha * denoise(x / alpha, level)) / sigma
