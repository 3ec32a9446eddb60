"""Masks of the pictures' own: a network that inpaints is shown them, cut and mirrored as their pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sfumato.errors import InputError
from sfumato.training.config import TrainingConfig
from sfumato.training.data import Placed, Position, to_tensor
from sfumato.training.run import make_task
from sfumato.training.tasks.diffusion import DiffusionTask
from sfumato.training.tasks.shown import Inpainting

CPU = torch.device("cpu")
UNET = {"in_channels": 5}  # two of the latents, the mask, and what it leaves of them
Recipe = Callable[..., TrainingConfig]


def task_of(config: TrainingConfig) -> DiffusionTask:
    torch.manual_seed(config.seed)
    task = make_task(config, CPU)
    assert isinstance(task, DiffusionTask)
    return task


@pytest.fixture(scope="module")
def half_masked(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pictures of the tests and a mask for each, larger than it: black is its left half."""
    masks = tmp_path_factory.mktemp("masks")
    mask = Image.new("L", (20, 24))
    mask.paste(200, (10, 0, 20, 24))
    for file in pictures.glob("*.png"):
        mask.save(masks / file.name)
    return {"path": pictures, "masks": masks}


@pytest.mark.parametrize("where", ["latents", "pixels"])
def test_the_masks_of_pictures_are_shown_and_mirrored_with_them(
    latent: Recipe, pixel: Recipe, half_masked: dict[str, Path], tmp_path: Path, where: str
) -> None:
    changes: dict[str, Any] = {"data": {**half_masked, "flip": 0.5}}
    options = {"concat": "inpainting", "mask_whole": 0.25}
    if where == "latents":
        config = latent(tmp_path / "run", **changes, unet=UNET, diffusion=options)
    else:
        config = pixel(tmp_path / "run", **changes, unet={"in_channels": 7}, diffusion=options)
    task = task_of(config)
    shown, data = task.shown[0], task.dataset
    assert isinstance(shown, Inpainting) and isinstance(data, Placed)
    seen = set()
    with closing(task.batches(0, 4)) as source, torch.no_grad():
        for places, clean, pictures in islice(source, 8):
            assert pictures is not None and clean.shape[1] == task.unet.config.out_channels
            masks = shown.training(places, pictures).concat
            assert masks is not None
            for place, mask in zip(places, masks[:, 0], strict=True):
                left, right = mask.chunk(2, dim=1)
                whole = bool((mask == 1).all())
                white, black = (left, right) if data.flipped(place) else (right, left)
                assert whole or (bool((white == 1).all()) and bool((black == 0).all()))
                seen.add((whole, data.flipped(place)))
        assert len(seen) == 4, "of everything or not, mirrored or not"
        ((_, loss, _),) = task.losses(next(source), 0)
        assert bool(torch.isfinite(loss))
        held_out = shown.held_out([0] * 4, to_tensor(task.held_out.picture(0)).expand(4, -1, -1, -1)).concat
    assert held_out is not None and bool((held_out[:, 0].chunk(2, dim=2)[1] == 1).all())
    shown.options = shown.options.model_copy(update={"mask_whole": 0.0})
    ones = torch.ones(1, 3, 8, 8)
    assert shown.masks([Position(3, -1, 0, 0)], ones)[0, 0].mean(dim=0).tolist() == [0.0] * 4 + [1.0] * 4
    task.preview(tmp_path / "sheet.png")


def test_a_mask_that_cannot_be_read_has_its_picture_replaced(
    latent: Recipe, half_masked: dict[str, Path], tmp_path: Path
) -> None:
    masks = tmp_path / "masks"
    shutil.copytree(half_masked["masks"], masks)
    (masks / "0.png").write_bytes(b"no picture")
    data = {**half_masked, "masks": masks, "max_bad": 0.5}
    found = []
    for _ in ("it is met", "it is known"):
        task = task_of(latent(tmp_path / "run", data=data, unet=UNET, diffusion={"concat": "inpainting"}))
        with closing(task.batches(0, 4)) as source:
            found.append([next(source) for _ in range(6)])
    for (places, clean, pictures), (again, same, alike) in zip(*found, strict=True):
        assert places == again and torch.equal(clean, same) and pictures is not None and alike is not None
        assert torch.equal(pictures, alike)
    assert "0.png" in (tmp_path / "run" / "quarantine.jsonl").read_text()


def test_masks_that_nothing_would_show(
    pixel: Recipe, half_masked: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"data\.masks is .*, and only a denoiser that inpaints"):
        task_of(pixel(tmp_path / "run", data=half_masked))
    more = {"folders": [{"path": pictures, "masks": half_masked["masks"]}]}
    with pytest.raises(InputError, match=r"data\.folders\[0\]\.masks is"):
        task_of(pixel(tmp_path / "run", data=more))
