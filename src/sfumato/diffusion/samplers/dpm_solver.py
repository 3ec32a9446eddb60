"""DPM-Solver of order 1 to 3, with a given number of evaluations and adaptive (Lu et al. 2022a)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.prediction import Denoiser, GuidedDenoiser
from sfumato.diffusion.samplers.base import Noise, Step, check_choice, noised
from sfumato.diffusion.samplers.first_order import euler, posterior

TINY = 1e-5  # of log sigma: k-diffusion's; what is left of the way is no step, and no step is made shorter
SMALLEST_ERROR = 1e-8  # k-diffusion's, so that an error of 0 can be divided by


def solve_1(denoise: Denoiser, x: Tensor, eps: Tensor, sigma: float, target: float) -> tuple[Tensor, Tensor]:
    """DPM-Solver-1, which is Euler's method (Lu et al. 2022a, eq. 3.7), twice, as it has no lower order."""
    ahead = x + (target - sigma) * eps
    return ahead, ahead


def solve_2(
    denoise: Denoiser, x: Tensor, eps: Tensor, sigma: float, target: float, r1: float = 1 / 2
) -> tuple[Tensor, Tensor]:
    """DPM-Solver-2 and DPM-Solver-1's answer to the same step (Lu et al. 2022a, algorithm 4)."""
    level = sigma * (target / sigma) ** r1
    ahead = x + (level - sigma) * eps
    change = (ahead - denoise(ahead, level)) / level - eps
    first = x + (target - sigma) * eps
    return first + (target - sigma) / (2 * r1) * change, first


def solve_3(denoise: Denoiser, x: Tensor, eps: Tensor, sigma: float, target: float) -> tuple[Tensor, Tensor]:
    """DPM-Solver-3 and the DPM-Solver-2 with r1 = 1/3 within it (Lu et al. 2022a, algorithm 5)."""
    r1, r2 = 1 / 3, 2 / 3
    h = math.log(sigma / target)
    level1, level2 = sigma * math.exp(-r1 * h), sigma * math.exp(-r2 * h)
    ahead = x + (level1 - sigma) * eps
    change1 = (ahead - denoise(ahead, level1)) / level1 - eps
    bend = level2 * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1)
    ahead = x + (level2 - sigma) * eps - bend * change1
    change2 = (ahead - denoise(ahead, level2)) / level2 - eps
    first = x + (target - sigma) * eps
    third = first - target / r2 * (math.expm1(h) / h - 1) * change2
    return third, first + (target - sigma) / (2 * r1) * change1


SOLVERS: dict[int, Callable[[Denoiser, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]] = {
    1: solve_1,
    2: solve_2,
    3: solve_3,
}


def ends(sigmas: Sequence[float]) -> tuple[float, float]:
    """The largest and the smallest positive level, or 0 where there is but one."""
    low = sigmas[-1] if sigmas[-1] > 0 else sigmas[-2]
    return sigmas[0], low if low < sigmas[0] else 0.0


def orders_for(evaluations: int) -> list[int]:
    """Orders of steps that sum to `evaluations`, mostly 3 and at least one less (Lu et al. 2022a, 3.4)."""
    whole, rest = divmod(evaluations, 3)
    return [*[3] * whole, rest] if rest else [*[3] * (whole - 1), 2, 1]


def downward(sigma: float, target: float, low: float, eta: float) -> tuple[float, float]:
    """Ancestral (down, up) that never goes below the end of the grid, as k-diffusion's."""
    down = max(posterior(sigma, target, eta)[0], low)
    return (down, math.sqrt(target**2 - down**2)) if down < target else (target, 0.0)


@dataclass(frozen=True)
class Control:
    """How `dpm_adaptive` chooses its steps; the options are described there.

    coefficients: exponents, times the order, of the accuracy of this trial and of the two before it.
    """

    order: int
    rtol: float
    atol: float
    h_init: float
    coefficients: tuple[float, float, float]
    accept_safety: float
    eta: float
    s_noise: float

    def __post_init__(self) -> None:
        check_choice("order", self.order, (2, 3))
        positive = {
            "atol": self.atol,
            "h_init": self.h_init,
            "pcoeff + icoeff + dcoeff": self.coefficients[0],
        }
        for option, value in positive.items():
            if not 0 < value < math.inf:
                raise errors.InputError(f"the sampler's option {option} is {value:g}; allowed is above 0")
        if not 0 <= self.rtol < math.inf:
            raise errors.InputError(f"the sampler's option rtol is {self.rtol:g}; allowed is 0 or above")
        if not 0 < self.accept_safety <= 1:
            raise errors.InputError(
                f"the sampler's option accept_safety is {self.accept_safety:g}; allowed is above 0, to 1"
            )

    def accuracy(self, before: Tensor, fine: Tensor, coarse: Tensor) -> float:
        """1 / the error of a trial step in units of the tolerance (Lu et al. 2022a, appendix C)."""
        scale = torch.maximum(coarse.abs(), before.abs()).mul(self.rtol).clamp(min=self.atol)
        return 1 / (((fine - coarse) / scale).square().mean().sqrt().item() + SMALLEST_ERROR)

    def factor(self, accuracies: Sequence[float]) -> float:
        """What to multiply the step's length with, softly limited to 0.2 .. 2.6 (k-diffusion's controller).

        Infinity where a value is not finite: no step is good enough then, and the rest is taken at once.
        """
        if not 0 < accuracies[0] < math.inf:
            return math.inf
        order = 1.5 if self.eta > 0 else self.order
        product = 1.0
        for value, coefficient in zip(accuracies, self.coefficients, strict=True):
            product *= value ** (coefficient / order)
        return 1 + math.atan(product - 1)


@torch.no_grad()
def dpm_fast(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """DPM-Solver-fast: len(sigmas) - 1 evaluations on levels even in log sigma (Lu et al. 2022a, 3.4).

    It reads only the ends of `sigmas` and stops at the smallest positive one; a `Step` has up to three
    evaluations. eta, s_noise: ancestral noise, as in k-diffusion's `sample_dpm_fast`.
    """
    if len(sigmas) < 2 or ends(sigmas)[1] == 0:
        yield from euler(denoise, x, sigmas, noise)
        return
    high, low = ends(sigmas)
    orders = orders_for(len(sigmas) - 1)
    levels = [high * (low / high) ** (i / len(orders)) for i in range(len(orders))] + [low]
    for index, (order, (sigma, target)) in enumerate(zip(orders, pairwise(levels), strict=True)):
        denoised = denoise(x, sigma)
        down, up = downward(sigma, target, low, eta)
        x = SOLVERS[order](denoise, x, (x - denoised) / sigma, sigma, down)[0]
        x = noised(x, noise, sigma, target, up * s_noise)
        yield Step(index, sigma, target, x, denoised)


def dpm_adaptive(
    denoise: GuidedDenoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,  # 2 / 256: one step of an 8-bit picture in -1..1
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """DPM-Solver-12 or -23 with steps as long as the tolerance lets them be (Lu et al. 2022a, appendix C).

    It reads only the ends of `sigmas` and stops at the smallest positive one. Each image takes its own
    steps, one image after the other, through `denoise.rows`; `x` and `denoised` of a `Step` are the whole
    batch, its `sigma` and `target` those of the image whose turn it is. Images to come are at sigmas[0], with
    a `denoised` of 0. A trial step takes `order` evaluations; one that is repeated shorter keeps its first.

    order: 2 or 3. rtol, atol: of the difference of two orders, relative to x or absolute. h_init: the first
    trial step, in log sigma. pcoeff, icoeff, dcoeff: weights of the PID control of the step's length, whose
    sum is above 0. accept_safety: in 0..1; steps that should shrink by more are repeated. eta, s_noise:
    ancestral noise. Defaults are k-diffusion's. `InputError` outside these ranges.
    """
    control = Control(
        order=order,
        rtol=rtol,
        atol=atol,
        h_init=h_init,
        coefficients=(pcoeff + icoeff + dcoeff, -(pcoeff + 2 * dcoeff), dcoeff),
        accept_safety=accept_safety,
        eta=eta,
        s_noise=s_noise,
    )
    if len(sigmas) < 2 or ends(sigmas)[1] == 0:
        return euler(denoise, x, sigmas, noise)
    return image_by_image(denoise, x, ends(sigmas), noise, control)


@torch.no_grad()
def image_by_image(
    denoise: GuidedDenoiser, x: Tensor, levels: tuple[float, float], noise: Noise, control: Control
) -> Iterator[Step]:
    """`adapt` for every image of the batch, the others staying as they are."""
    shown, index = torch.zeros_like(x), 0
    for image in range(x.shape[0]):
        rows = slice(image, image + 1)
        for step in adapt(denoise.rows(image, image + 1), x[rows], levels, noise, control, rows):
            x = torch.cat([x[:image], step.x, x[image + 1 :]])
            shown = torch.cat([shown[:image], step.denoised, shown[image + 1 :]])
            yield Step(index, step.sigma, step.target, x, shown)
            index += 1


def adapt(
    denoise: Denoiser,
    x: Tensor,
    levels: tuple[float, float],
    noise: Noise,
    control: Control,
    rows: slice,
) -> Iterator[Step]:
    """Accepted steps of the images `rows`, all alike, from levels[0] to levels[1]."""
    (sigma, low), before, h = levels, x, control.h_init
    accuracies: list[float] = []  # 1 / error: of this trial, the last accepted one, and the one before it
    while sigma > low:
        denoised, accepted = denoise(x, sigma), False
        eps, target, fine, coarse, up = (x - denoised) / sigma, sigma, x, x, 0.0
        while not accepted:
            target = low if h + TINY > math.log(sigma / low) else sigma * math.exp(-h)
            down, up = downward(sigma, target, low, control.eta)
            fine, coarse = SOLVERS[control.order](denoise, x, eps, sigma, down)
            accuracy = control.accuracy(before, fine, coarse)
            accuracies = [accuracy, *(accuracies[1:] or [accuracy, accuracy])]
            factor = control.factor(accuracies)
            accepted = factor >= control.accept_safety or h <= TINY
            h = max(h * factor, TINY)
        accuracies = [accuracies[0], *accuracies[:2]]
        if up * control.s_noise > 0:
            fine = fine + noise(sigma, target)[rows] * (up * control.s_noise)
        yield Step(0, sigma, target, fine, denoised)
        sigma, x, before = target, fine, coarse
