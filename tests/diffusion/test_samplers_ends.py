"""DPM fast and DPM adaptive, which choose their own noise levels between the ends of the given ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.diffusion.prediction import Unguided
from sfumato.diffusion.samplers import (
    SAMPLERS,
    Step,
)
from sfumato.diffusion.samplers.dpm_solver import orders_for


def no_noise(sigma: float, target: float) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def last(steps: object) -> Step:
    return list(steps)[-1]  # pyright: ignore[reportArgumentType, reportCallIssue]


SIGMAS = st.lists(st.floats(1e-3, 200), min_size=2, max_size=12).map(
    lambda values: sorted({round(value, 3) for value in values}, reverse=True)
)


@dataclass
class Recorder:
    """A denoiser and a noise that write down what they were asked for."""

    shape: tuple[int, ...] = (2, 3)

    def __post_init__(self) -> None:
        self.evaluated: list[tuple[float, Tensor]] = []
        self.drawn: list[tuple[float, float]] = []

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        assert isinstance(sigma, float)
        assert sigma > 0
        assert x.dtype == torch.float32
        self.evaluated.append((sigma, x / (1 + sigma**2)))
        return self.evaluated[-1][1]

    def noise(self, sigma: float, target: float) -> Tensor:
        assert 0 < target < sigma
        self.drawn.append((sigma, target))
        return torch.ones(self.shape)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["dpm_fast", "dpm_adaptive"]), SIGMAS, st.booleans(), st.sampled_from([0.0, 0.7]))
def test_samplers_that_read_only_the_ends(
    name: str, positive: list[float], to_zero: bool, eta: float
) -> None:
    row, seen = SAMPLERS[name], Recorder()
    assert row.ends_only
    sigmas = [*positive, 0.0] if to_zero else positive
    start = torch.full((2, 3), positive[0])
    if len(sigmas) < 2:
        assert list(row(Unguided(seen.denoise), start, sigmas, seen.noise)) == []
        return
    steps = list(row(Unguided(seen.denoise), start, sigmas, seen.noise, eta=eta))
    assert [step.index for step in steps] == list(range(len(steps)))
    assert (steps[0].sigma, steps[-1].target) == (positive[0], positive[-1] if len(positive) > 1 else 0.0)
    assert all(step.x.isfinite().all() and step.x.shape == (2, 3) for step in steps)
    assert all(step.x.dtype == torch.float32 for step in steps)
    assert len(positive) > 1 or torch.allclose(steps[-1].x, steps[-1].denoised)
    pairs = [(step.sigma, step.target) for step in steps]
    assert set(seen.drawn) <= {pair for pair in pairs if pair[1] > 0}  # no noise goes below the end
    assert len(seen.drawn) <= len(steps) if eta else not seen.drawn
    if name == "dpm_fast":
        assert len(seen.evaluated) == len(sigmas) - 1
        assert [sigma for _, sigma in pairs[:-1]] == [sigma for sigma, _ in pairs[1:]]
    elif len(positive) > 1:
        assert [sigma for sigma, _ in pairs].count(positive[0]) == 2  # the start of either image


@pytest.mark.parametrize(
    ("evaluations", "orders"),
    [
        (1, [1]),
        (2, [2]),
        (3, [2, 1]),
        (4, [3, 1]),
        (5, [3, 2]),
        (6, [3, 2, 1]),
        (20, [3, 3, 3, 3, 3, 3, 2]),
    ],
)
def test_orders_of_dpm_fast(evaluations: int, orders: list[int]) -> None:
    assert orders_for(evaluations) == orders


def test_dpm_adaptive_steps_each_image_by_itself(mixture: Callable[[Tensor, float], Tensor]) -> None:
    row = SAMPLERS["dpm_adaptive"]
    start = torch.tensor([[9.0, 4.0], [-0.2, 0.1], [-11.0, 30.0]], dtype=torch.float64)
    asked: list[tuple[int, int]] = []

    @dataclass(frozen=True)
    class Rows(Unguided):
        def rows(self, first: int, stop: int, /) -> Unguided:
            asked.append((first, stop))
            return Unguided(mixture)

    def refused(x: Tensor, sigma: float) -> Tensor:
        raise AssertionError("the whole batch was evaluated")

    steps = list(row(Rows(refused), start, [10.0, 0.05, 0.0], no_noise))
    assert asked == [(0, 1), (1, 2), (2, 3)]
    turns = [step.index for step in steps if step.sigma == 10.0]
    assert len(turns) == 3
    for image in range(3):
        alone = list(row(Unguided(mixture), start[image : image + 1], [10.0, 0.05], no_noise))
        stop = turns[image + 1] if image < 2 else len(steps)
        mine = steps[turns[image] : stop]
        assert [(step.sigma, step.target) for step in mine] == [(step.sigma, step.target) for step in alone]
        torch.testing.assert_close(steps[-1].x[image], alone[-1].x[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(steps[-1].denoised[image], alone[-1].denoised[0], rtol=1e-12, atol=1e-12)
        for step in mine:
            assert torch.equal(step.x[image + 1 :], start[image + 1 :])
            assert step.denoised[image + 1 :].abs().sum() == 0
    lengths = {stop - start for start, stop in itertools.pairwise([*turns, len(steps)])}
    assert len(lengths) > 1, "the images do not differ enough to show anything"


def test_dpm_adaptive_counts_its_trials(mixture: Callable[[Tensor, float], Tensor]) -> None:
    evaluated: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        evaluated.append(sigma)
        return mixture(x, sigma)

    def run(**options: float) -> tuple[int, int]:
        evaluated.clear()
        start = torch.tensor([[9.0, 0.2]], dtype=torch.float64)
        steps = list(SAMPLERS["dpm_adaptive"](Unguided(denoise), start, [10.0, 0.05], no_noise, **options))
        return len(steps), len(evaluated)

    steps, evaluations = run(rtol=5.0)  # every trial is good enough
    assert evaluations == 3 * steps
    steps, evaluations = run(h_init=4.0, rtol=1e-3, atol=1e-4)  # far too long: trials are repeated
    assert evaluations > 3 * steps
    assert (evaluations - 3 * steps) % 2 == 0  # a repeated trial keeps its first evaluation
    assert run(rtol=1e-5, atol=1e-6)[0] > 3 * run()[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_dpm_adaptive_ends_where_nothing_is_finite(value: float) -> None:
    evaluated: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        evaluated.append(sigma)
        return torch.full_like(x, value) if sigma < 5 else x * 0.5

    steps = SAMPLERS["dpm_adaptive"](Unguided(denoise), torch.ones(1, 2), [10.0, 0.05], no_noise)
    assert last(steps).target == 0.05
    assert len(evaluated) < 100
