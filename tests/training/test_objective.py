"""The objective: weights and losses by their papers, and chance that hangs on nothing but the place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]
from diffusers.training_utils import compute_snr
from torch import Tensor

from sfumato.diffusion.prediction import PREDICTIONS
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError
from sfumato.training.data import Position
from sfumato.training.objective import (
    Drawn,
    ObjectiveConfig,
    check,
    drawn,
    drawn_batch,
    errors,
    losses,
    noised,
    schedule_warning,
    weighting_warning,
    weights,
)

SCHEDULE = Schedule(ScheduleConfig())
NOTES = ScheduleConfig("linear", 200, 1e-4, 0.02)
TIMES = torch.tensor([0, 100, 400, 700, 999])
SHAPE = (3, 4, 4)


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def objective(**values: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(values)


def chance(t: Tensor = TIMES) -> Drawn:
    noise = seeded(1, len(t), *SHAPE)
    return Drawn(noise, noise, t)


def many(count: int = 2000, **values: Any) -> Drawn:
    places = [Position(0, 0, place) for place in range(count)]
    return drawn_batch(objective(**values), SCHEDULE, places, SHAPE)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_is_that_of_the_reference_scripts(prediction: str) -> None:
    snr = compute_snr(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), TIMES)
    least = snr.clamp(max=5)
    expected = {"eps": least / snr, "v": least / (snr + 1), "x0": least}[prediction]
    found = weights(objective(prediction=prediction, weighting="min_snr"), SCHEDULE, TIMES)
    assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "power"),
    [({"weighting": "p2", "p2_k": 2.0, "p2_gamma": 0.5}, -0.5), ({"weighting": "debiased"}, None)],
)
def test_weights_of_the_noise_by_their_papers(values: dict[str, Any], power: float | None) -> None:
    abar = SCHEDULE.alphas_cumprod[TIMES]
    snr = abar / (1 - abar)
    expected = 1 / snr.sqrt() if power is None else (2.0 + snr) ** power
    assert torch.allclose(weights(objective(**values), SCHEDULE, TIMES).double(), expected, rtol=1e-5)
    assert torch.equal(weights(objective(), SCHEDULE, TIMES), torch.ones(5))


@pytest.mark.parametrize("weighting", ["min_snr", "p2", "debiased"])
def test_a_weighting_means_the_same_for_every_prediction(weighting: str) -> None:
    clean, guess, drawing = seeded(2, 5, *SHAPE), seeded(3, 5, *SHAPE), chance()
    alpha, sigma = SCHEDULE.alpha_sigma(TIMES, clean)
    x = noised(SCHEDULE, clean, drawing)
    noise = (x - alpha * guess) / sigma  # what the guess of x0 means for eps
    found = []
    for name, prediction in PREDICTIONS.items():
        config = objective(prediction=name, weighting=weighting)
        raw = prediction.target(guess, noise, alpha, sigma)
        found.append(losses(config, SCHEDULE, raw, clean, drawing))
    assert torch.allclose(found[0], found[1], rtol=2e-3) and torch.allclose(found[1], found[2], rtol=2e-3)


def test_losses_by_their_formulas() -> None:
    clean, raw, drawing = seeded(2, 5, *SHAPE), seeded(3, 5, *SHAPE), chance()
    difference = (raw - drawing.noise).flatten(1)
    assert torch.allclose(errors(objective(), SCHEDULE, raw, clean, drawing), difference.square().mean(1))
    assert torch.allclose(
        errors(objective(loss="l1"), SCHEDULE, raw, clean, drawing), difference.abs().mean(1)
    )
    far = errors(objective(loss="huber", huber_delta=1e-4), SCHEDULE, raw, clean, drawing)
    assert torch.allclose(far / 2e-4, difference.abs().mean(1), rtol=1e-3), "far from zero it is L1"
    near = drawing.noise + 1e-3 * raw
    found = errors(objective(loss="huber", huber_delta=1), SCHEDULE, near, clean, drawing)
    assert torch.allclose(found, 1e-6 * raw.square().flatten(1).mean(1), rtol=0.1), "near zero it is L2"


@pytest.mark.parametrize("schedule", ["exponential", "snr"])
def test_the_delta_of_huber_falls_with_the_noise(schedule: str) -> None:
    clean = torch.zeros(2, *SHAPE)
    drawing = Drawn(clean, clean, torch.tensor([0, 999]))
    config = objective(loss="huber", huber_schedule=schedule, huber_delta=0.01)
    first, last = errors(config, SCHEDULE, clean + 100, clean, drawing).tolist()
    assert first > 150 and last < 25, "2 delta |error|"


def test_chance_hangs_on_the_place_alone() -> None:
    config = objective(offset_noise=0.1, input_perturbation=0.1, timesteps="logit_normal")
    first = drawn(config, SCHEDULE, Position(0, 1, 2, 3), SHAPE)
    torch.randn(5)
    again = drawn(config, SCHEDULE, Position(0, 1, 2, 3), SHAPE)
    other = drawn(config, SCHEDULE, Position(0, 1, 3, 3), SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.noise, other.noise)
    batch = drawn_batch(config, SCHEDULE, [Position(0, 1, 3, 3), Position(0, 1, 2, 3)], SHAPE)
    assert torch.equal(batch.noise[1], first.noise) and torch.equal(batch.shown[1], first.shown)
    assert torch.equal(batch.t, torch.stack([other.t, first.t]))


def test_offset_noise_moves_whole_channels() -> None:
    plain, offset = many(), many(offset_noise=0.5)
    moved = (offset.noise - plain.noise).flatten(2)
    assert torch.allclose(moved.std(2), torch.zeros(()), atol=1e-6)
    assert moved[..., 0].std().item() == pytest.approx(0.5, rel=0.05)
    assert offset.shown is offset.noise and torch.equal(offset.t, plain.t)


def test_perturbed_noise_is_shown_and_not_asked_for() -> None:
    plain, perturbed = many(), many(input_perturbation=0.1)
    assert torch.equal(plain.noise, perturbed.noise)
    assert (perturbed.shown - perturbed.noise).std().item() == pytest.approx(0.1, rel=0.05)
    clean = torch.zeros(2000, *SHAPE)
    assert torch.equal(errors(objective(), SCHEDULE, perturbed.noise, clean, perturbed), torch.zeros(2000))
    x = noised(SCHEDULE, clean, perturbed)
    assert not torch.equal(x, noised(SCHEDULE, clean, plain))


def test_timesteps() -> None:
    every = many(8000).t
    assert every.min() <= 2 and every.max() >= 997 and abs(every.float().mean() - 499.5) < 12
    low = many(timestep_range=(200, 209)).t
    assert set(low.tolist()) == set(range(200, 210))
    logit = many(timesteps="logit_normal", logit_mean=0.5, logit_std=0.8).t.double()
    share = (logit + 0.5) / 1000
    found = (share / (1 - share)).log()
    assert found.mean().item() == pytest.approx(0.5, abs=0.06)
    assert found.std().item() == pytest.approx(0.8, abs=0.04)
    both = many(timesteps="logit_normal", logit_std=9.0, timestep_range=(10, 19)).t
    assert set(both.tolist()) == set(range(10, 20))


@pytest.mark.parametrize("given", [(5, 1000), (-1, 5), (7, 6)])
def test_timesteps_that_are_not_there(given: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="timestep_range is"):
        check(objective(timestep_range=given), SCHEDULE)


def test_the_last_timestep_of_zero_terminal_snr() -> None:
    schedule = Schedule(ScheduleConfig(zero_terminal_snr=True))
    with pytest.raises(InputError, match="eps cannot"):
        check(objective(), schedule)
    drawing = chance()
    for prediction in ("v", "x0"):
        config = objective(prediction=prediction, weighting="min_snr")
        check(config, schedule)
        found = losses(config, schedule, seeded(3, 5, *SHAPE), seeded(2, 5, *SHAPE), drawing)
        assert bool(torch.isfinite(found).all())
    shown = noised(schedule, seeded(2, 5, *SHAPE), drawing)
    assert torch.allclose(shown[4], drawing.noise[4], atol=1e-3), "nothing but noise"


def test_a_schedule_that_ends_too_early_is_told_with_what_helps() -> None:
    text = schedule_warning(Schedule(NOTES))
    assert text is not None and "36%" in text
    for remedy, changed in {
        "schedule.zero_terminal_snr = true": ScheduleConfig(
            "linear", 200, 1e-4, 0.02, zero_terminal_snr=True
        ),
        "schedule.beta_end = 0.1": ScheduleConfig("linear", 200, 1e-4, 0.1),
        "schedule.num_timesteps = 1000": ScheduleConfig("linear", 1000, 1e-4, 0.02),
    }.items():
        assert remedy in text and schedule_warning(Schedule(changed)) is None
    assert schedule_warning(SCHEDULE) is None


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("weighting", ["min_snr", "p2", "debiased"])
def test_a_weighting_that_undoes_zero_terminal_snr_is_told(weighting: str, prediction: str) -> None:
    schedule = Schedule(ScheduleConfig(zero_terminal_snr=True))
    config = objective(prediction=prediction, weighting=weighting)
    assert float(weights(config, schedule, torch.tensor([999]))) < 1e-3
    text = weighting_warning(config, schedule)
    assert text is not None and weighting in text and 'diffusion.weighting = "none"' in text
    assert weighting_warning(config, SCHEDULE) is None
    assert weighting_warning(objective(prediction=prediction), schedule) is None
    partly = objective(prediction=prediction, weighting=weighting, timestep_range=(0, 500))
    assert weighting_warning(partly, schedule) is None, "the last timestep is left to another"
