"""Exponential moving average of weights, its length counted in images (Karras et al. 2022, appendix F)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RAMP_UP = (
    0.05  # the half-life never exceeds this share of the images seen, so early averages forget the start
)


class Ema:
    """Averaged copies of every parameter of `modules`, in float32."""

    def __init__(self, modules: Mapping[str, nn.Module], half_life: int) -> None:
        self.half_life = half_life
        self.live = {
            f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()
        }
        self.average = {name: parameter.detach().clone() for name, parameter in self.live.items()}

    @torch.no_grad()
    def update(self, seen: int, batch: int) -> None:
        """Move the averages towards the live weights after a step of `batch` images; `seen` includes them."""
        half_life = min(self.half_life, seen * RAMP_UP)
        weight = 1 - 0.5 ** (batch / half_life) if half_life > 0 else 1.0
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.live.values()], weight)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within the context the modules carry the averages; afterwards exactly the weights they had."""
        live: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in self.live.items()}
        try:
            for name, parameter in self.live.items():
                parameter.copy_(self.average[name])
            yield
        finally:
            for name, parameter in self.live.items():
                parameter.copy_(live[name])
