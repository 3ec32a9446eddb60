"""Training super-resolution: it learns, resumes, writes a file that enlarges; chance comes from places."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.checkpoints.files import read_tensors
from sfumato.checkpoints.upscaler import load_upscaler
from sfumato.errors import InputError
from sfumato.nn.esrgan import CompactConfig, RRDBConfig
from sfumato.training.config import TrainingConfig, read_config
from sfumato.training.data import Position
from sfumato.training.run import make_task
from sfumato.training.settings_upscaler import UpscalerTaskConfig
from sfumato.training.tasks import degradations
from sfumato.training.tasks.degradations import Way
from sfumato.training.tasks.upscaler import UpscalerTask, charbonnier

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[2] / "configs" / "illustrations-upscaler.toml"
Recipe = Callable[..., TrainingConfig]
Trained = Callable[..., Path]
COMPACT = {"num_features": 8, "num_convs": 2, "scale": 2}
RRDB = {"num_features": 4, "num_blocks": 1, "num_growth": 2, "num_upsamplings": 1}
SHORT = {"images": 16, "save_images": 16, "preview_images": 16}


@pytest.fixture
def enlarging(recipe: Recipe, tmp_path: Path) -> Recipe:
    """A function of (folder, upscaler's keys that differ, tables) that gives a recipe."""

    def make(folder: str = "run", upscaler: dict[str, Any] | None = None, **changes: Any) -> TrainingConfig:
        table = {"compact": COMPACT, "smooth_images": 8, **(upscaler or {})}
        return recipe("upscaler", tmp_path / folder, upscaler=table, **changes)

    return make


def task_of(config: TrainingConfig) -> UpscalerTask:
    torch.manual_seed(config.seed)
    task = make_task(config, CPU)
    assert isinstance(task, UpscalerTask)
    return task


def test_it_learns_the_pictures(enlarging: Recipe) -> None:
    config = enlarging(upscaler={"blurred": 0, "packed": 0})
    task = task_of(config)
    order, pictures = next(task.batches(0, 4))
    optimizer = torch.optim.Adam(task.optimized()["upscaler"], lr=1e-2)
    losses = []
    for _ in range(60):
        ((_, loss, _),) = task.losses((order, pictures), 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_finished_file_enlarges(enlarging: Recipe, trained: Trained) -> None:
    config = enlarging(loop=SHORT, name="squares", notices="by nobody")
    path = trained(config)
    loaded = load_upscaler(path)
    assert (loaded.name, loaded.notices, loaded.scale) == ("squares", "by nobody", 2)
    assert loaded.network.config == CompactConfig(**COMPACT)
    written = read_tensors(path)[0]
    newest = max((config.out / "states").glob("[0-9]*"))
    state = read_tensors(newest / "tensors.safetensors")[0]
    for name, value in written.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, state[f"ema.upscaler.{name}"].half())
    assert list((config.out / "previews").glob("*.png"))


def test_a_run_that_stopped_goes_on_as_if_it_had_not(enlarging: Recipe, trained: Trained) -> None:
    loop = {"images": 16, "save_images": 8, "preview_images": 16}
    whole = trained(enlarging("whole", loop=loop, optimizer={"decay": "constant"}))
    for images in (8, 16):
        parts = trained(enlarging("parts", loop={**loop, "images": images}, optimizer={"decay": "constant"}))
    first, second = read_tensors(whole)[0], read_tensors(parts)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_checkpointing_changes_nothing(enlarging: Recipe, trained: Trained) -> None:
    weights = [
        read_tensors(trained(enlarging(folder, loop={**SHORT, "gradient_checkpointing": again})))[0]
        for folder, again in (("a", False), ("b", True))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_esrgans_network_learns_too(enlarging: Recipe, trained: Trained) -> None:
    path = trained(enlarging(upscaler={"compact": None, "rrdb": RRDB}, loop=SHORT))
    assert load_upscaler(path).network.config == RRDBConfig(**RRDB)


def test_small_pictures_follow_from_their_places(enlarging: Recipe, first_stage: Path) -> None:
    path = first_stage / "model.safetensors"
    config = enlarging(
        upscaler={"autoencoder": path, "decoded": 0.5, "latent_noise": 0.5, "crop": 4},
        data={"size": 16, "workers": 0},
    )
    task = task_of(config)
    order, pictures = next(task.batches(0, 10))
    small, large = task.pairs(order, pictures)
    assert small.shape == (10, 3, 4, 4) and large.shape == (10, 3, 8, 8)
    again = task_of(config).pairs(order, pictures)
    assert torch.equal(small, again[0]) and torch.equal(large, again[1])
    # A process that sees every second picture sees what the one that sees all of them does.
    half = task.pairs(order[1::2], pictures[1::2])
    assert torch.allclose(small[1::2], half[0], atol=1.5 / 255) and torch.equal(large[1::2], half[1])
    moved = [Position(4, place.epoch, place.place, place.index) for place in order]
    assert not torch.equal(task.pairs(moved, pictures)[0], small)
    assert torch.equal((small * 255).round() / 255, small) and small.min() >= 0 and small.max() <= 1


@torch.no_grad()
def test_the_crop_of_the_large_picture_is_that_of_the_small_one(enlarging: Recipe) -> None:
    config = enlarging(upscaler={"crop": 4, "blurred": 0, "packed": 0}, data={"size": 16, "workers": 0})
    task = task_of(config)
    order, pictures = next(task.batches(0, 10))
    plain = [p for p, place in enumerate(order) if degradations.drawn(task.options, place).filter == "box"]
    assert plain
    small, large = task.pairs(order, pictures)
    averaged = torch.nn.functional.avg_pool2d(large, 2)
    assert torch.allclose(small[plain], averaged[plain], atol=1 / 255)


def test_ways_have_the_shares_of_the_recipe() -> None:
    options = UpscalerTaskConfig(
        autoencoder="embedded", decoded=0.5, latent_noise=0.2, blurred=0.3, packed=0.0
    )
    ways = [degradations.drawn(options, Position(1, 0, place)) for place in range(400)]
    noise = [way.latent_noise for way in ways if way.latent_noise is not None]
    others = [way for way in ways if way.latent_noise is None]
    assert 0.4 < len(noise) / 400 < 0.6 and 0.15 < max(noise) <= 0.2 and min(noise) < 0.05
    assert 0.2 < sum(way.blur > 0 for way in others) / len(others) < 0.4
    assert all(way.quality is None for way in ways)
    assert {way.turn for way in ways} == set(range(8))
    assert {way.filter for way in others} == set(degradations.FILTERS)
    alone = UpscalerTaskConfig(decoded=1.0)
    assert all(degradations.drawn(alone, Position(1, 0, p)).latent_noise is None for p in range(50))


def test_losses_of_a_small_picture() -> None:
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 16, 16)
    soft = degradations.blurred(picture, 0.8)
    assert soft.shape == picture.shape and soft.var() < 0.5 * picture.var()
    flat = torch.full((3, 16, 16), 0.25)
    assert torch.allclose(degradations.worn(flat, Way(blur=0.8)), flat)
    packed = degradations.worn(picture[0], Way(quality=60))
    assert 0.001 < (packed - picture[0]).abs().mean() < 0.3
    assert torch.allclose(degradations.worn(flat, Way(quality=60)), flat, atol=0.02)
    grey = degradations.worn(picture[0, :1], Way(quality=60))
    assert grey.shape == (1, 16, 16)
    for kind in degradations.FILTERS:
        assert torch.allclose(degradations.smaller(flat[None], 4, kind), flat[None, :, :4, :4], atol=1e-6)


def test_the_eight_turns_differ_and_go_with_the_small_picture() -> None:
    picture = torch.rand(3, 8, 8)
    turns = [degradations.turned(picture, turn) for turn in range(8)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(turns, 2))
    small = degradations.smaller(picture[None], 2)[0]
    for turn, turned in enumerate(turns):
        after = degradations.smaller(turned[None], 2)[0]
        assert torch.allclose(after, degradations.turned(small, turn), atol=1e-6)


def test_a_decoded_picture_is_asked_for_in_its_own_tones() -> None:
    torch.manual_seed(0)
    large = (torch.rand(1, 3, 8, 8) > 0.5).float().repeat_interleave(8, -1).repeat_interleave(8, -2)
    small = degradations.smaller(large, 4)
    assert torch.allclose(degradations.fitted(large, small, small), large, atol=0.05)
    paler = degradations.fitted(large, small, 0.5 * small + 0.2)
    assert torch.allclose(paler, 0.5 * large + 0.2, atol=0.03)
    # What cannot be seen is not asked for.
    lost = degradations.fitted(large, small, torch.full_like(small, 0.3))
    assert torch.allclose(lost, torch.full_like(large, 0.3), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_first_answers_are_nearly_bilinear(enlarging: Recipe, scale: int) -> None:
    compact = {"num_features": 16, "num_convs": 6, "scale": scale}
    task = task_of(enlarging(upscaler={"compact": compact}, data={"size": 24}))
    small = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 24, 24), 2)
    wanted = torch.nn.functional.interpolate(small, scale_factor=scale, mode="bilinear", align_corners=False)
    inside = (..., slice(scale, -scale), slice(scale, -scale))
    assert torch.allclose(task.network(small)[inside], wanted[inside], atol=0.02)


def test_the_loss_is_l1_with_a_bottom_that_has_a_gradient() -> None:
    error = torch.tensor([0.0, 0.5, -1.0], requires_grad=True)
    charbonnier(error, 2e-3).backward()
    gradient: Tensor | None = error.grad
    assert gradient is not None
    assert torch.allclose(gradient, torch.tensor([0.0, 1.0, -1.0]) / 3, atol=1e-4)
    assert charbonnier(error.detach(), 1e-3) == pytest.approx(0.5, abs=1e-3)


def test_the_loss_narrows_with_the_images(enlarging: Recipe) -> None:
    task = task_of(enlarging(upscaler={"smooth_images": 100}))
    error = torch.full((1,), 0.02)
    pictures = next(task.batches(0, 2))
    losses = [float(next(iter(task.losses(pictures, seen)))[1].detach()) for seen in (0, 50, 100, 1000)]
    assert losses[0] < losses[1] < losses[2] == losses[3]
    assert charbonnier(error, 0.1) < 0.1 * 0.02


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "two networks": ({"rrdb": RRDB}, {}, "compact and an RRDB"),
    "channels": ({}, {"data": {"channels": 1}}, "data.channels is 1"),
    "a size that the scale does not divide": ({}, {"data": {"size": 9}}, "multiples of 2"),
    "a crop beyond the picture": ({"crop": 5}, {}, "crop is 5"),
    "oblong pictures as a whole": ({}, {"data": {"size": (8, 12)}}, "cannot be turned"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_do_not_fit_are_refused(enlarging: Recipe, name: str) -> None:
    upscaler, tables, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        make_task(enlarging(upscaler=upscaler, **tables), CPU)


def test_the_shipped_networks_recipe_runs_to_its_end(
    pictures: Path, tmp_path: Path, trained: Trained
) -> None:
    overrides = {
        "data.path": str(pictures), "out": str(tmp_path / "run"), "data.repeats": "{}", "device": "cpu",
        "loop.images": 8, "loop.batch": 4, "upscaler.crop": 8, "loop.preview_images": 8, "data.size": 64,
        "upscaler.compact.num_features": 4, "upscaler.compact.num_convs": 1,
    }  # fmt: skip
    config = read_config(RECIPE, [f"--{key}={value}" for key, value in overrides.items()])
    loaded = load_upscaler(trained(config))
    assert (loaded.name, loaded.scale) == ("illustrations", 4)
