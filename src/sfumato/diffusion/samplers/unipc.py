"""UniPC: a multistep predictor whose every step is corrected by the next evaluation (Zhao et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.diffusion.prediction import Denoiser
from sfumato.diffusion.samplers.base import Noise, Step, check_choice
from sfumato.diffusion.samplers.multistep import lagrange_integrals

VARIANTS = {"bh1": lambda h: h, "bh2": lambda h: -math.expm1(-h)}  # |B(h)|, Zhao et al. 2023, section 3.1


def unipc(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    variant: str = "bh2",
    order: int = 2,
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """UniPC on x0 (Zhao et al. 2023, algorithms 5 to 8).

    order: of the predictor, 1 to 3; the corrector's is one higher and costs no evaluation. 2 is the authors'
    advice for guided sampling, 3 for unguided. variant: B(h), "bh1" for few steps unguided, else "bh2"; see
    `weights`. lower_order_final: end with orders 2 and 1, which is steadier on few steps.
    """
    check_choice("variant", variant, VARIANTS)
    check_choice("order", order, range(1, 4))
    return _unipc(denoise, x, sigmas, variant=variant, order=order, lower_order_final=lower_order_final)


@torch.no_grad()
def _unipc(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    variant: str,
    order: int,
    lower_order_final: bool,
) -> Iterator[Step]:
    history: list[tuple[float, Tensor]] = []
    start, used = x, 0
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if history:
            x = advance(start, [*history[:used], (sigma, denoised)], sigma, variant)
        history = [(sigma, denoised), *history][:order]
        start, used = x, min(len(history), len(sigmas) - 1 - index if lower_order_final else order)
        x = advance(start, history[:used], target, variant) if target > 0 else denoised
        yield Step(index, sigma, target, x, denoised)


def advance(x: Tensor, known: Sequence[tuple[float, Tensor]], target: float, variant: str) -> Tensor:
    """x at `target` from x at known[0]'s level, by the x0 `known` at some levels (Zhao et al. 2023, eq. 9).

    The predictor knows x0 at levels passed, the corrector also at the target.
    """
    sigma, denoised = known[0]
    result = denoised + (x - denoised) * (target / sigma)
    amounts = weights([level for level, _ in known], target, variant)
    for amount, (_, other) in zip(amounts, known[1:], strict=True):
        result = result + amount * (other - denoised)
    return result


def weights(levels: Sequence[float], target: float, variant: str) -> list[float]:
    """What the x0 at levels[1:] count for, each less the one at levels[0], in the step from it to target.

    They are the integrals of the polynomial in log sigma through the x0: B(h) cancels out of the equations
    for them (Zhao et al. 2023, eq. 11), except that a single one is taken to be B(h) / 2 (appendix F).
    """
    h = math.log(levels[0] / target)
    if len(levels) == 2:
        return [VARIANTS[variant](h) / 2 * h / math.log(levels[0] / levels[1])]
    logs = [math.log(level / target) for level in levels]
    return [-weight for weight in lagrange_integrals(logs, h, 0.0, growth=-1.0)[1:]]
