"""The Brownian path of a picture: its law, and that it depends on the seed and the interval alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from sfumato.diffusion.brownian import DEPTH, BrownianNoise, mixed
from sfumato.diffusion.noise import ImageNoise
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import SPACINGS
from sfumato.errors import InputError

CPU = torch.device("cpu")
LOW, HIGH = 0.03, 14.6
COUNT = 20_000  # values per path, each a path of its own: the law is estimated across them


def path(
    *seeds: int, shape: tuple[int, ...] = (4, 8, 8), low: float = LOW, high: float = HIGH
) -> BrownianNoise:
    return BrownianNoise(seeds or (3,), shape, low=low, high=high, device=CPU)


def increment(noise: BrownianNoise, sigma: float, target: float) -> Tensor:
    """W(target) - W(sigma)."""
    return noise(sigma, target).double() * math.sqrt(abs(sigma - target))


def levels(steps: int) -> list[float]:
    """Descending, even in log sigma, both ends of the range among them."""
    return [HIGH * (LOW / HIGH) ** (i / steps) for i in range(steps + 1)]


INTERVALS = [(HIGH, LOW), (HIGH, 11.0), (10.0, 9.99), (1.0, 0.5), (0.0405, 0.04), (0.0301, LOW)]


@pytest.mark.parametrize(("sigma", "target"), INTERVALS)
def test_increments_are_standard_normal(sigma: float, target: float) -> None:
    values = path(shape=(COUNT,))(sigma, target)[0]
    assert values.dtype == torch.float32
    assert values.mean().item() == pytest.approx(0, abs=4 / math.sqrt(COUNT))
    assert values.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / COUNT))
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3


def test_increments_of_a_run_are_independent() -> None:
    """The covariance of 30 steps' noise is the unit matrix, within the error of an estimate of it."""
    noise = path(shape=(COUNT,))
    steps = torch.stack([noise(s, t)[0] for s, t in itertools.pairwise(levels(30))]).double()
    covariance = steps @ steps.T / COUNT
    errors = (covariance - torch.eye(30)).abs() * math.sqrt(COUNT)
    assert errors.max() < 5 * math.sqrt(2)
    assert errors.square().mean() < 1.2  # 1 off the diagonal and 2 on it, if all is independent


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_overlapping_intervals_covary_as_on_one_path(share: float) -> None:
    """What DPM++ SDE relies on: its two draws have the first stretch in common."""
    noise = path(shape=(COUNT,))
    middle = 3.0 + share * (2.0 - 3.0)
    found = (noise(3.0, middle) * noise(3.0, 2.0)).mean().item()
    assert found == pytest.approx(math.sqrt(share), abs=4 * math.sqrt(2 / COUNT))


def test_increments_add_up() -> None:
    whole = path()
    sigma, *inner, target = [5.0, 4.9999, 4.2, 3.7, 1.0, 0.4]
    parts = sum(increment(whole, s, t) for s, t in itertools.pairwise([sigma, *inner, target]))
    torch.testing.assert_close(parts, increment(whole, sigma, target), rtol=0, atol=2e-6)
    assert torch.equal(whole(2.0, 1.0), -whole(1.0, 2.0))


def test_upwards_is_forwards_in_time() -> None:
    """k-diffusion's sign: W(target) - W(sigma), and the whole path is its first draw."""
    first = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(mixed(3, 0)))
    torch.testing.assert_close(path()(LOW, HIGH)[0], first)


def test_the_order_of_questions_does_not_matter() -> None:
    pairs = list(itertools.combinations(levels(6), 2))
    down, other = path(), path()
    first = {pair: down(*pair) for pair in pairs}
    for pair in [*reversed(pairs), *pairs[3::2], *pairs[::3]]:
        assert torch.equal(other(*pair), first[pair])
    assert torch.equal(path()(*pairs[4]), first[pairs[4]])


def test_the_batch_does_not_matter() -> None:
    seeds = [0, 7, -5, 2**63 - 1, 2**64 - 1]
    together = path(*seeds)
    for row, seed in enumerate(seeds):
        alone = path(seed)
        for pair in itertools.pairwise(levels(5)):
            torch.testing.assert_close(together(*pair)[row], alone(*pair)[0], rtol=0, atol=1e-6)


def test_step_counts_share_the_path() -> None:
    coarse, fine = path(), path()
    steps = [increment(fine, s, t) for s, t in itertools.pairwise(levels(40))]
    for i, (sigma, target) in enumerate(itertools.pairwise(levels(8))):
        torch.testing.assert_close(
            sum(steps[5 * i : 5 * i + 5]), increment(coarse, sigma, target), rtol=0, atol=1e-5
        )


SEEDS = [0, 1, 2, -1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 2, -(2**63) + 1]


def test_every_seed_has_a_path_of_its_own() -> None:
    """Seeds that agree in their lower 32 bits are one to torch's generator, but not here."""
    rows = torch.cat(
        [path(*SEEDS, shape=(4000,))(3.0, 2.0), ImageNoise(SEEDS, (4000,), device=CPU).initial()]
    )
    paths = len(SEEDS)
    correlation = torch.corrcoef(rows)[:paths] - torch.eye(2 * paths)[:paths]
    assert correlation.abs().max() < 5 / math.sqrt(4000)


def test_steps_do_not_repeat_other_noise_of_the_picture() -> None:
    fresh = ImageNoise([5], (4000,), device=CPU)
    noise = path(5, shape=(4000,))
    other = [fresh.initial(), *(fresh(1.0, 0.5) for _ in range(5))]
    rows = torch.cat([*(noise(s, t) for s, t in itertools.pairwise(levels(5))), *other])
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 5 / math.sqrt(4000)


def test_hash_spreads_seeds_and_spans() -> None:
    bits = [mixed(seed, number) & 0xFFFFFFFF for seed in (*range(40), 2**32, 2**63) for number in range(100)]
    assert len(set(bits)) >= len(bits) - 1  # a birthday in 2^32 has a chance of 0.2 %
    for bit in range(32):
        assert sum(value >> bit & 1 for value in bits) / len(bits) == pytest.approx(0.5, abs=0.04)


def test_the_path_is_continuous() -> None:
    """A level that another machine rounds differently gets the same noise."""
    for sigma in (10.0, 1.0, 0.05):
        near = path()(math.nextafter(sigma, 0), sigma / 1.5)
        torch.testing.assert_close(near, path()(sigma, sigma / 1.5), rtol=0, atol=1e-4)


def test_times_in_one_leaf_keep_their_variance() -> None:
    """Below the finest division, single values are still right: W(t) has the variance t - low."""
    width = (HIGH / LOW) ** (1 / 2**DEPTH) - 1
    noise = path(shape=(COUNT,))
    for share in (0.1, 0.37, 0.5, 0.83):
        time = 1.0 + share * width
        assert noise(time, LOW).var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / COUNT))


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_spacings_stay_inside(name: str, steps: int) -> None:
    schedule = Schedule(ScheduleConfig())
    noise = path(low=schedule.sigma_min, high=schedule.sigma_max)
    sigmas = [sigma for sigma in SPACINGS[name](schedule, steps).sigmas if sigma > 0]
    assert all(noise(s, t).isfinite().all() for s, t in itertools.pairwise(sigmas))


def test_a_step_costs_few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    draw = BrownianNoise._normal
    monkeypatch.setattr(
        BrownianNoise, "_normal", lambda self, number: calls.append(number) or draw(self, number)
    )
    noise = path()
    for pair in itertools.pairwise(levels(20)):
        noise(*pair)
    assert len(calls) <= 20 * 13


@pytest.mark.parametrize(
    ("sigma", "target"), [(HIGH * 1.01, 1.0), (1.0, LOW * 0.99), (1.0, 0.0), (1.0, 1.0), (math.nan, 1.0)]
)
def test_refused_levels(sigma: float, target: float) -> None:
    with pytest.raises(InputError, match=r"0\.03 \.\. 14\.6"):
        path()(sigma, target)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (1.0, math.inf)])
def test_refused_ranges(low: float, high: float) -> None:
    with pytest.raises(InputError, match="low <= high"):
        path(low=low, high=high)


def test_one_level_is_a_range() -> None:
    """A run of one step to 0 draws nothing, but has its noise."""
    with pytest.raises(InputError, match="different levels"):
        path(low=2.0, high=2.0)(2.0, 2.0)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 3, 7), (2, 3, 4, 5)])
def test_shapes(shape: tuple[int, ...]) -> None:
    assert path(1, 2, 3, shape=shape)(2.0, 1.0).shape == (3, *shape)
