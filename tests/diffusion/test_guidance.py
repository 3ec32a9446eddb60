"""Guidance: exact at its ends, one pass where it can be, the same in batches and one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.guidance import cfg, composed, guided, image_cfg
from sfumato.diffusion.prediction import Predictor
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError

SD1 = Schedule(ScheduleConfig())
SIGMA = 1.7


class CountingNetwork:
    """A network of elementwise float64 arithmetic that reads its condition, and counts its calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert cond.context is not None
        self.batches.append(x.shape[0])
        level = cond.context.mean(dim=(1, 2)) + t / 1000
        return torch.sin(x * 3 + level[:, None, None, None])


@pytest.fixture
def network() -> CountingNetwork:
    return CountingNetwork()


@pytest.fixture
def predictor(network: CountingNetwork) -> Predictor:
    return Predictor(network, SD1, "eps")


def context(seed: int, tokens: int = 5, rows: int = 2) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(context=torch.randn(rows, tokens, 8, generator=generator, dtype=torch.float64))


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
COND, UNCOND, NEGATIVE = context(1), context(2), context(3)


def test_formula_in_one_pass(network: CountingNetwork, predictor: Predictor) -> None:
    cond, uncond = predictor(X, SIGMA, COND), predictor(X, SIGMA, UNCOND)
    network.batches.clear()
    got = guided({"cond": (predictor, COND), "uncond": (predictor, UNCOND)}, cfg(7.5))(X, SIGMA)
    assert network.batches == [4]
    torch.testing.assert_close(got, 7.5 * cond - 6.5 * uncond, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("scale", "alone"), [(0.0, UNCOND), (1.0, COND), (0, UNCOND), (1, COND)])
@pytest.mark.parametrize("batched", [True, False])
def test_exact_at_the_ends(
    network: CountingNetwork, predictor: Predictor, scale: float, alone: Conditioning, batched: bool
) -> None:
    expected = predictor(X, SIGMA, alone)
    network.batches.clear()
    branches = {"cond": (predictor, COND), "uncond": (predictor, UNCOND)}
    assert torch.equal(guided(branches, cfg(scale), batched=batched)(X, SIGMA), expected)
    assert network.batches == ([2] if batched else [1, 1])


def test_negative_prompt_takes_the_place_of_the_empty_one(predictor: Predictor) -> None:
    got = guided({"cond": (predictor, COND), "uncond": (predictor, NEGATIVE)}, cfg(3.0))(X, SIGMA)
    expected = 3 * predictor(X, SIGMA, COND) - 2 * predictor(X, SIGMA, NEGATIVE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    other = guided({"cond": (predictor, COND), "uncond": (predictor, UNCOND)}, cfg(3.0))(X, SIGMA)
    assert (got - other).abs().max() > 0.1


def test_same_on_x0_as_on_the_raw_prediction(network: CountingNetwork) -> None:
    """w*cond + (1-w)*uncond of eps is the notes' formula; the weights sum to 1, so x0 gives the same."""

    def both(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return 3.0 * network(x, t, COND) + (1 - 3.0) * network(x, t, UNCOND)

    one = Predictor(network, SD1, "eps")
    got = guided({"cond": (one, COND), "uncond": (one, UNCOND)}, cfg(3.0))(X, SIGMA)
    torch.testing.assert_close(got, Predictor(both, SD1, "eps")(X, SIGMA, COND), rtol=0, atol=1e-13)


def test_unequal_shapes_run_in_separate_passes(network: CountingNetwork, predictor: Predictor) -> None:
    long = context(4, tokens=9)
    got = guided({"cond": (predictor, long), "uncond": (predictor, UNCOND)}, cfg(2.0))(X, SIGMA)
    assert network.batches == [2, 2]
    expected = 2 * predictor(X, SIGMA, long) - predictor(X, SIGMA, UNCOND)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def test_another_predictor_runs_in_its_own_pass(network: CountingNetwork, predictor: Predictor) -> None:
    other = Predictor(network, SD1, "v")
    got = guided({"cond": (predictor, COND), "uncond": (other, UNCOND)}, cfg(2.0))(X, SIGMA)
    assert network.batches == [2, 2]
    expected = 2 * predictor(X, SIGMA, COND) - other(X, SIGMA, UNCOND)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def test_one_image_and_one_condition_per_call(network: CountingNetwork, predictor: Predictor) -> None:
    branches = {"cond": (predictor, COND), "uncond": (predictor, UNCOND)}
    together = guided(branches, cfg(4.0))(X, SIGMA)
    network.batches.clear()
    got = guided(branches, cfg(4.0), batched=False)(X, SIGMA)
    assert network.batches == [1, 1, 1, 1]
    torch.testing.assert_close(got, together, rtol=0, atol=1e-14)
    for row in range(2):
        single = {name: (one, cond.rows(row, row + 1)) for name, (one, cond) in branches.items()}
        alone = guided(single, cfg(4.0), batched=False)(X[row : row + 1], SIGMA)
        assert torch.equal(alone, got[row : row + 1])


def test_three_branches_and_a_combination_that_looks_at_sigma(
    network: CountingNetwork, predictor: Predictor
) -> None:
    class Interval:
        def needs(self, sigma: float) -> list[str]:
            return ["a", "b", "c"] if sigma > 1 else ["a"]

        def __call__(self, x: Tensor, sigma: float, predictions: dict[str, Tensor]) -> Tensor:
            assert sorted(predictions) == self.needs(sigma)
            return torch.stack(list(predictions.values())).sum(dim=0)

    branches = {"a": (predictor, COND), "b": (predictor, context(5, tokens=2)), "c": (predictor, NEGATIVE)}
    denoise = guided(branches, Interval())  # pyright: ignore[reportArgumentType]
    high, low = denoise(X, 2.0), denoise(X, 0.5)
    assert network.batches == [4, 2, 2]
    expected = sum(predictor(X, 2.0, cond) for _, cond in branches.values())
    torch.testing.assert_close(high, expected, rtol=0, atol=1e-13)
    assert torch.equal(low, predictor(X, 0.5, COND))


def test_without_any_condition() -> None:
    one = Predictor(lambda x, t, cond: x, SD1, "x0")
    denoise = guided({"uncond": (one, Conditioning())}, cfg(0.0))
    torch.testing.assert_close(denoise(X, 1.0), X / 2**0.5)


def test_a_missing_branch_is_named(predictor: Predictor) -> None:
    denoise = guided({"cond": (predictor, COND)}, cfg(2.0))
    with pytest.raises(InputError, match="needs the branch 'uncond'"):
        denoise(X, SIGMA)
    assert torch.equal(guided({"cond": (predictor, COND)}, cfg(1.0))(X, SIGMA), predictor(X, SIGMA, COND))


def test_parts_are_the_guided_and_the_unguided(network: CountingNetwork, predictor: Predictor) -> None:
    denoise = guided({"cond": (predictor, COND), "uncond": (predictor, UNCOND)}, cfg(7.5))
    guided_x0, unguided = denoise.parts(X, SIGMA)
    assert network.batches == [4]
    assert torch.equal(guided_x0, denoise(X, SIGMA))
    torch.testing.assert_close(unguided, predictor(X, SIGMA, UNCOND), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("batched", "passes"), [(True, [4]), (False, [1] * 4)])
def test_parts_evaluate_the_unguided_where_guidance_does_without(
    network: CountingNetwork, predictor: Predictor, batched: bool, passes: list[int]
) -> None:
    branches = {"cond": (predictor, COND), "uncond": (predictor, UNCOND)}
    guided_x0, unguided = guided(branches, cfg(1.0), batched=batched).parts(X, SIGMA)
    assert network.batches == passes
    torch.testing.assert_close(guided_x0, predictor(X, SIGMA, COND), rtol=0, atol=1e-14)
    torch.testing.assert_close(unguided, predictor(X, SIGMA, UNCOND), rtol=0, atol=1e-14)
    network.batches.clear()
    alone = guided({"uncond": (predictor, UNCOND)}, cfg(0.0), batched=batched).parts(X, SIGMA)
    assert torch.equal(alone[0], alone[1]) and sum(network.batches) == 2
    with pytest.raises(InputError, match="needs the branch 'uncond'"):
        guided({"cond": (predictor, COND)}, cfg(1.0)).parts(X, SIGMA)


def test_rows_are_those_images_alone(network: CountingNetwork, predictor: Predictor) -> None:
    denoise = guided({"cond": (predictor, COND), "uncond": (predictor, UNCOND)}, cfg(4.0))
    together = denoise(X, SIGMA)
    network.batches.clear()
    second = denoise.rows(1, 2)
    torch.testing.assert_close(second(X[1:], SIGMA), together[1:], rtol=0, atol=1e-14)
    assert network.batches == [2]
    torch.testing.assert_close(second.parts(X[1:], SIGMA)[0], together[1:], rtol=0, atol=1e-14)
    assert (denoise.rows(0, 1)(X[1:], SIGMA) - together[1:]).abs().max() > 0.01


def test_composed_conditions(network: CountingNetwork, predictor: Predictor) -> None:
    """uncond + scale * sum of weights * (cond_i - uncond), in one pass; those of weight 0 are left out."""
    conds = {"cond": COND, "cond1": NEGATIVE, "cond2": context(6), "uncond": UNCOND}
    x0 = {name: predictor(X, SIGMA, cond) for name, cond in conds.items()}
    network.batches.clear()
    branches = {name: (predictor, cond) for name, cond in conds.items()}
    got = guided(branches, composed(5.0, [0.7, -0.4, 0.0]))(X, SIGMA)
    assert network.batches == [6]
    unguided = x0["uncond"]
    expected = unguided + 5 * (0.7 * (x0["cond"] - unguided) - 0.4 * (x0["cond1"] - unguided))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    assert composed(1.0, [0.3, 0.7]).needs(SIGMA) == ["cond", "cond1"]
    assert len(composed(1.0, [1 / 49] * 49).needs(SIGMA)) == 49  # whose sum is 1 but for rounding
    assert composed(0.0, [0.3, 0.7]).needs(SIGMA) == ["uncond"]
    assert composed(7.5, [1.0]) == cfg(7.5)
    with pytest.raises(InputError, match="no conditions"):
        composed(7.5, [])


def test_guidance_by_text_and_picture(predictor: Predictor) -> None:
    branches = {"cond": (predictor, COND), "image": (predictor, NEGATIVE), "uncond": (predictor, UNCOND)}
    cond, image, uncond = (predictor(X, SIGMA, one) for _, one in branches.values())
    got = guided(branches, image_cfg(7.5, 1.5))(X, SIGMA)
    expected = uncond + 1.5 * (image - uncond) + 7.5 * (cond - image)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    assert image_cfg(7.5, 7.5).needs(SIGMA) == ["cond", "uncond"]
    assert image_cfg(7.5, 1.0).needs(SIGMA) == ["cond", "image"]
