"""From a recipe to a finished model file: opens the data, builds the task, runs the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from sfumato.data.pictures import Split
from sfumato.errors import InputError
from sfumato.training.config import TrainingConfig, read_config
from sfumato.training.data import Dataset, open_data
from sfumato.training.distributed import Processes, joined
from sfumato.training.finetune import FinetuneTask
from sfumato.training.lock import locked
from sfumato.training.loop import Report, Task, train
from sfumato.training.masks import refuse_masks
from sfumato.training.tasks.autoencoder import AutoencoderTask
from sfumato.training.tasks.classifier import ClassifierTask
from sfumato.training.tasks.clip import CLIPTask
from sfumato.training.tasks.diffusion import DiffusionTask
from sfumato.training.tasks.reproduction import ReproductionTask, samples_of
from sfumato.training.tasks.upscaler import UpscalerTask


def run(config_path: Path, overrides: Sequence[str] = (), report: Report = lambda _: None) -> Path:
    """Train by the recipe at `config_path`, resuming where its `out` folder stops; returns the model file.

    Several processes that torchrun started train as one; the first one reports. An interrupted run (Ctrl-C,
    SIGTERM) saves a state, from which the same call goes on.
    Raises `InputError` for a wrong recipe, `DataError` for unusable pictures, `NumericalError` if training
    diverges, `ResourceError` for a full disk or a folder that another process trains in.
    """
    config = read_config(config_path, overrides)
    with joined(config.device) as (processes, device):
        told = report if processes.first else lambda _: None
        return trained(config, lambda: make_task(config, device, told), device, told, processes)


def trained(
    config: TrainingConfig,
    make: Callable[[], Task],
    device: torch.device,
    report: Report,
    processes: Processes,
) -> Path:
    """Train the task that `make` builds, in turn in every process, and hold the run's folder meanwhile."""
    with ExitStack() as held:
        processes.first_does(lambda: held.enter_context(locked(config.out)))

        def seeded() -> Task:
            torch.manual_seed(config.seed)  # initial weights
            return make()

        task = processes.in_turn(seeded)
        path = train(config, task, device, report, processes)
        return task.written or path if isinstance(task, FinetuneTask) else path


def make_task(
    config: TrainingConfig,
    device: torch.device,
    report: Report = lambda _: None,
    narrowed: Callable[[Dataset], Dataset] = lambda dataset: dataset,
) -> Task:
    """The task of a recipe, with its networks on `device` and its data opened.

    narrowed: makes what is trained on and scored of the whole data sets.
    """
    if config.task == "reproduction":
        return ReproductionTask(config, samples_of(config, report), device)
    data = config.data
    every = [
        source
        for folder in (data, *data.folders)
        for source in (folder.path, folder.conditions, folder.masks)
    ]
    if any(source and config.out.resolve().is_relative_to(source.resolve()) for source in every):
        raise InputError(
            f"`out` is {config.out}, inside of the pictures' folder: its sheets would be trained on",
            "Choose a folder beside the pictures.",
        )
    notice = data.path / "NOTICE"
    if not config.notices and notice.is_file():  # whoever gets the model gets the credits
        config = config.model_copy(update={"notices": notice.read_text(encoding="utf-8")})

    if config.task != "diffusion":  # which reads them where it inpaints
        refuse_masks(data)

    def opened(split: Split) -> Dataset:
        return narrowed(open_data(data, split, config.out, lambda text: report({"warning": text})))

    dataset, held_out = opened("train"), opened("test")
    if config.task == "clip":
        return CLIPTask(config, dataset, held_out, device)
    if config.task == "autoencoder":
        return AutoencoderTask(config, dataset, held_out, device, report)
    if config.task == "finetune":
        return FinetuneTask(config, dataset, held_out, device, _progress(report))
    if config.task == "upscaler":
        return UpscalerTask(config, dataset, held_out, device)
    if config.task == "classifier":
        return ClassifierTask(config, dataset, held_out, device, _progress(report))
    task = DiffusionTask(config, dataset, held_out, device, _progress(report))
    for text in task.warnings:
        report({"warning": text})
    return task


def _progress(report: Report) -> Callable[[int, int], None]:
    """Reports how far the pictures are encoded, as (done, of), in the form of the loop's own lines."""
    started = time.perf_counter()

    def show(done: int, of: int) -> None:
        speed = done / (time.perf_counter() - started)
        report({"encoded": done, "images_per_second": speed, "seconds_left": (of - done) / speed})

    return show
