"""Every sampler against theory: order of convergence, order of one step, mean and variance."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from theory import (
    ANCHOR,
    ENDS_ONLY,
    EQUAL_STEPS,
    GAUSSIAN,
    HIGH,
    LEVEL,
    LOW,
    MIXTURE,
    STARTS,
    Noise,
    ending,
    ends_only,
    even,
    extrapolated,
    global_errors,
    last,
    local_errors,
    no_noise,
    rate,
    rho_grid,
    smooth,
    solvers,
    stochastic,
    uneven,
)

from sfumato.diffusion.prediction import Denoiser, Unguided
from sfumato.diffusion.samplers import INVERSIONS, SAMPLERS, Sampler, Step
from sfumato.diffusion.samplers.unipc import advance
from sfumato.diffusion.spacing import SPACINGS

SOLVERS = solvers()
STOCHASTIC = stochastic()
VARIANCE = GAUSSIAN.deviation**2 + LOW**2


def test_the_denoiser_is_the_score() -> None:
    """Tweedie's formula: D(x, sigma) = x + sigma^2 grad log p(x; sigma)."""
    x = STARTS.clone().requires_grad_()
    sigma = 1.7
    covariances = MIXTURE.axes @ torch.diag_embed(MIXTURE.variances + sigma**2) @ MIXTURE.axes.mT
    offsets = x[:, None] - MIXTURE.means
    squares = (offsets * torch.linalg.solve(covariances, offsets[..., None])[..., 0]).sum(-1)
    logs = MIXTURE.weights.log() - (squares + torch.logdet(covariances)) / 2
    (score,) = torch.autograd.grad(logs.logsumexp(-1).sum(), x)
    torch.testing.assert_close(MIXTURE.denoise(x, sigma), x + sigma**2 * score, rtol=1e-12, atol=1e-12)


def test_the_flow_is_the_flow() -> None:
    """One Gaussian has a closed flow, and two pieces of a path are the path."""
    one = type(MIXTURE)(
        torch.ones(1, dtype=torch.float64), MIXTURE.means[:1], MIXTURE.axes[:1], MIXTURE.variances[:1]
    )
    along = (STARTS - one.means[0]) @ one.axes[0]
    scale = ((one.variances[0] + LOW**2) / (one.variances[0] + HIGH**2)).sqrt()
    closed = one.means[0] + (along * scale) @ one.axes[0].T
    torch.testing.assert_close(one.flow(STARTS, HIGH, LOW), closed, rtol=1e-11, atol=1e-11)
    halfway = MIXTURE.flow(STARTS, HIGH, 0.7)
    torch.testing.assert_close(MIXTURE.flow(halfway, 0.7, LOW), ending(HIGH, LOW), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", SOLVERS)
def test_global_order(name: str) -> None:
    """At least that of the step it starts with: 2 for all but the rows of first order."""
    row, options = SOLVERS[name]
    errors = global_errors(row, [60, 120, 240], **options)
    assert rate(errors[0], errors[2], 4) > min(row.order, 2) - 0.05, errors
    assert errors[-1] < (1e-2 if row.order == 1 else 1e-4)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "unipc"])
def test_local_order(name: str) -> None:
    """The error of a step with exact history falls with the claimed order + 1, on levels however uneven."""
    row, options = SOLVERS[name]
    errors = local_errors(row, [0.04, 0.02], smooth if name in EQUAL_STEPS else uneven, **options)
    assert errors[-1] > 1e-12  # else rounding is measured
    assert rate(*errors) == pytest.approx(row.order + 1, abs=0.2), errors


@pytest.mark.parametrize("name", EQUAL_STEPS)
def test_local_order_of_equal_steps(name: str) -> None:
    errors = local_errors(SAMPLERS[name], [0.04, 0.02], even)
    assert rate(*errors) == pytest.approx(EQUAL_STEPS[name] + 1, abs=0.2), errors


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["lms", "deis", "ipndm_v"])
def test_local_order_of_fewer_steps(name: str, order: int) -> None:
    errors = local_errors(SAMPLERS[name], [0.04, 0.02], order=order)
    assert rate(*errors) == pytest.approx(order + 1, abs=0.2), errors


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_local_order_of_unipc(variant: str, order: int) -> None:
    """The predictor of order p errs by h^(p + 1), the corrector by h^(p + 2) (Zhao et al. 2023, theorem 3.1).

    The sampler's corrector starts from its own earlier answer, which a caller cannot make exact.
    """
    found: dict[bool, list[float]] = {False: [], True: []}
    for step in (0.04, 0.02):
        levels = uneven(step, 5)
        points = [MIXTURE.flow(ANCHOR, LEVEL, level) if level != LEVEL else ANCHOR for level in levels]
        known = [(level, MIXTURE.denoise(x, level)) for level, x in zip(levels, points, strict=True)]
        passed, ahead = known[5 : 5 - order : -1], known[6]
        for corrected in found:
            told = [*passed, ahead] if corrected else passed
            x = advance(ANCHOR, told, levels[6], variant)
            found[corrected].append((x - points[6]).square().mean().sqrt().item())
    assert rate(*found[False]) == pytest.approx(order + 1, abs=0.2), found
    assert rate(*found[True]) == pytest.approx(order + 2, abs=0.2), found


@pytest.mark.parametrize("order", [2, 3])
def test_global_order_of_unipc(order: int) -> None:
    """Corrected, it converges faster than its predictor, where the end is not of lower order."""
    errors = global_errors(SAMPLERS["unipc"], [60, 120], order=order, lower_order_final=False)
    assert rate(*errors) == pytest.approx(order + 1, abs=0.2), errors


DOCS = Path(__file__).parents[2] / "docs" / "samplers.md"


def test_the_page_names_every_row() -> None:
    page = DOCS.read_text()
    for name in (*SAMPLERS, *INVERSIONS, *SPACINGS):
        assert f"`{name}`" in page, name
    table = page.partition("<!-- orders")[2].partition("<!-- /orders")[0]
    for name in (*SOLVERS, *ENDS_ONLY, *STOCHASTIC):
        assert f"| `{name.partition(',')[0]}`" in table, f"run benchmarks/orders.py: {name} is missing"


def _broken_2m(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """DPM++ 2M that takes its steps for equal."""
    previous = None
    for index, (sigma, target) in enumerate(itertools.pairwise(sigmas)):
        denoised = denoise(x, sigma)
        ahead = denoised if previous is None else denoised + (denoised - previous) / 2
        x, previous = ahead + (x - ahead) * (target / sigma), denoised
        yield Step(index, sigma, target, x, denoised)


def test_a_wrong_coefficient_is_seen() -> None:
    row = Sampler(_broken_2m, 2, 1, False, "karras", "", "")
    errors = local_errors(row, [0.04, 0.02])
    assert rate(*errors) < 2.5


@pytest.mark.parametrize("name", STOCHASTIC)
def test_mean_and_variance(name: str) -> None:
    """Exactly, for Gaussian data: on 100, 200 and 400 steps, and in the limit."""
    found = [STOCHASTIC[name](steps) for steps in (100, 200, 400)]
    errors = [one.variance / VARIANCE - 1 for one in found]
    assert all(one.draws > 0 for one in found)
    assert abs(found[-1].mean - GAUSSIAN.mean) < 2e-3
    assert abs(extrapolated(errors)) < 7e-3, errors
    assert abs(errors[-1]) < max(abs(errors[0]) / 1.7, 4e-3), errors


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if "s_noise" in row.options])
def test_no_noise_of_no_amount(name: str) -> None:
    """Nothing is drawn where it would be multiplied by 0."""
    row = SAMPLERS[name]
    strong = {"s_churn": 20.0} if "s_churn" in row.options else {}
    last(row(Unguided(MIXTURE.denoise), STARTS, rho_grid(HIGH, LOW, 5), no_noise, s_noise=0.0, **strong))


def test_dpm_fast() -> None:
    """As many evaluations as steps were asked for; the last step, of lower order, decides the order."""
    errors = []
    for count in (30, 60, 120):
        error, calls = ends_only("dpm_fast", count)
        assert calls == count
        errors.append(error)
    assert rate(errors[0], errors[-1], 4) > 1.9, errors
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive(order: int) -> None:
    """The error follows the tolerance, and falls with the evaluations at the rate of the lower order."""
    found = [
        ends_only("dpm_adaptive", 10, order=order, rtol=tolerance, atol=tolerance / 10)
        for tolerance in (0.05, 0.005, 0.0005)
    ]
    for (error, _), tolerance in zip(found, (0.05, 0.005, 0.0005), strict=True):
        assert error < 3 * tolerance, found
    (first, few), *_, (end, many) = found
    assert rate(first, end, many / few) > order - 1, found
