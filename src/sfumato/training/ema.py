"""Exponential moving average of weights, its length counted in images (Karras et al. 2022, appendix F)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sfumato.training.sharding import local

RAMP_UP = 0.05  # the half-life is at most this share of the images seen, so early averages forget the start


class Ema:
    """Averaged copies of every parameter of `modules`, in the parameters' own dtype, sharded as they are.

    half_life: images after which a weight's share in the average has halved; 0 keeps the newest weights.
    """

    def __init__(self, modules: Mapping[str, nn.Module], half_life: int) -> None:
        self.half_life = half_life
        self.live = {
            f"{part}.{name}": parameter
            for part, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        self.average = {name: parameter.detach().clone() for name, parameter in self.live.items()}

    @torch.no_grad()
    def update(self, seen: int, batch: int) -> None:
        """Move the averages towards the live weights after a step of `batch` images; `seen` includes them."""
        half_life = min(self.half_life, seen * RAMP_UP)
        kept = 0.5 ** (batch / half_life) if half_life > 0 else 0.0
        averages = [local(average) for average in self.average.values()]
        get_ema_multi_avg_fn(kept)(averages, [local(live) for live in self.live.values()], 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the modules carry the averages; afterwards exactly the weights they had."""
        weights = {name: parameter.detach().clone() for name, parameter in self.live.items()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(weights)

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.live.items():
            local(parameter).copy_(local(values[name]))
