"""Classifier guidance on a mixture of two Gaussians, whose class posterior is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.classifier import (
    ClassProbability,
    classifier_guided,
    log_probability_gradient,
)
from sfumato.diffusion.prediction import Unguided
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError

MEANS, DEVIATIONS, SHARES = (-1.0, 1.5), (0.4, 0.6), (0.7, 0.3)
SCHEDULE = Schedule(ScheduleConfig())
generator = torch.Generator().manual_seed(0)
X = torch.randn(5, 1, dtype=torch.float64, generator=generator) * 2


def log_densities(x: Tensor, sigma: float) -> Tensor:
    """log of share times density of each component at the noise level, (b, 2), of x (b, 1)."""
    mean, deviation, share = (torch.tensor(v, dtype=x.dtype) for v in (MEANS, DEVIATIONS, SHARES))
    variance = deviation**2 + sigma**2
    return share.log() - (x - mean) ** 2 / (2 * variance) - variance.log() / 2 - math.log(2 * math.pi) / 2


def of_class(label: int) -> Unguided:
    """The denoiser of one component, in closed form."""
    mean, variance = MEANS[label], DEVIATIONS[label] ** 2
    return Unguided(lambda x, sigma: (variance * x + sigma**2 * mean) / (variance + sigma**2))


def mixed(x: Tensor, sigma: float) -> Tensor:
    """The denoiser of the mixture: the components' by the chance of each."""
    chances = log_densities(x, sigma).softmax(dim=1)
    each = torch.cat([of_class(label)(x, sigma) for label in (0, 1)], dim=1)
    return (chances * each).sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Posterior:
    """log p(label | x, sigma), exactly; counts how many images each call had."""

    labels: Tensor
    calls: list[int]

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        self.calls.append(x.shape[0])
        return log_densities(x, sigma).log_softmax(dim=1).gather(1, self.labels[:, None]).squeeze(1)

    def rows(self, start: int, stop: int, /) -> Posterior:
        return Posterior(self.labels[start:stop], self.calls)


def posterior(labels: Sequence[int]) -> Posterior:
    return Posterior(torch.tensor(labels), [])


@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0, 40.0])
def test_scale_one_is_the_denoiser_of_the_class(sigma: float) -> None:
    labels = [0, 1, 1, 0, 1]
    got = classifier_guided(Unguided(mixed), posterior(labels), 1.0)(X, sigma)
    expected = torch.stack([of_class(label)(row, sigma) for label, row in zip(labels, X, strict=True)])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_scale_multiplies_what_is_added() -> None:
    plain = mixed(X, 1.2)
    one, three = (classifier_guided(Unguided(mixed), posterior([1] * 5), s)(X, 1.2) for s in (1.0, 3.0))
    torch.testing.assert_close(three - plain, 3 * (one - plain))
    assert (one > plain).all()  # the second component lies to the right


def test_the_eps_form_is_the_papers() -> None:
    """eps - sqrt(1 - abar) * grad, in variance-preserving coordinates (algorithm 2)."""
    sigma = 1.7
    alpha = 1 / math.sqrt(1 + sigma**2)
    x_t = (X * alpha).requires_grad_()
    log_p = log_densities(x_t / alpha, sigma).log_softmax(dim=1)[:, 1].sum()
    (gradient,) = torch.autograd.grad(log_p, x_t)
    deviation = sigma * alpha  # sqrt(1 - abar)
    eps = (X - mixed(X, sigma)) / sigma - 2.5 * deviation * gradient
    expected = (x_t.detach() - deviation * eps) / alpha
    got = classifier_guided(Unguided(mixed), posterior([1] * 5), 2.5)(X, sigma)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("name", "options"), [("ddim", {"eta": 1.0}), ("ddpm", {"variance": "small"})])
def test_the_mean_form_moves_the_mean_by_variance_times_gradient(name: str, options: dict[str, Any]) -> None:
    sigmas, scale = [2.0, 1.1, 0.4], 1.5
    still = lambda sigma, target: torch.zeros_like(X)  # noqa: E731
    unit = lambda sigma, target: torch.ones_like(X)  # noqa: E731
    steered = classifier_guided(Unguided(mixed), posterior([1] * 5), scale, form="mean", sigmas=sigmas)
    first = next(SAMPLERS[name](steered, X, sigmas, still, **options)).x
    mean = next(SAMPLERS[name](mixed, X, sigmas, still, **options)).x
    deviation = next(SAMPLERS[name](mixed, X, sigmas, unit, **options)).x - mean
    gradient = log_probability_gradient(posterior([1] * 5), X, 2.0)
    torch.testing.assert_close(first, mean + scale * deviation**2 * gradient)


def test_both_forms_agree_as_steps_get_small() -> None:
    def difference(target: float) -> float:
        forms = [
            classifier_guided(Unguided(mixed), posterior([1] * 5), 2.0, form=form, sigmas=[1.0, target])
            for form in ("eps", "mean")
        ]
        still = lambda sigma, target: torch.zeros_like(X)  # noqa: E731
        ends = [next(SAMPLERS["euler_a"](each, X, [1.0, target], still)).x for each in forms]
        return float((ends[0] - ends[1]).abs().max())

    assert difference(0.99) < 1.2e-2 * difference(0.9) and difference(0.9) > 1e-3


def test_the_mean_form_ends_without_steering() -> None:
    wanted = posterior([1] * 5)
    steered = classifier_guided(Unguided(mixed), wanted, 2.0, form="mean", sigmas=[2.0, 0.5, 0.0])
    assert torch.equal(steered(X, 0.5), mixed(X, 0.5)) and wanted.calls == []
    gradient = log_probability_gradient(wanted, X, 1.0)
    torch.testing.assert_close(steered(X, 1.0), mixed(X, 1.0) + 2 * 0.5**2 * gradient)  # between two levels


@pytest.mark.parametrize(
    ("name", "form", "steps", "near"),
    [("euler_a", "eps", 150, 0.04), ("heun", "eps", 40, 0.03), ("euler_a", "mean", 200, 0.08)],
)
def test_steered_sampling_draws_the_class(name: str, form: Any, steps: int, near: float) -> None:
    """From the unconditional denoiser and the classifier alone comes the conditional distribution."""
    count, label = 3000, 1
    sigmas = [80 * (0.02 / 80) ** (i / steps) for i in range(steps + 1)]
    rng = torch.Generator().manual_seed(3)

    def noise(sigma: float, target: float) -> Tensor:
        return torch.randn(count, 1, dtype=torch.float64, generator=rng)

    steered = classifier_guided(Unguided(mixed), posterior([label] * count), 1.0, form=form, sigmas=sigmas)
    *_, last = SAMPLERS[name](steered, 80 * noise(80, 80), sigmas, noise)
    assert last.x.mean().item() == pytest.approx(MEANS[label], abs=near)
    assert last.x.std().item() == pytest.approx(DEVIATIONS[label], abs=near)
    *_, last = SAMPLERS[name](mixed, 80 * noise(80, 80), sigmas[::3], noise)
    assert (last.x < 0.2).double().mean().item() == pytest.approx(SHARES[0], abs=0.05), "unsteered: both"


def test_it_works_where_gradients_are_off_and_leaves_x_alone() -> None:
    steered = classifier_guided(Unguided(mixed), posterior([1] * 5), 1.0)
    x = X.clone()
    with torch.no_grad():
        got = steered(x, 1.0)
        assert not torch.is_grad_enabled()
    assert not got.requires_grad and not x.requires_grad and torch.equal(x, X)
    assert torch.equal(got, steered(X, 1.0))


def test_parts_steer_the_guided_one() -> None:
    class Pair(Unguided):
        def parts(self, x: Tensor, sigma: float, /) -> tuple[Tensor, Tensor]:
            return self(x, sigma), self(x, sigma) - 1

    steered = classifier_guided(Pair(mixed), posterior([1] * 5), 2.0)
    guided, unguided = steered.parts(X, 1.0)
    assert torch.equal(guided, steered(X, 1.0)) and torch.equal(unguided, mixed(X, 1.0) - 1)


@pytest.mark.parametrize("batched", [True, False])
def test_rows_and_one_image_at_a_time(batched: bool) -> None:
    wanted = posterior([0, 1, 1, 0, 1])
    steered = classifier_guided(Unguided(mixed), wanted, 2.0, batched=batched)
    whole = steered(X, 1.0)
    assert wanted.calls == ([5] if batched else [1] * 5)
    torch.testing.assert_close(steered.rows(1, 4)(X[1:4], 1.0), whole[1:4])
    if not batched:
        assert torch.equal(steered.rows(2, 3)(X[2:3], 1.0), whole[2:3])


def test_scale_zero_never_asks_the_classifier() -> None:
    wanted = posterior([1] * 5)
    assert torch.equal(classifier_guided(Unguided(mixed), wanted, 0.0)(X, 1.0), mixed(X, 1.0))
    assert wanted.calls == []


def test_a_network_is_asked_in_its_own_coordinates() -> None:
    """A linear network: its logits are known, and so is the gradient, chain rule included."""
    weights = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    times: list[float] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        times.extend(t.tolist())
        assert t.dtype == torch.float32 and t.shape == (x.shape[0],)
        return x @ weights

    sigma = SCHEDULE.sigma(321)
    labels = torch.tensor([0, 1, 2, 0, 1])
    probability = ClassProbability(network, SCHEDULE, labels)
    scaled = X / math.sqrt(1 + sigma**2)
    chances = (scaled @ weights).softmax(dim=1)
    torch.testing.assert_close(probability(X, sigma), chances.gather(1, labels[:, None])[:, 0].log())
    expected = (weights[0, labels] - (chances * weights).sum(dim=1))[:, None] / math.sqrt(1 + sigma**2)
    torch.testing.assert_close(log_probability_gradient(probability, X, sigma), expected)
    assert times == pytest.approx([321.0] * 10)
    torch.testing.assert_close(probability.rows(3, 5)(X[3:5], sigma), probability(X, sigma)[3:5])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "form": ({"form": "men"}, "no form of classifier guidance 'men'"),
    "mean without levels": ({"form": "mean"}, "needs the noise levels"),
    "negative": ({"scale": -1.0}, "is -1.0"),
    "endless": ({"scale": math.inf}, "is inf"),
    "no number": ({"scale": math.nan}, "is nan"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        classifier_guided(Unguided(mixed), posterior([1] * 5), **{"scale": 1.0, **options})
