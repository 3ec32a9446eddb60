"""Runs on folders with unusable files, in buckets, on classes: they end, and resume to the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.checkpoints.classifier import load_classifier
from sfumato.training.config import TrainingConfig
from sfumato.training.data import open_data
from sfumato.training.loop import train
from sfumato.training.tasks.classifier import ClassifierTask
from sfumato.training.tasks.diffusion import DiffusionTask

CPU = torch.device("cpu")
Recipe = Callable[..., TrainingConfig]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four pictures of three shapes, two of them unreadable."""
    root = tmp_path_factory.mktemp("set")
    generator = np.random.default_rng(1)
    for index in range(24):
        height, width = [(12, 12), (8, 18), (18, 8)][index % 3]
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
        (root / f"{index}.txt").write_text(f"a square number {index % 3}")
    (root / "4.png").write_bytes(b"")
    (root / "5.png").write_bytes(b"nothing")
    return root


def run(config: TrainingConfig) -> bytes:
    torch.manual_seed(config.seed)
    dataset = open_data(config.data, "train", config.out)
    task = DiffusionTask(config, dataset, open_data(config.data, "test", config.out), CPU)
    return train(config, task, CPU, lambda line: None).read_bytes()


BUCKETS = {"min": 4, "max": 16, "step": 4, "rarest": 1}


@pytest.mark.parametrize("kind", ["pixels", "buckets", "latents"])
def test_a_run_that_met_bad_files_ends_as_one_that_knew_them(
    pixel: Recipe, latent: Recipe, folder: Path, tmp_path: Path, kind: str
) -> None:
    data: dict[str, Any] = {"path": folder, "max_bad": 0.1, "flip": 0.5}
    if kind != "pixels":
        data["buckets"] = BUCKETS
    make = latent if kind == "latents" else pixel
    loop = {"images": 32, "save_images": 16, "preview_images": 32}

    def config(name: str, images: int = 32) -> TrainingConfig:
        tables = {"data": data, "loop": {**loop, "images": images}, "optimizer": {"decay": "constant"}}
        return make(tmp_path / name, **tables)

    whole = run(config("whole"))
    listed = tmp_path / "whole" / "quarantine.jsonl"
    assert len(listed.read_text().splitlines()) >= 2
    (tmp_path / "known").mkdir()
    shutil.copy(listed, tmp_path / "known" / "quarantine.jsonl")
    assert run(config("known")) == whole
    run(config("parts", 16))
    assert run(config("parts")) == whole


def test_sub_folders_are_the_classes_of_a_classifier(recipe: Recipe, tmp_path: Path) -> None:
    for name, colour in (("dark", 20), ("light", 230)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (8, 8), (colour, colour, 5 * index)).save(
                tmp_path / "set" / name / f"{index}.png"
            )
    unet = {
        "in_channels": 3, "out_channels": 2, "model_channels": 8, "num_res_blocks": 1, "channel_mult": [1, 2],
        "attention_resolutions": [], "num_heads": 2, "num_groups": 4,
    }  # fmt: skip
    config = recipe("classifier", tmp_path / "run", data={"path": tmp_path / "set"}, unet=unet)
    dataset, held_out = (
        open_data(config.data, "train", config.out),
        open_data(config.data, "test", config.out),
    )
    path = train(config, ClassifierTask(config, dataset, held_out, CPU), CPU, lambda line: None)
    assert load_classifier(path).description.classes == ("dark", "light")
