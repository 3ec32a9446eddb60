"""The recipes of denoisers in configs/ run to their end, made small, and their models draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import Request, generate
from sfumato.checkpoints.save import save_file
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.presets import ModelConfig
from sfumato.training import run

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = (
    "data.size=16", "data.workers=0", "unet.model_channels=8", "unet.num_groups=4",
    "unet.num_head_channels=8", "loop.images=2", "loop.batch=2", "loop.precision=float32",
    "diffusion.steps=1", "device=cpu",
)  # fmt: skip
TEXT = (
    "text.hidden_size=8", "text.intermediate_size=8", "text.num_hidden_layers=1",
    "text.num_attention_heads=1", "text.max_position_embeddings=8", "unet.context_dim=8",
    "diffusion.vocabulary=520",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with captions in two sub-folders."""
    root = tmp_path_factory.mktemp("folder")
    for index, name in enumerate(["fox", "owl"] * 2):
        (root / name).mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (60 * index, 80, 90)).save(root / name / f"{index}.png")
        (root / name / f"{index}.txt").write_text(f"a {name}")
    return root


@pytest.fixture(scope="module")
def drawn_by(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., sfumato.StableDiffusion]:
    """A function of (name of the recipe, overrides) that gives the finished model."""
    work = tmp_path_factory.mktemp("runs")
    first = AutoencoderConfig(
        ch=4, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4, embed_dim=4, resolution=16, attn_type="none",
        num_groups=2,
    )  # fmt: skip
    autoencoder = work / "autoencoder.safetensors"
    torch.manual_seed(0)
    save_file(
        autoencoder,
        ModelConfig(name="first", autoencoder=first, image_size=(16, 16)),
        {"autoencoder": AutoencoderKL(first).state_dict()},
        torch.float16,
    )

    def make(name: str, *overrides: str) -> sfumato.StableDiffusion:
        given = [*TINY, f"data.path={folder}", f"out={work / name}", *overrides]
        if name != "pixels":
            given.append(f"diffusion.autoencoder={autoencoder}")
        if name == "inpainting":
            given.append(f"diffusion.start_from={work / 'diffusion' / 'model.safetensors'}")
        return sfumato.load(run(CONFIGS / f"folder-{name}.toml", given), device="cpu")

    return make


Make = Callable[..., sfumato.StableDiffusion]


def test_pixels(drawn_by: Make) -> None:
    model = drawn_by("pixels")
    assert model.autoencoder is None and model.schedule.config.kind == "linear"
    assert generate(model, Request(seed=1, steps=1)).images[0].size == (16, 16)


def test_classes(drawn_by: Make) -> None:
    model = drawn_by("classes", "unet.context_dim=8")
    drawn = [generate(model, Request(label=label, seed=1, steps=2)).images[0] for label in (0, 1)]
    assert all(picture.size == (16, 16) for picture in drawn) and model.defaults["guidance"] == 3.0


def test_text_then_inpainting(drawn_by: Make) -> None:
    text = drawn_by("diffusion", *TEXT)
    assert generate(text, Request(prompt="a fox", seed=1, steps=1)).images
    model = drawn_by("inpainting", *TEXT)
    picture, mask = Image.new("RGB", (16, 16), "white"), Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    result = generate(
        model, Request(prompt="a fox", init=picture, mask=mask, mask_feather=0, seed=1, steps=2)
    )
    assert (np.array(result.images[0])[:, 8:] == 255).all()


def test_super_resolution(drawn_by: Make) -> None:
    model = drawn_by("super-resolution")
    small = Image.new("RGB", (4, 4), "white")
    assert generate(model, Request(init=small, seed=1, steps=2)).images[0].size == (16, 16)
