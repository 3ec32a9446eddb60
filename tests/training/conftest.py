"""Pictures and recipes so small that a training run takes a fraction of a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.training.config import TrainingConfig
from sfumato.training.loop import Report, train
from sfumato.training.run import make_task

sys.path.insert(0, str(Path(__file__).parent))
from finetune_models import BOTH, METHODS, tables, written

CPU = torch.device("cpu")
TABLES: dict[str, dict[str, Any]] = {
    "data": {"size": 8, "workers": 2},
    "optimizer": {"learning_rate": 2e-3, "warmup_images": 8, "decay": "trapezoid"},
    "loop": {
        "images": 32, "batch": 4, "ema_images": 16, "log_images": 4, "save_images": 8, "preview_images": 16,
        "precision": "float32",
    },
}  # fmt: skip
FIRST_STAGE = {
    "ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 2, "embed_dim": 2, "resolution": 8,
    "num_groups": 2,
}  # fmt: skip
UNET = {
    "in_channels": 2, "out_channels": 2, "model_channels": 8, "num_res_blocks": 1, "channel_mult": [1, 2],
    "attention_resolutions": [2], "num_heads": 2, "use_spatial_transformer": True, "context_dim": 8,
    "num_groups": 4, "dropout": 0.1,
}  # fmt: skip
PIXEL_UNET = {**UNET, "in_channels": 3, "out_channels": 3, "context_dim": None}
TEXT = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 8, "vocab_size": 600, "eos_token_id": 1,
}  # fmt: skip

Recipe = Callable[..., TrainingConfig]


def merged(tables: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with other values, key by key; what is no table is replaced."""
    values = dict(tables)
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of 10x12 pixels, each two colours and a caption."""
    folder = tmp_path_factory.mktemp("pictures")
    colours = np.random.default_rng(0).integers(0, 255, (10, 3), dtype=np.uint8)
    for index, colour in enumerate(colours):
        pixels = np.zeros((12, 10, 3), np.uint8) + colour
        pixels[3:8, 2:7] = 255 - colour
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a square number {index % 3}")
    return folder


@pytest.fixture(scope="session")
def recipe(pictures: Path) -> Recipe:
    """A function of (task, out, tables and keys that differ) that gives a recipe for the pictures."""

    def make(task: str, out: Path, **changes: Any) -> TrainingConfig:
        values: dict[str, Any] = {"task": task, "out": out, "seed": 3, "device": "cpu", **TABLES}
        values["data"] = {**TABLES["data"], "path": pictures}
        if task == "autoencoder":
            values["first_stage"] = FIRST_STAGE
        return TrainingConfig.model_validate(merged(values, changes))

    return make


@pytest.fixture(scope="session")
def trained() -> Callable[..., Path]:
    """A function that runs a recipe as `run` does, with (config, report) -> the model file."""

    def run(config: TrainingConfig, report: Report = lambda _: None) -> Path:
        torch.manual_seed(config.seed)
        return train(config, make_task(config, CPU), CPU, report)

    return run


@pytest.fixture(scope="session")
def first_stage(
    recipe: Recipe, trained: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished autoencoder run."""
    return trained(recipe("autoencoder", tmp_path_factory.mktemp("first") / "run")).parent


@pytest.fixture(scope="session")
def latent(recipe: Recipe, first_stage: Path) -> Recipe:
    """A function of (out, differences) that gives a recipe for text to latents."""

    def make(out: Path, **changes: Any) -> TrainingConfig:
        diffusion = {
            "autoencoder": first_stage / "model.safetensors", "prediction": "v", "vocabulary": 520,
            "prompts": ("a square",), "steps": 2,
        }  # fmt: skip
        tables = {"diffusion": diffusion, "unet": UNET, "text": TEXT}
        return recipe("diffusion", out, **merged(tables, changes))

    return make


@pytest.fixture(scope="session")
def pixel(recipe: Recipe) -> Recipe:
    """A function of (out, differences) that gives a recipe for pictures without text."""

    def make(out: Path, **changes: Any) -> TrainingConfig:
        return recipe("diffusion", out, **merged({"diffusion": {"steps": 2}, "unet": PIXEL_UNET}, changes))

    return make


@pytest.fixture(scope="session")
def finetune_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: written(folder, config) for name, config in BOTH.items()}


@pytest.fixture
def finetune(
    finetune_bases: dict[str, Path], pictures: Path, tmp_path: Path
) -> Callable[..., TrainingConfig]:
    """A function of (method, family, out, finetune keys, other tables) that gives a recipe."""

    def make(
        method: str, family: str = "sd1", out: str = "run", more: dict[str, Any] | None = None, **other: Any
    ) -> TrainingConfig:
        values = tables(
            finetune_bases[family],
            tmp_path / out,
            pictures,
            **{**METHODS.get(method, {"method": method}), **(more or {})},
        )
        for name, table in other.items():
            values[name] = {**values[name], **table} if isinstance(table, dict) else table
        return TrainingConfig.model_validate(values)

    return make
