"""Every kind of denoiser from scratch: it learns, finished it draws, and what it is told is as asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sfumato
from sfumato import Request, generate
from sfumato.checkpoints.load import load_file
from sfumato.cli import main
from sfumato.conditioning import Conditioning
from sfumato.errors import DataError, InputError
from sfumato.training.config import TrainingConfig
from sfumato.training.data import Position, open_dataset, to_tensor
from sfumato.training.masks import random_mask
from sfumato.training.run import make_task
from sfumato.training.tasks.conditions import Labels
from sfumato.training.tasks.diffusion import DiffusionTask
from sfumato.training.tasks.shown import Inpainting, SmallPicture, StretchedPicture

CPU = torch.device("cpu")
Recipe = Callable[..., TrainingConfig]
Trained = Callable[..., Path]
SHORT = {"images": 8, "save_images": 8, "preview_images": 8}
KINDS: dict[str, dict[str, Any]] = {
    "unconditional": {"text": None, "unet": {"context_dim": None}, "diffusion": {"prompts": ()}},
    "text": {},
    "classes": {"text": None, "diffusion": {"prompts": (), "classes": "context"}},
    "labels": {
        "text": None, "unet": {"context_dim": None},
        "diffusion": {"prompts": (), "classes": "vector", "label_dropout": 0.5},
    },
    "inpainting": {"unet": {"in_channels": 5}, "diffusion": {"concat": "inpainting"}},
    "super-resolution": {
        "text": None, "unet": {"in_channels": 5, "context_dim": None},
        "diffusion": {"prompts": (), "concat": "super_resolution", "small_noise": 0.1},
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 8 pixels in sub-folders "blue" and "red"."""
    root = tmp_path_factory.mktemp("classes")
    for index, (name, colour) in enumerate([("red", (220, 30, 20)), ("blue", (20, 40, 210))] * 6):
        (root / name).mkdir(exist_ok=True)
        pixels = np.zeros((8, 8, 3), np.uint8) + np.array(colour, np.uint8)
        pixels[index % 5 : index % 5 + 3, 2:6] = 255
        Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def kind(latent: Recipe, folders: Path) -> Recipe:
    """A function of (kind, out, differences) that gives a recipe in latents."""

    def make(name: str, out: Path, **changes: Any) -> TrainingConfig:
        tables: dict[str, Any] = {"data": {"path": folders} if name in ("classes", "labels") else {}}
        for values in (KINDS[name], changes):
            for key, value in values.items():
                tables[key] = {**tables.get(key, {}), **value} if isinstance(value, dict) else value
        return latent(out, **tables)

    return make


def task_of(config: TrainingConfig) -> DiffusionTask:
    torch.manual_seed(config.seed)
    task = make_task(config, CPU)
    assert isinstance(task, DiffusionTask)
    return task


@pytest.mark.parametrize("name", [*KINDS, "eps", "v", "x0"])
def test_it_overfits_one_batch(kind: Recipe, pixel: Recipe, tmp_path: Path, name: str) -> None:
    changes = {"unet": {"dropout": 0.0}}
    run = tmp_path / "run"
    in_pixels = {**changes, "diffusion": {"prediction": name}}
    task = task_of(kind(name, run, **changes) if name in KINDS else pixel(run, **in_pixels))
    source = task.batches(0, 4)
    batch, losses = next(source), list[float]()
    source.close()
    steps = 50
    optimizer = torch.optim.AdamW(task.optimized()["denoiser"], weight_decay=0.0, fused=True)
    for step in range(steps):
        ((_, loss, _),) = task.losses(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / steps)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


@pytest.mark.parametrize("name", ["unconditional", "classes", "labels", "super-resolution"])
def test_the_finished_model_draws(kind: Recipe, trained: Trained, tmp_path: Path, name: str) -> None:
    path = trained(kind(name, tmp_path / "run", loop=SHORT))
    model = sfumato.load(path, device="cpu")
    label = 1 if name in ("classes", "labels") else None
    small = Image.new("RGB", (4, 4), "red") if name == "super-resolution" else None
    result = generate(model, Request(label=label, init=small, seed=1, steps=2))
    assert result.images[0].size == (8, 8)
    assert model.defaults["guidance"] == 3.0
    sheet = Image.open(max((path.parent / "previews").glob("*.png")), formats=["PNG"])
    assert sheet.size[0] <= 8 * 10
    if label is not None:
        assert (path.parent / "classes.tsv").read_text() == "0\tblue\n1\tred\n"
        other = generate(model, Request(label=0, seed=1, steps=2))
        assert not torch.equal(other.samples, result.samples)
        free = generate(model, Request(seed=1, steps=2))
        assert torch.equal(
            generate(model, Request(label=2, seed=1, steps=2, guidance=1)).samples, free.samples
        )


def test_captions_and_labels_are_guided_together(kind: Recipe, folders: Path, tmp_path: Path) -> None:
    """Rows of a step's passes have the class asked for, and those to guide away from "no class"."""
    both = {"data": {"path": folders}, "diffusion": {"classes": "vector"}}
    model = task_of(kind("text", tmp_path / "run", **both)).model
    seen: list[int] = []
    network = model.network

    def watching(x: Tensor, t: Tensor, cond: Conditioning, patch: Any = None) -> Tensor:
        assert cond.vector is not None
        seen.extend(cond.vector.tolist())
        return network(x, t, cond, patch)

    model.network = watching  # type: ignore[method-assign]
    request = Request(prompt="a square", negative_prompt="a fox", num_images=2, steps=1, seed=0)
    for label, told in ((1, [1, 1, 2, 2]), (None, [2, 2, 2, 2])):
        seen.clear()
        generate(model, request.model_copy(update={"label": label}))
        assert sorted(seen) == told


def test_a_finished_inpainting_model_draws_from_the_command_line(
    kind: Recipe, trained: Trained, tmp_path: Path
) -> None:
    run = trained(kind("inpainting", tmp_path / "run", loop=SHORT)).parent
    Image.new("RGB", (8, 8), "green").save(tmp_path / "picture.png")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 8, 4))
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "drawn.png"
    main(
        ["generate", "a square", "--model", str(run), "--init", str(tmp_path / "picture.png"), "--mask",
         str(tmp_path / "mask.png"), "--mask-feather", "0", "--seed", "1", "--steps", "2", "--output",
         str(out)]
    )  # fmt: skip
    drawn = np.array(Image.open(next(tmp_path.glob("drawn*.png")), formats=["PNG"]))
    assert drawn.shape == (8, 8, 3) and (drawn[6:] == (0, 128, 0)).all() and (drawn[:2] != (0, 128, 0)).any()


def test_what_an_inpainting_network_is_shown_is_what_drawing_shows_it(kind: Recipe, tmp_path: Path) -> None:
    task = task_of(kind("inpainting", tmp_path / "run"))
    shown = task.shown[0]
    assert isinstance(shown, Inpainting)
    picture = task.held_out.picture(0)
    mask = shown.masks([Position(0, 0, 4)], to_tensor(picture)[None])
    given = Image.fromarray((mask[0, 0] * 255).byte().numpy())
    seen: list[Conditioning] = []
    network = task.model.network

    def watching(x: Tensor, t: Tensor, cond: Conditioning, patch: Any = None) -> Tensor:
        seen.append(cond)
        return network(x, t, cond, patch)

    task.model.network = watching  # type: ignore[method-assign]
    with torch.no_grad():
        generate(task.model, Request(init=picture, mask=given, seed=0, steps=1))
        expected = shown.shown(to_tensor(picture)[None], mask).concat
    drawing = seen[0].concat
    assert drawing is not None and expected is not None and drawing.shape == (1, 3, 4, 4)
    assert torch.allclose(drawing, expected, atol=1e-5)
    assert set(expected[:, 0].unique().tolist()) <= {0.0, 1.0}


def test_masks_hang_on_the_place_and_are_of_every_kind() -> None:
    def mask(place: int, whole: float = 0.25) -> Tensor:
        return random_mask(24, 32, Position(0, 0, place).generator("mask"), whole)

    masks = torch.stack([mask(place) for place in range(300)])
    assert masks.shape == (300, 1, 24, 32) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks[7], mask(7))
    shares = masks.mean(dim=(1, 2, 3))
    assert 0.17 < float((shares == 1).float().mean()) < 0.34
    assert float(shares.min()) > 0 and 0.15 < float(shares[shares < 1].mean()) < 0.6
    assert float(torch.stack([mask(place, 0.0) for place in range(50)]).mean()) < 0.7


def test_small_pictures_are_left_out_as_often_as_asked(pixel: Recipe, tmp_path: Path) -> None:
    options = {"concat": "super_resolution", "enlarge": 2, "concat_dropout": 0.25, "small_noise": 0.2}
    task = task_of(pixel(tmp_path / "run", unet={"in_channels": 6}, diffusion=options))
    shown = task.shown[0]
    assert isinstance(shown, StretchedPicture) and task.model.config.concat == "edits"
    picture = to_tensor(task.dataset.picture(0))
    places = [Position(0, 0, place) for place in range(400)]
    concat = shown.training(places, picture.expand(400, -1, -1, -1)).concat
    assert concat is not None and concat.shape == (400, 3, 8, 8)
    assert 0.2 < float((concat == 0).all(dim=(1, 2, 3)).float().mean()) < 0.3
    still = shown.held_out([0], picture[None]).concat
    kept = concat[(concat != 0).any(dim=3).any(dim=2).any(dim=1)]
    assert still is not None and 0.03 < float((kept - still).std()) < 0.15
    small = Image.new("RGB", (4, 4), "red")
    assert generate(task.model, Request(init=small, width=8, height=8, steps=1, seed=0)).images


def test_small_pictures_beside_latents_are_what_drawing_shows(kind: Recipe, tmp_path: Path) -> None:
    task = task_of(kind("super-resolution", tmp_path / "run", diffusion={"noise_levels": 30}))
    shown = task.shown[0]
    assert isinstance(shown, SmallPicture) and task.model.config.concat == "enlarges"
    assert task.unet.config.num_classes == 30
    picture = to_tensor(task.dataset.picture(0))
    places = [Position(0, 0, place) for place in range(200)]
    given = shown.training(places, picture.expand(200, -1, -1, -1))
    assert given.concat is not None and given.vector is not None and given.concat.shape == (200, 3, 4, 4)
    assert set(given.vector.tolist()) == set(range(30))
    small = Image.new("RGB", (4, 4), (255, 0, 0))
    result = generate(task.model, Request(init=small, steps=1, seed=0, noise_level=7))
    assert result.images[0].size == (8, 8)
    plain = task_of(kind("super-resolution", tmp_path / "plain", diffusion={"small_noise": 0.0})).shown[0]
    assert isinstance(plain, SmallPicture)
    same = plain.training([Position(0, 0, 0)], torch.ones(1, 3, 8, 8))
    assert same.concat is not None and torch.allclose(same.concat, torch.ones(1, 3, 4, 4))
    assert same.vector is None


def test_labels_are_left_out_as_often_as_asked(kind: Recipe, tmp_path: Path) -> None:
    task = task_of(kind("classes", tmp_path / "run", diffusion={"label_dropout": 0.25}))
    labels = task.labels
    assert isinstance(labels, Labels) and labels.names == ("blue", "red") and labels.network is not None
    assert labels.network.config.n_classes == 3 and labels.network.config.unconditional
    chosen = [labels.chosen(Position(0, 0, place, place % len(task.dataset))) for place in range(600)]
    assert 0.2 < chosen.count(None) / 600 < 0.3
    for place, label in enumerate(chosen):
        assert label in (None, labels.dataset.label(place % len(task.dataset)))
    assert torch.equal(labels.encoded([None]).context, labels.encoded([2]).context)  # type: ignore[arg-type]
    assert not any(p is q for p in task.unet.parameters() for q in labels.network.parameters())
    assert all(any(p is q for q in task.optimized()["denoiser"]) for p in labels.network.parameters())


def test_an_inpainting_model_begins_as_the_model_it_starts_from(
    latent: Recipe, kind: Recipe, trained: Trained, tmp_path: Path
) -> None:
    first = trained(latent(tmp_path / "first", loop=SHORT))
    before = load_file(first, torch.float32).module("unet")
    task = task_of(kind("inpainting", tmp_path / "second", diffusion={"start_from": first}))
    x, t, context = torch.randn(2, 5, 4, 4), torch.tensor([3.0, 700.0]), torch.randn(2, 8, 8)
    task.unet.eval()
    with torch.no_grad():
        assert torch.allclose(task.unet(x, t, context), before(x[:, :2], t, context), atol=1e-6)
    task.unet.train()
    source = task.batches(0, 4)
    ((_, loss, _),) = task.losses(next(source), 0)
    source.close()
    loss.backward()
    weight = task.unet.get_parameter("input_blocks.0.0.weight")
    assert weight.grad is not None and bool((weight[:, 2:] == 0).all())
    assert bool((weight.grad[:, 2:] != 0).any()), "what is new can learn"


def test_a_text_encoder_that_stays_as_it_is(latent: Recipe, trained: Trained, tmp_path: Path) -> None:
    first = trained(latent(tmp_path / "first", loop=SHORT))
    frozen = {"text_from": first, "text_trainable": False}
    config = latent(tmp_path / "second", diffusion=frozen, loop=SHORT, text=None)
    task = task_of(config)
    assert set(task.modules) == {"unet"} and set(task.frozen) == {"text"}
    second = load_file(trained(config), torch.float32)
    old, new = load_file(first, torch.float32).module("text"), second.module("text")
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert second.config.tokenizer == load_file(first).config.tokenizer
    assert generate(sfumato.load(config.out, device="cpu"), Request(prompt="a square", steps=1)).images
    kept = task_of(latent(tmp_path / "kept", diffusion={**frozen, "text_cache": True}, text=None))
    assert kept.captions is not None and kept.captions.cache is not None and task.captions is not None
    for captions in (["a square number 1", ""], ["a square number 2"]):
        found, wanted = (each.encoded(captions).context for each in (kept.captions, task.captions))
        assert found is not None and wanted is not None and torch.allclose(found, wanted, atol=2e-3)
    with pytest.raises(InputError, match="text_trainable is false, and the text encoder would be untrained"):
        task_of(latent(tmp_path / "third", diffusion={"text_trainable": False}))


@pytest.mark.parametrize("name", KINDS)
def test_held_out_scores_repeat(kind: Recipe, tmp_path: Path, name: str) -> None:
    task = task_of(kind(name, tmp_path / "run"))
    for module in task.modules.values():
        module.eval()
    with torch.no_grad():
        assert task.evaluate() == task.evaluate()


def test_objectives_reach_the_loss(pixel: Recipe, trained: Trained, tmp_path: Path) -> None:
    config = pixel(
        tmp_path / "run", loop=SHORT, schedule={"kind": "linear", "num_timesteps": 200, "beta_start": 1e-4,
                                                "beta_end": 0.02, "zero_terminal_snr": True},
        diffusion={"prediction": "v", "loss": "huber", "weighting": "min_snr", "offset_noise": 0.1,
                   "input_perturbation": 0.1, "timesteps": "logit_normal", "timestep_range": (20, 180)},
    )  # fmt: skip
    lines: list[Any] = []
    path = trained(config, lines.append)
    assert all(line["error"] > 0 and line["error"] != line["loss"] for line in lines if "loss" in line)
    written = load_file(path).config
    assert written.schedule.zero_terminal_snr and written.schedule.num_timesteps == 200
    assert sfumato.load(path, device="cpu").schedule.sigma_max == pytest.approx(4096, rel=1e-3)


def test_a_schedule_that_ends_too_early_is_a_warning(pixel: Recipe, tmp_path: Path) -> None:
    notes = {"kind": "linear", "num_timesteps": 200, "beta_start": 1e-4, "beta_end": 0.02}
    warnings = task_of(pixel(tmp_path / "run", schedule=notes)).warnings
    assert len(warnings) == 1 and "36%" in warnings[0] and "schedule.beta_end = 0.1" in warnings[0]
    assert task_of(pixel(tmp_path / "other")).warnings == ()
    undone = {
        "diffusion": {"prediction": "v", "weighting": "min_snr"},
        "schedule": {"zero_terminal_snr": True},
    }
    (warning,) = task_of(pixel(tmp_path / "undone", **undone)).warnings
    assert 'diffusion.weighting = "none"' in warning


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "channels of a mask": ("inpainting", {"unet": {"in_channels": 4}}, "and 3 more .* inpainting"),
    "two contexts": ("text", {"diffusion": {"classes": "context"}}, "both captions and classes"),
    "no width": ("classes", {"unet": {"context_dim": None}}, '"context", and unet.context_dim is not given'),
    "other labels": ("labels", {"unet": {"num_classes": 5}}, "num_classes 5; this recipe needs 2 and 3"),
    "labels of noise": ("super-resolution", {"diffusion": {"classes": "vector"}}, "levels of noise"),
    "noise of nothing": ("text", {"diffusion": {"noise_levels": 5}}, "no small picture is shown"),
    "another factor": ("super-resolution", {"diffusion": {"enlarge": 3}}, "has 2 per latent"),
    "no small picture": ("text", {"diffusion": {"concat_dropout": 0.2}}, "concat_dropout is 0.2, and only"),
    "left out": ("super-resolution", {"diffusion": {"concat_dropout": 1.0}}, "always shown"),
    "a text cache": ("text", {"diffusion": {"text_cache": True}}, "one is trained\nSet .*text_trainable"),
    "timesteps": ("text", {"diffusion": {"timestep_range": (0, 5000)}}, "the schedule ends at 999"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), WRONG.values(), ids=list(WRONG))
def test_a_recipe_that_does_not_fit(
    kind: Recipe, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        task_of(kind(name, tmp_path / "run", **changes))


def test_pictures_without_classes(kind: Recipe, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no classes\nPut the pictures of each class into a sub-folder"):
        task_of(kind("classes", tmp_path / "run", data={"path": pictures}))
    assert len(open_dataset(pictures, (8, 8), 3, "train"))
