"""Noise belongs to a picture and its seed alone, whatever the seed stands for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.noise import SOURCES, ImageNoise, NoiseConfig, centred, slerp
from sfumato.diffusion.philox import PhiloxGenerator
from sfumato.errors import InputError

CPU = torch.device("cpu")
SHAPE = (4, 3, 5)


def draws(noise: ImageNoise) -> Tensor:
    return torch.stack([noise.initial(), noise(3.0, 2.0), noise(2.0, 1.0)])


def test_independent_of_the_batch() -> None:
    batch = draws(ImageNoise([5, 6, 7], SHAPE, device=CPU))
    assert batch.shape == (3, 3, *SHAPE)
    assert batch.dtype == torch.float32
    for row, seed in enumerate([5, 6, 7]):
        assert torch.equal(batch[:, row : row + 1], draws(ImageNoise([seed], SHAPE, device=CPU)))
    assert torch.equal(batch[:, [2, 0]], draws(ImageNoise([7, 5], SHAPE, device=CPU)))


def test_every_draw_is_new() -> None:
    noise = ImageNoise([1, 2], SHAPE, device=CPU)
    values = [*noise.initial(), *noise(2.0, 1.0), *noise(2.0, 1.0)]
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert torch.equal(noise.initial(), torch.stack(values[:2]))


def test_standard_normal() -> None:
    values = ImageNoise([3], (1000, 200), device=CPU)(1.0, 0.5)
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(1, abs=0.01)


def test_never_the_global_generator() -> None:
    before = torch.get_rng_state()
    first = draws(ImageNoise([1, 2], SHAPE, device=CPU))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(draws(ImageNoise([1, 2], SHAPE, device=CPU)), first)


@pytest.mark.parametrize("shape", [SHAPE, (1, *SHAPE), (2, *SHAPE)])
def test_given_start(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    drawn, given = (ImageNoise([1, 2], SHAPE, device=CPU, start=value) for value in (None, start))
    assert torch.equal(given.initial(), start.float().expand(2, *SHAPE))
    assert torch.equal(
        given(2.0, 1.0), drawn(2.0, 1.0)
    )  # the later noise is the seed's, and is not its start noise


@pytest.mark.parametrize("shape", [(3, *SHAPE), (4, 3, 6), (1,)])
def test_wrong_start(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="start noise has shape"):
        ImageNoise([1, 2], SHAPE, device=CPU, start=torch.zeros(shape))


CONFIGS = {
    "plain": {},
    "philox": {"source": "philox"},
    "delta": {"eta_seed_delta": 31337},
    "variation": {"variation_seed": 40, "variation_strength": 0.3},
    "resize": {"seed_resize": (5, 2)},
    "all": {
        "source": "philox", "eta_seed_delta": -2, "variation_seed": 40, "variation_strength": 0.3,
        "variation_by": "column", "seed_resize": (2, 7),
    },
}  # fmt: skip


def noise(seeds: list[int], **options: Any) -> ImageNoise:
    return ImageNoise(seeds, SHAPE, device=CPU, config=NoiseConfig(**options))


@pytest.mark.parametrize("options", CONFIGS.values(), ids=list(CONFIGS))
def test_every_kind_is_independent_of_the_batch(options: dict[str, Any]) -> None:
    batch = draws(noise([5, 6, 7], **options))
    for row, seed in enumerate([5, 6, 7]):
        own = dict(options)
        if "variation_seed" in own:
            own["variation_seed"] += row
        assert torch.equal(batch[:, row : row + 1], draws(noise([seed], **own)))
    flat = batch.flatten(2)
    pairs = [(a, b) for a in flat.flatten(0, 1) for b in flat.flatten(0, 1) if a is not b]
    assert all(torch.equal(a, b) == (a.data_ptr() == b.data_ptr()) for a, b in pairs)


def test_philox_is_the_generator_of_each_seed() -> None:
    first, second = (PhiloxGenerator(seed) for seed in (3, 4))
    expected = [torch.stack([first.normal(SHAPE), second.normal(SHAPE)]) for _ in range(3)]
    assert torch.equal(draws(noise([3, 4], source="philox")), torch.stack(expected))


@pytest.mark.parametrize("source", SOURCES)
def test_the_delta_changes_the_later_steps_alone(source: str) -> None:
    plain, moved = (draws(noise([5], source=source, eta_seed_delta=delta)) for delta in (0, 100))
    assert torch.equal(plain[0], moved[0])
    draw = SOURCES[source](105)
    assert torch.equal(moved[1:, 0], torch.stack([draw(SHAPE), draw(SHAPE)]))
    assert not torch.equal(plain[1], moved[1])


@pytest.mark.parametrize(("seed", "delta"), [(2**64 - 1, 3), (0, -1), (-(2**63), -1)])
def test_a_delta_beyond_the_seeds_wraps(seed: int, delta: int) -> None:
    wrapped = SOURCES["cpu"]((seed + delta) % 2**64)(SHAPE)
    assert torch.equal(noise([seed], eta_seed_delta=delta)(1.0, 0.5)[0], wrapped)


def test_the_ends_of_a_variation_are_the_two_noises() -> None:
    plain, other = (noise(seeds).initial() for seeds in ([5, 6], [40, 41]))
    for by in ("image", "column"):
        ends = [
            noise([5, 6], variation_seed=40, variation_strength=share, variation_by=by).initial()
            for share in (0.0, 1.0)
        ]
        assert torch.equal(ends[0], plain)
        torch.testing.assert_close(ends[1], other)


def test_a_variation_leaves_the_later_noise_alone() -> None:
    varied = noise([5], variation_seed=40, variation_strength=0.5)
    assert torch.equal(varied(2.0, 1.0), noise([5])(2.0, 1.0))


def test_an_arc_keeps_the_length_and_divides_the_angle() -> None:
    first, second = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    point = slerp(1 / 3, first, second)
    torch.testing.assert_close(point, 3 * torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]]))
    a, b = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    middle = slerp(0.5, a, b)
    assert middle.std().item() == pytest.approx(1, abs=0.02)
    assert torch.lerp(a, b, 0.5).std().item() < 0.75  # which is why it is no line
    # 0.4 of the angle, measured
    angle = torch.acos(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    part = torch.acos(torch.cosine_similarity(a.flatten(), slerp(0.4, a, b).flatten(), dim=0))
    assert float(part / angle) == pytest.approx(0.4, abs=5e-3)


def test_an_arc_for_every_column() -> None:
    a, b = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = slerp(0.3, a, b, axis=1)
    for channel in range(SHAPE[0]):
        for column in range(SHAPE[2]):
            one = slerp(0.3, a[channel, :, column], b[channel, :, column])
            torch.testing.assert_close(together[channel, :, column], one)
    assert not torch.allclose(together, slerp(0.3, a, b))


def test_where_there_is_no_arc_the_line_is_taken() -> None:
    a = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    for b in (a.clone(), a * 1.5, a + 1e-4, -a):
        torch.testing.assert_close(slerp(0.25, a, b), 0.75 * a + 0.25 * b)
    single = slerp(0.25, a[:, :1], a[:, 1:2], axis=1)  # one value a column: each is parallel to the other
    torch.testing.assert_close(single, 0.75 * a[:, :1] + 0.25 * a[:, 1:2])


def test_a_seed_of_another_size_is_centred() -> None:
    full = noise([5]).initial()[0]
    for source in SOURCES:
        own, small = SOURCES[source](5)(SHAPE), SOURCES[source](5)((4, 1, 3))
        resized = noise([5], source=source, seed_resize=(1, 3)).initial()[0]
        assert torch.equal(resized[:, 1:2, 1:4], small)
        around = torch.ones(SHAPE, dtype=torch.bool)
        around[:, 1:2, 1:4] = False
        assert torch.equal(resized[around], own[around])
    large = SOURCES["cpu"](5)((4, 7, 5))
    assert torch.equal(noise([5], seed_resize=(7, 5)).initial()[0], large[:, 2:5])
    assert torch.equal(noise([5], seed_resize=SHAPE[1:]).initial()[0], full)
    assert torch.equal(noise([5], seed_resize=(1, 3))(2.0, 1.0), noise([5])(2.0, 1.0))


def test_what_is_too_large_is_cut_alike_on_both_sides() -> None:
    inner, outer = torch.arange(7.0).reshape(1, 7), -torch.ones(1, 4)
    assert centred(inner, outer).tolist() == [[2, 3, 4, -1]]
    assert centred(inner, -torch.ones(1, 5)).tolist() == [[1, 2, 3, 4, 5]]
    assert centred(torch.ones(1, 2), torch.zeros(1, 5)).tolist() == [[0, 1, 1, 0, 0]]


def test_a_varied_seed_of_another_size() -> None:
    small = noise([5], seed_resize=(1, 3), variation_seed=9, variation_strength=0.5).initial()[0, :, 1:2, 1:4]
    draw = SOURCES["cpu"]
    torch.testing.assert_close(small, slerp(0.5, draw(5)((4, 1, 3)), draw(9)((4, 1, 3))))


def test_a_given_start_is_neither_varied_nor_resized() -> None:
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    config = NoiseConfig(variation_seed=1, variation_strength=0.5, seed_resize=(9, 9))
    given = ImageNoise([1, 2], SHAPE, device=CPU, start=start, config=config)
    assert torch.equal(given.initial(), start.expand(2, *SHAPE))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "source": ({"source": "gpu"}, "no source of noise 'gpu'"),
    "kind": ({"variation_by": "row"}, "no kind of variation 'row'"),
    "too strong": ({"variation_seed": 1, "variation_strength": 1.5}, "variation_strength is 1.5"),
    "towards nothing": ({"variation_strength": 0.5}, "no variation_seed"),
    "an empty side": ({"seed_resize": (0, 8)}, r"seed_resize is \(0, 8\)"),
    "no sides": ({"seed_resize": ()}, r"seed_resize is \(\)"),
    "one side": ({"seed_resize": (8,)}, "have 2 sides"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        noise([1], **options)
