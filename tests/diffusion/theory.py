"""Problems whose answers are known, and what they say of a sampler: orders, local errors, mean and variance.

The data are Gaussian mixtures, so that D(x, sigma) = E[x0 | x] is exact; the probability-flow equation
dx / dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022, eq. 1) is integrated to 13 digits by DOP853.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sfumato.diffusion.prediction import Denoiser, Unguided
from sfumato.diffusion.samplers import SAMPLERS, Sampler, Step
from sfumato.diffusion.schedule import Schedule, ScheduleConfig

Noise = Callable[[float, float], Tensor]
SCHEDULE = Schedule(ScheduleConfig())
HIGH, LOW = 10.0, 0.05  # noise levels of the global problems


@dataclass(frozen=True)
class Mixture:
    """Gaussians in d dimensions. weights: (k,); means: (k, d); axes: (k, d, d), the columns being the
    principal axes of each; variances: (k, d) along them. All float64."""

    weights: Tensor
    means: Tensor
    axes: Tensor
    variances: Tensor

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x0 + sigma * noise = x] for x (b, d), in x's dtype."""
        total = self.variances + sigma**2  # (k, d)
        offsets = torch.einsum("bkd,kde->bke", x.double()[:, None] - self.means, self.axes)
        densities = self.weights.log() - (offsets.square() / total + total.log()).sum(-1) / 2
        centres = self.means + torch.einsum("bke,kde->bkd", offsets * (self.variances / total), self.axes)
        return (densities.softmax(-1)[..., None] * centres).sum(1).to(x.dtype)

    def flow(self, x: Tensor, sigma: float, target: float) -> Tensor:
        """The solution at `target` of the probability-flow equation through x (b, d) float64 at `sigma`."""

        def slope(t: float, flat: np.ndarray) -> np.ndarray:  # in t = log sigma
            at = torch.from_numpy(flat).reshape(x.shape)
            return (at - self.denoise(at, math.exp(t))).numpy().ravel()

        span = (math.log(sigma), math.log(target))
        found = solve_ivp(slope, span, x.numpy().ravel(), "DOP853", rtol=1e-13, atol=1e-14)
        assert found.success, found.message
        return torch.from_numpy(found.y[:, -1].copy()).reshape(x.shape)


def _rotation(angle: float) -> Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)


MIXTURE = Mixture(
    weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    means=torch.tensor([[0.9, 0.2], [-0.8, 0.6], [0.1, -1.1]], dtype=torch.float64),
    axes=torch.stack([_rotation(angle) for angle in (0.3, -0.9, 1.2)]),
    variances=torch.tensor([[0.5, 0.2], [0.3, 0.3], [0.25, 0.6]], dtype=torch.float64),
)
STARTS = 10 * torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Gaussian:
    """Independent normal values N(mean, deviation^2): every sampler is an affine map of its noise here."""

    mean: float
    deviation: float

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x0 + sigma * noise = x]."""
        variance = self.deviation**2
        return (variance * x + sigma**2 * self.mean) / (variance + sigma**2)

    def consistency(self, x: Tensor, sigma: float) -> Tensor:
        """Where the flow through x at `sigma` ends at 0: the perfect consistency model (Song et al. 2023)."""
        return self.mean + (x - self.mean) * self.deviation / math.hypot(self.deviation, sigma)

    def trajectory(self, sigmas: Sequence[float], gamma: float) -> Denoiser:
        """The perfect trajectory model for TCD's steps along `sigmas` (Zheng et al. 2024, section 4).

        Its x0, put into DDIM's step, leads to where the flow does: timestep (1 - gamma) t of the target's t.
        """
        ends = {}
        for sigma, target in itertools.pairwise(sigmas):
            below = SCHEDULE.sigma(math.floor((1 - gamma) * SCHEDULE.timestep(target)))
            ends[sigma] = min(target, below) if gamma > 0 else target

        def denoise(x: Tensor, sigma: float) -> Tensor:
            ratio = ends[sigma] / sigma
            shrink = math.hypot(self.deviation, ends[sigma]) / math.hypot(self.deviation, sigma)
            return (self.mean + (x - self.mean) * shrink - x * ratio) / (1 - ratio)

        return denoise


GAUSSIAN = Gaussian(mean=0.7, deviation=0.5)


def no_noise(sigma: float, target: float) -> Tensor:
    raise AssertionError(f"noise was drawn for the step from {sigma} to {target}")


def last(steps: Iterator[Step]) -> Step:
    """The last step of a run."""
    *_, step = steps
    return step


def rho_grid(high: float, low: float, steps: int) -> list[float]:
    """Karras spacing without the 0 at its end, so that the order of every step counts."""
    a, b = high ** (1 / 7), low ** (1 / 7)
    return [(a + i / steps * (b - a)) ** 7 for i in range(steps + 1)]


def rate(coarse: float, fine: float, refinement: float = 2.0) -> float:
    """The exponent by which an error falls when the step is divided by `refinement`."""
    return math.log(coarse / fine) / math.log(refinement)


def global_errors(row: Sampler, counts: Sequence[int], **options: Any) -> list[float]:
    """Root mean square errors at LOW of runs from exact values at HIGH."""
    found = []
    for count in counts:
        grid = rho_grid(HIGH, LOW, count)
        x = last(row(Unguided(MIXTURE.denoise), STARTS.clone(), grid, no_noise, **options)).x
        found.append((x - ending(HIGH, LOW)).square().mean().sqrt().item())
    return found


_ENDINGS: dict[tuple[float, float], Tensor] = {}


def ending(high: float, low: float) -> Tensor:
    """Where the flow takes STARTS."""
    if (high, low) not in _ENDINGS:
        _ENDINGS[high, low] = MIXTURE.flow(STARTS, high, low)
    return _ENDINGS[high, low]


LEVEL = 1.3  # the noise level at which the measured step begins: the mixture is far from one Gaussian here
ANCHOR = 0.4 * STARTS[:, [1, 0]] / 1.3  # and the places where it begins


def uneven(step: float, before: int, after: int = 3) -> list[float]:
    """Noise levels around LEVEL whose steps in log sigma shrink by 0.8 each, `step` the one from LEVEL."""
    logs = [math.log(LEVEL)]
    for place in range(before):
        logs.insert(0, logs[0] + step / 0.8 ** (place + 1))
    for place in range(after):
        logs.append(logs[-1] - step * 0.8**place)
    return [math.exp(value) for value in logs]


def smooth(step: float, before: int, after: int = 3) -> list[float]:
    """Noise levels around LEVEL, `step` apart in log sigma, so that neighbouring steps grow alike."""
    return [LEVEL * math.exp(step * place) for place in range(before, -after - 1, -1)]


def even(step: float, before: int, after: int = 3) -> list[float]:
    """Noise levels around LEVEL, `step` * LEVEL apart."""
    return [LEVEL * (1 + step * place) for place in range(before, -after - 1, -1)]


def local_errors(
    row: Sampler,
    steps: Sequence[float],
    grid: Callable[[float, int], list[float]] = uneven,
    *,
    before: int = 5,
    **options: Any,
) -> list[float]:
    """Errors of one step from exact values, the steps before it having been made on exact values too.

    x is overwritten in place after every step, so whatever a sampler remembers was evaluated on the
    exact trajectory through ANCHOR at LEVEL. The measured step is not the run's last, which may differ.
    """
    return [_local_error(row, grid(step, before), before, **options) for step in steps]


def _local_error(row: Sampler, sigmas: list[float], place: int, **options: Any) -> float:
    exact = {place: ANCHOR.clone()}
    for index in range(place, 0, -1):
        exact[index - 1] = MIXTURE.flow(exact[index], sigmas[index], sigmas[index - 1])
    exact[place + 1] = MIXTURE.flow(ANCHOR, sigmas[place], sigmas[place + 1])
    for step in row(Unguided(MIXTURE.denoise), exact[0].clone(), sigmas, no_noise, **options):
        if step.index == place:
            return (step.x - exact[place + 1]).square().mean().sqrt().item()
        step.x.copy_(exact[step.index + 1])
    raise AssertionError("the sampler ended before the measured step")


@dataclass(frozen=True)
class Moments:
    """Mean and variance of what a sampler makes of N(mean, deviation^2) data, and how many normal values."""

    mean: float
    variance: float
    draws: int


def moments(
    row: Sampler, sigmas: Sequence[float], denoise: Denoiser = GAUSSIAN.denoise, **options: Any
) -> Moments:
    """Exact mean and variance at the end of a run from N(0, deviation^2 + sigmas[0]^2).

    Steps are affine in every noise. Row 0 of the batch has no noise, row 1 a unit start, and one more row per
    independent normal value. "brownian" noise is made of increments over the finest division of sigma that
    the run asks for, so that what overlaps is correlated as on a path of that clock.
    """
    calls: list[tuple[float, float]] = []
    if row.noise == "brownian":
        for _ in row(Unguided(denoise), STARTS[:1, 0], sigmas, partial(_listen, calls), **options):
            pass
        loads = _brownian(calls)
    else:
        loads = torch.eye(4 * len(sigmas), dtype=torch.float64)  # more than any of them draws
    start = torch.zeros(loads.shape[1] + 2, dtype=torch.float64)
    start[1] = math.hypot(GAUSSIAN.deviation, sigmas[0])
    rows = iter(torch.nn.functional.pad(loads, (2, 0)))
    answers = last(row(Unguided(denoise), start, sigmas, lambda s, t: next(rows), **options)).x
    variance = (answers[1:] - answers[0]).square().sum().item()
    return Moments(answers[0].item(), variance, len(loads) - len(list(rows)))


def _listen(calls: list[tuple[float, float]], sigma: float, target: float) -> Tensor:
    calls.append((sigma, target))
    return torch.zeros(1, dtype=torch.float64)


def _brownian(calls: Sequence[tuple[float, float]]) -> Tensor:
    """Loadings (calls, pieces) of normalised increments of one path over the levels in `calls`."""
    levels = torch.tensor(sorted({level for call in calls for level in call}), dtype=torch.float64)
    highs, lows = torch.tensor(calls, dtype=torch.float64)[..., None].unbind(1)
    inside = (lows <= levels[:-1]) & (levels[1:] <= highs)
    return (inside * levels.diff() / (highs - lows)).sqrt()


def extrapolated(values: Sequence[float]) -> float:
    """The limit of three values at steps h, h/2, h/4 by Aitken's rule: a Richardson step of unknown order."""
    first, second, third = values
    bend = third - 2 * second + first
    return third if bend == 0 else third - (third - second) ** 2 / bend


def deterministic(row: Sampler) -> dict[str, Any] | None:
    """The options with which a row draws no noise, or None where it cannot be without."""
    if not row.stochastic:
        return {}
    amounts: dict[str, Any] = {name: 0.0 for name in ("eta", "gamma") if name in row.options}
    return amounts or None


def solvers() -> dict[str, tuple[Sampler, dict[str, Any]]]:
    """The rows that solve the probability-flow equation on the given levels, with the options for it."""
    found = {name: (row, deterministic(row)) for name, row in SAMPLERS.items() if not row.ends_only}
    return {
        name: (row, {**options, **schedule_option(row)})
        for name, (row, options) in found.items()
        if options is not None
    }


EQUAL_STEPS = {"plms": 4, "ipndm": 4}
"""Rows whose coefficients are those of equal steps in sigma, and their order there; `order` is their order
on levels that are merely smooth."""


def stochastic() -> dict[str, Callable[[int], Moments]]:
    """For every row that draws noise, and for churn, the moments at LOW of a run of that many steps."""
    runs = {name: partial(_moments_of, row) for name, row in SAMPLERS.items() if row.stochastic}
    for name, row in SAMPLERS.items():
        if "s_churn" in row.options:
            runs[f"{name}, s_churn 20"] = partial(_moments_of, row, s_churn=20.0)
        if row.stochastic and "eta" in row.options:
            runs[f"{name}, eta 0.5"] = partial(_moments_of, row, eta=0.5)
        if "gamma" in row.options:
            runs[f"{name}, gamma 1"] = partial(_moments_of, row, gamma=1.0)
    return runs


def _moments_of(row: Sampler, steps: int, **options: Any) -> Moments:
    """LCM and TCD get perfect models of what they expect; a restart's own levels grow with the steps."""
    sigmas, denoise = rho_grid(80.0, LOW, steps), GAUSSIAN.denoise
    options |= schedule_option(row)
    if row is SAMPLERS.get("lcm"):
        denoise = GAUSSIAN.consistency
    elif row is SAMPLERS.get("tcd"):
        denoise = GAUSSIAN.trajectory(sigmas, options.setdefault("gamma", 0.3))
    elif "restarts" in row.options:
        options["restarts"] = ((steps // 4, 2, 0.1, 2.0),)
    return moments(row, sigmas, denoise, **options)


def schedule_option(row: Sampler) -> dict[str, Any]:
    """The schedule, where a row cannot do without."""
    return {"schedule": SCHEDULE} if "schedule" in row.options else {}


ENDS_ONLY = [name for name, row in SAMPLERS.items() if row.ends_only]


def ends_only(name: str, count: int, **options: float) -> tuple[float, float]:
    """(root mean square error at LOW, evaluations for each picture) of a row that chooses its own levels."""
    evaluated = 0

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal evaluated
        evaluated += x.shape[0]
        return MIXTURE.denoise(x, sigma)

    grid = rho_grid(HIGH, LOW, count)
    end = last(SAMPLERS[name](Unguided(denoise), STARTS.clone(), grid, no_noise, **options))
    assert end.target == grid[-1]
    return (end.x - ending(HIGH, LOW)).square().mean().sqrt().item(), evaluated / len(STARTS)
