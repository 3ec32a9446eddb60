"""AdamW whose two moments take a byte each, quantised in blocks (Dettmers et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

BLOCK = 256  # values that share one scale, so that an outlier coarsens few others
SMALLEST = 4096  # weights with fewer values keep 32-bit moments, as in the paper's own code
DECADES = 7  # powers of ten that the codes span


def dynamic_codes(signed: bool) -> Tensor:
    """(256,) ascending values from -1 or 0 to 1: fine near 1, coarse in each power of ten below.

    The dynamic tree of Dettmers et al. 2022, appendix F.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        ends = torch.linspace(0.1, 1, 2**decade * (1 if signed else 2) + 1, dtype=torch.float64)
        middles = ((ends[:-1] + ends[1:]) / 2 * 10.0 ** (decade - DECADES + 1)).tolist()
        values += middles + ([-value for value in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantised(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """((n,) uint8, scales (ceil(n / 256),)) of (n,) values: the nearest code of value / scale."""
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    middles = (codes[1:] + codes[:-1]) / 2
    chosen = torch.bucketize(blocks / scales.clamp_min(1e-38)[:, None], middles)
    return chosen.flatten()[: len(values)].to(torch.uint8), scales


def restored(chosen: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """(n,) float32 values of what `quantised` gave."""
    return codes[chosen.long()] * scales.repeat_interleave(BLOCK)[: len(chosen)]


class Adam8bit(Optimizer):
    """AdamW with 2 bytes of state a weight instead of 8.

    Unlike the paper it stores the root of the second moment: that spans as many powers of ten as the first
    moment, so no weight has a first moment while its second is rounded to zero.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.codes = {"exp_avg": dynamic_codes(signed=True), "exp_avg_root": dynamic_codes(signed=False)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            first_beta, second_beta = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad.float().reshape(-1)
                step = state.setdefault("step", torch.zeros((), device=parameter.device)).add_(1)
                first = self._moment(state, "exp_avg", gradient).lerp_(gradient, 1 - first_beta)
                second = self._moment(state, "exp_avg_root", gradient).square_()
                root = second.lerp_(gradient.square(), 1 - second_beta).sqrt_()
                self._keep(state, "exp_avg", first)
                self._keep(state, "exp_avg_root", root)
                corrected = root / (1 - second_beta ** float(step)) ** 0.5 + group["eps"]
                update = first / (1 - first_beta ** float(step)) / corrected
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(parameter.shape).to(parameter.dtype), alpha=-group["lr"])

    def _moment(self, state: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        """A copy of the moment in 32 bits, zero before the first step."""
        if name not in state:
            return torch.zeros_like(like)
        if f"{name}_scale" not in state:
            return state[name].clone()
        return restored(state[name], state[f"{name}_scale"], self.codes[name].to(like.device))

    def _keep(self, state: dict[str, Tensor], name: str, value: Tensor) -> None:
        if len(value) < SMALLEST:
            state[name] = value.clone()
        else:
            codes = self.codes[name].to(value.device)
            state[name], state[f"{name}_scale"] = quantised(value, codes)
