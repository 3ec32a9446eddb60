"""Adaptive projected guidance against the reference library, its memory; Perp-Neg against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from torch import Tensor

from sfumato.diffusion.guidance import cfg
from sfumato.diffusion.guidance_projection import along, apg, perp_neg
from sfumato.errors import InputError

SIGMAS = (9.0, 4.0, 1.5, 0.4)


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = seeded(0, 3, 4, 6, 5)


def predictions(step: int) -> dict[str, Tensor]:
    return {name: seeded(10 * step + i, *X.shape) for i, name in enumerate(("cond", "uncond", "negative"), 1)}


@pytest.mark.parametrize("norm_threshold", [0.0, 6.0, 1000.0])
@pytest.mark.parametrize(("eta", "momentum"), [(0.0, -0.5), (0.3, -0.75), (1.0, 0.0)])
def test_a_run_equals_the_reference(norm_threshold: float, eta: float, momentum: float) -> None:
    combine, buffer = apg(7.5, eta, norm_threshold, momentum), MomentumBuffer(momentum)
    for step, sigma in enumerate(SIGMAS):
        x0 = predictions(step)
        expected = normalized_guidance(
            x0["cond"], x0["uncond"], 6.5, buffer if momentum else None, eta, norm_threshold, True
        )
        torch.testing.assert_close(combine(X, sigma, x0), expected, rtol=1e-11, atol=1e-11)


def test_it_is_plain_guidance_without_projection_threshold_and_momentum() -> None:
    x0 = predictions(0)
    got = apg(7.5, eta=1.0, norm_threshold=0.0, momentum=0.0)(X, 1.0, x0)
    torch.testing.assert_close(got, cfg(7.5)(X, 1.0, x0), rtol=1e-12, atol=1e-12)


def test_nothing_along_the_condition_is_added() -> None:
    x0 = predictions(0)
    added = (apg(7.5, eta=0.0)(X, 1.0, x0) - x0["cond"]).flatten(1)
    assert added.norm(dim=1).min() > 1
    torch.testing.assert_close(
        (added * x0["cond"].flatten(1)).sum(dim=1), torch.zeros(3).double(), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize(("scale", "name"), [(1.0, "cond"), (0.0, "uncond")])
def test_a_scale_of_one_branch_is_that_branch(scale: float, name: str) -> None:
    combine, x0 = apg(scale), predictions(0)
    assert list(combine.needs(1.0)) == [name]
    assert torch.equal(combine(X, 1.0, {name: x0[name]}), x0[name])


def test_a_level_evaluated_again_counts_once() -> None:
    """As second-order samplers do, and runs that repeat a step in a wider number format."""
    once, twice = apg(7.5), apg(7.5)
    for step, sigma in enumerate(SIGMAS):
        twice(X, sigma, predictions(100 + step))
        expected, got = once(X, sigma, predictions(step)), twice(X, sigma, predictions(step))
        assert torch.equal(got, expected)


def test_values_that_are_not_finite_are_forgotten_when_the_step_is_repeated() -> None:
    combine, clean = apg(7.5), apg(7.5)
    for one in (combine, clean):
        one(X, 9.0, predictions(0))
    combine(X, 4.0, {name: value * torch.nan for name, value in predictions(1).items()})
    assert torch.equal(combine(X, 4.0, predictions(1)), clean(X, 4.0, predictions(1)))


def test_each_run_has_its_own_memory() -> None:
    first, second = apg(7.5), apg(7.5)
    first(X, 9.0, predictions(0))
    expected = apg(7.5)(X, 4.0, predictions(1))
    assert torch.equal(second(X, 4.0, predictions(1)), expected)
    assert (first(X, 4.0, predictions(1)) - expected).abs().max() > 0.01
    with pytest.raises(InputError, match="remembers a run of shape"):
        first(X[:1], 1.0, {name: value[:1] for name, value in predictions(2).items()})


@pytest.mark.parametrize(("norm_threshold", "momentum"), [(-1.0, -0.5), (5.0, 1.0), (5.0, -1.0)])
def test_impossible_numbers_are_refused(norm_threshold: float, momentum: float) -> None:
    with pytest.raises(InputError):
        apg(7.5, 0.0, norm_threshold, momentum)


@pytest.mark.parametrize(("scale", "neg_scale"), [(7.5, 1.0), (4.0, 0.6), (1.0, 2.0)])
def test_perpendicular_negative(scale: float, neg_scale: float) -> None:
    x0 = predictions(0)
    got = perp_neg(scale, neg_scale)(X, 1.0, x0).numpy()
    for i in range(3):
        cond, uncond, negative = (x0[name][i].numpy().ravel() for name in ("cond", "uncond", "negative"))
        towards, unwanted = cond - uncond, negative - uncond
        rest = unwanted - np.dot(unwanted, towards) / np.dot(towards, towards) * towards
        expected = uncond + scale * towards - scale * neg_scale * rest
        np.testing.assert_allclose(got[i].ravel(), expected, rtol=1e-11, atol=1e-12)


def test_a_negative_prompt_like_the_prompt_does_nothing() -> None:
    """Its difference has no part perpendicular to that of the prompt."""
    x0 = predictions(0)
    x0["negative"] = x0["uncond"] + 2 * (x0["cond"] - x0["uncond"])
    torch.testing.assert_close(perp_neg(7.5, 1.0)(X, 1.0, x0), cfg(7.5)(X, 1.0, x0), rtol=1e-10, atol=1e-10)


def test_perpendicular_negative_needs_what_it_uses() -> None:
    assert set(perp_neg(7.5, 1.0).needs(1.0)) == {"cond", "uncond", "negative"}
    assert list(perp_neg(7.5, 0.0).needs(1.0)) == ["cond", "uncond"]
    assert list(perp_neg(0.0, 1.0).needs(1.0)) == ["uncond"]
    assert list(perp_neg(1.0, 0.0).needs(1.0)) == ["cond"]
    x0 = predictions(0)
    assert torch.equal(perp_neg(0.0, 1.0)(X, 1.0, {"uncond": x0["uncond"]}), x0["uncond"])
    torch.testing.assert_close(perp_neg(7.5, 0.0)(X, 1.0, x0), cfg(7.5)(X, 1.0, x0))


def test_a_projection_on_nothing_is_nothing() -> None:
    assert torch.equal(along(X, torch.zeros_like(X)), torch.zeros_like(X))
