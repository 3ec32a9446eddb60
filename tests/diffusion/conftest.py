"""A data distribution whose denoiser is known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def mixture() -> Callable[[Tensor, float], Tensor]:
    """The denoiser of a nonlinear case: values -1 and 1 with equal chances, blurred by 0.3."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        total = 0.3**2 + sigma**2
        return (0.3**2 * x + sigma**2 * torch.tanh(x / total)) / total

    return denoise
