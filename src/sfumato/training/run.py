"""From a recipe to a finished model file: opens the data, builds the task, runs the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sfumato.errors import InputError
from sfumato.runtime import resolve_device
from sfumato.training.config import TrainingConfig, read_config
from sfumato.training.data import open_dataset
from sfumato.training.loop import Task, train


def run(
    config_path: Path,
    overrides: Sequence[str] = (),
    report: Callable[[dict[str, float]], None] = lambda _: None,
) -> Path:
    """Train by the recipe at `config_path`, resuming where its `out` folder stops; returns the model file.

    Raises `InputError` for a wrong recipe, `DataError` for unusable pictures, `NumericalError` if training diverges.
    """
    config = read_config(config_path, overrides)
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)  # initial weights
    return train(config, make_task(config, device), device, report)


def make_task(config: TrainingConfig, device: torch.device) -> Task:
    """The task of a recipe, with its networks on `device` and its data opened."""
    data = config.data
    dataset = open_dataset(data.path, data.shape, data.channels, "train", data.repeats)
    held_out = open_dataset(data.path, data.shape, data.channels, "test", data.repeats)
    if config.task == "autoencoder":
        from sfumato.training.tasks.autoencoder import AutoencoderTask

        if config.first_stage is None:
            raise InputError("an autoencoder run needs a [first_stage] table", "See configs/ for one.")
        return AutoencoderTask(config, dataset, held_out, device)
    from sfumato.training.tasks.diffusion import DiffusionTask

    if config.unet is None:
        raise InputError("a diffusion run needs a [unet] table", "See configs/ for one.")
    return DiffusionTask(config, config.unet, dataset, held_out, device)
