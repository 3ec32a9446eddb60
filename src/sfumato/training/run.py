"""From a recipe to a finished model file: opens the data, builds the task, runs the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sfumato.errors import InputError
from sfumato.runtime import resolve_device
from sfumato.training.config import TrainingConfig, read_config
from sfumato.training.data import open_dataset
from sfumato.training.lock import locked
from sfumato.training.loop import Report, Task, train
from sfumato.training.tasks.autoencoder import AutoencoderTask
from sfumato.training.tasks.classifier import ClassifierTask
from sfumato.training.tasks.diffusion import DiffusionTask


def run(config_path: Path, overrides: Sequence[str] = (), report: Report = lambda _: None) -> Path:
    """Train by the recipe at `config_path`, resuming where its `out` folder stops; returns the model file.

    An interrupted run (Ctrl-C) leaves its last saved state, from which the same call goes on.
    Raises `InputError` for a wrong recipe, `DataError` for unusable pictures, `NumericalError` if training
    diverges, `ResourceError` for a full disk or a folder that another process trains in.
    """
    config = read_config(config_path, overrides)
    device = resolve_device(config.device)
    with locked(config.out):
        torch.manual_seed(config.seed)  # initial weights
        return train(config, make_task(config, device, report), device, report)


def make_task(config: TrainingConfig, device: torch.device, report: Report = lambda _: None) -> Task:
    """The task of a recipe, with its networks on `device` and its data opened."""
    data = config.data
    if config.out.resolve().is_relative_to(data.path.resolve()):
        raise InputError(
            f"`out` is {config.out}, inside of data.path: its sheets would be trained on",
            "Choose a folder beside the pictures.",
        )
    notice = data.path / "NOTICE"
    if not config.notices and notice.is_file():  # whoever gets the model gets the credits
        config = config.model_copy(update={"notices": notice.read_text(encoding="utf-8")})
    dataset = open_dataset(data.path, data.shape, data.channels, "train", data.repeats)
    held_out = open_dataset(data.path, data.shape, data.channels, "test", data.repeats)
    if config.task == "autoencoder":
        return AutoencoderTask(config, dataset, held_out, device)
    kind = ClassifierTask if config.task == "classifier" else DiffusionTask
    return kind(config, dataset, held_out, device, _progress(report))


def _progress(report: Report) -> Callable[[int, int], None]:
    """Reports how far the pictures are encoded, as (done, of), in the form of the loop's own lines."""
    started = time.perf_counter()

    def show(done: int, of: int) -> None:
        speed = done / (time.perf_counter() - started)
        report({"encoded": done, "images_per_second": speed, "seconds_left": (of - done) / speed})

    return show
