"""The recipes of denoisers and of the classifier in configs/ run to their end, made small, and serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import Request, generate
from sfumato.checkpoints.classifier import load_classifier
from sfumato.checkpoints.save import save_file
from sfumato.data.pictures import Row
from sfumato.data.shapes import write_shapes
from sfumato.data.shards import encode, write_rows, write_shards
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.presets import ModelConfig
from sfumato.training import run

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = (
    "data.size=16", "data.workers=0", "unet.model_channels=8", "unet.num_groups=4",
    "unet.num_head_channels=8", "loop.images=2", "loop.batch=2", "loop.precision=float32", "device=cpu",
)  # fmt: skip
ONCE = "diffusion.steps=1"
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
def illustrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An illustration set with a drawing in each style that the recipes name, and a scene."""
    root = tmp_path_factory.mktemp("illustrations")
    picture = Image.new("RGBA", (16, 16))
    picture.paste((200, 60, 90, 255), (4, 4, 12, 12))

    def row(index: int, style: str) -> Row:
        attributes = {"style": style} if style else {}
        return {
            "id": f"{style}-{index}", "captions": [f"a {style} drawing of a fox"],
            "split": "test" if index == 0 else "train", "kind": "drawing" if style else "scene",
            "layers": [{"picture": "square", "box": [0.0, 0.0, 1.0, 1.0]}], "background": [255, 255, 255],
            "attributes": attributes,
        }  # fmt: skip

    write_shards(root, [("square", encode(picture))])
    write_rows(root, [row(index, style) for style in ("noto", "blob", "flat", "") for index in range(3)])
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
        given = [*TINY, ONCE, f"data.path={folder}", f"out={work / name}", *overrides]
        if name != "pixels":
            given.append(f"diffusion.autoencoder={autoencoder}")
        start = {"inpainting": "diffusion", "illustrations-finish": "illustrations-diffusion"}.get(name)
        if start is not None:
            given.append(f"diffusion.start_from={work / start / 'model.safetensors'}")
        recipe = name if name.startswith("illustrations") else f"folder-{name}"
        return sfumato.load(run(CONFIGS / f"{recipe}.toml", given), device="cpu")

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


def test_illustrations(drawn_by: Make, illustrations: Path) -> None:
    """The two stages of the embedded model."""
    for name in ("illustrations-diffusion", "illustrations-finish"):
        model = drawn_by(name, *TEXT, f"data.path={illustrations}")
        assert model.prediction == "v" and model.text_encoder is not None
        assert generate(model, Request(prompt="a red fox", seed=1, steps=2)).images[0].size == (16, 16)


def test_full_illustrations(drawn_by: Make, illustrations: Path) -> None:
    model = drawn_by(
        "illustrations-full-diffusion", *TEXT, f"data.path={illustrations}", "loop.compile=false"
    )
    assert generate(model, Request(prompt="a red fox", seed=1, steps=2)).images[0].size == (16, 16)


def test_classifier(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", size=16)
    given = [*TINY, "loop.images=12", "loop.batch=6", f"data.path={tmp_path / 'shapes'}"]
    path = run(CONFIGS / "shapes-classifier.toml", [*given, f"out={tmp_path / 'run'}"])
    classifier = load_classifier(path)
    assert classifier.description.classes == ("red", "orange", "yellow", "green", "blue", "purple")


@pytest.mark.slow
def test_a_compiled_network_learns_as_the_plain_one_does(
    drawn_by: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, and run as it was traced: to make machine code of a tiny U-Net takes minutes."""
    compiled: list[torch.nn.Module] = []
    traced = torch.compile

    def compile_(module: torch.nn.Module) -> object:
        compiled.append(module)
        return traced(module, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_)
    plain = drawn_by("pixels", f"out={tmp_path / 'plain'}").unet.state_dict()
    assert not compiled
    faster = drawn_by("pixels", f"out={tmp_path / 'compiled'}", "loop.compile=true").unet.state_dict()
    assert len(compiled) == 1 and plain.keys() == faster.keys()
    assert all(torch.equal(value, faster[name]) for name, value in plain.items())
