"""What a run will take, before it is begun: memory by what needs it, seconds a step, the whole of it.

Two small batches tell what a picture adds to the activations, which are what the backward pass keeps; the
rest is counted. Then steps are taken and timed, and nothing of them is kept.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from sfumato.runtime import resolve_device
from sfumato.training.config import TrainingConfig
from sfumato.training.data import Dataset
from sfumato.training.finetune.memory import Saved
from sfumato.training.loop import autocast_of
from sfumato.training.optimizers import make_optimizers
from sfumato.training.run import make_task
from sfumato.training.snapshot import averages_of
from sfumato.training.task import Report, Task

FEW = 16  # pictures that are opened and encoded
STEPS = 3  # timed, of which the fastest counts: the first ones warm up
MARGIN = 1.1  # on what is counted: workspace of kernels, fragments
GIB = 2**30
STATE = {"adamw": 8.0, "lion": 4.0, "sgd": 4.0, "adam8bit": 2.03}  # bytes a weight, in float32


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    parameters, trained: numbers of weights. weights, gradients, optimizer, averages, activations: bytes, the
    last for a whole batch. available: bytes that are free now. seconds: of an optimizer's step; None where a
    batch does not fit. encoding: seconds until all pictures are encoded, 0 where there is nothing to.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    available: int
    seconds: float | None
    steps: int
    encoding: float

    @property
    def memory(self) -> int:
        """Bytes that a step takes at its peak."""
        kept = self.weights + self.gradients + self.optimizer + self.averages
        return round(kept + MARGIN * self.activations)

    @property
    def fits(self) -> bool:
        return self.memory <= self.available

    @property
    def total(self) -> float | None:
        """Seconds of the whole run."""
        return None if self.seconds is None else self.encoding + self.seconds * self.steps

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        yield f"weights       {self.weights / GIB:8.3f} GiB  ({self.parameters:,}; trained: {self.trained:,})"
        yield f"gradients     {self.gradients / GIB:8.3f} GiB"
        yield f"optimizer     {self.optimizer / GIB:8.3f} GiB"
        yield f"averages      {self.averages / GIB:8.3f} GiB"
        yield f"activations   {self.activations / GIB:8.3f} GiB  (of a batch)"
        yield f"in all        {self.memory / GIB:8.3f} GiB  of {self.available / GIB:.3f} GiB that are free"
        if self.seconds is None or self.total is None:
            yield "a batch does not fit: take a smaller loop.batch and a larger loop.accumulate,"
            yield "loop.gradient_checkpointing, or optimizer.name = adam8bit or adafactor"
            return
        yield f"a step        {self.seconds:8.3f} s"
        if self.encoding:
            yield f"encoding      {_span(self.encoding)} before the first"
        yield f"the whole     {_span(self.total)} for {self.steps:,} steps, without previews and scores"


def plan(config: TrainingConfig, report: Report = lambda _: None) -> Plan:
    """What the run of a recipe takes on this machine; nothing is written that stays.

    Errors as `run`. `InputError` for a recipe of several processes: they are planned as one.
    """
    device, loop = resolve_device(config.device), config.loop
    with tempfile.TemporaryDirectory() as folder:
        few = config.model_copy(update={"out": Path(folder)})
        began = time.perf_counter()
        encoded: dict[str, float] = {}
        whole: list[int] = []

        def told(line: Mapping[str, Any]) -> None:
            if "encoded" in line:
                encoded["seconds"] = time.perf_counter() - began
            report(line)

        def narrowed(dataset: Dataset) -> Dataset:
            whole.append(len(dataset))
            return cast(Dataset, _Few(dataset, max(2, min(loop.batch, FEW))))

        task = make_task(few, device, told, narrowed)
        encoding = 0.0
        if encoded:
            opened = sum(min(count, max(2, min(loop.batch, FEW))) for count in whole)
            encoding = encoded["seconds"] * sum(whole) / opened
        modules, parameters = task.modules, task.optimized()
        optimizers = make_optimizers(config.optimizer, parameters, modules)
        averages = averages_of(modules, loop.half_lives)
        per_picture, fixed = _activations(task, config, device)
        trained = {id(p): p for group in parameters.values() for p in group}
        every = {id(p): p for module in _networks(task) for p in module.parameters()}
        counted = Plan(
            parameters=sum(p.numel() for p in every.values()),
            trained=sum(p.numel() for p in trained.values()),
            weights=sum(p.numel() * p.element_size() for p in every.values()),
            gradients=sum(p.numel() * p.element_size() for p in trained.values()),
            optimizer=state_bytes(config.optimizer.name, list(trained.values())),
            averages=sum(v.numel() * v.element_size() for a in averages.values() for v in a.average.values()),
            activations=fixed + per_picture * loop.batch,
            available=_available(device),
            seconds=None,
            steps=-(-loop.images // (loop.batch * loop.accumulate)),
            encoding=encoding,
        )
        if not counted.fits:
            return counted
        seconds = _timed(task, config, device, optimizers, averages)
    return replace(counted, seconds=seconds)


class _Few:
    """The first pictures of a data set, under all of its captions: vocabularies are learned from them."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        self._dataset, self._count = dataset, min(count, len(dataset))
        self.order: Sequence[int] = [i for i in dataset.order if i < self._count] or list(range(self._count))

    def __len__(self) -> int:
        return self._count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def captions(self, index: int) -> list[str]:
        if index:
            return self._dataset.captions(index)
        return [text for each in range(len(self._dataset)) for text in self._dataset.captions(each)]


def _activations(task: Task, config: TrainingConfig, device: torch.device) -> tuple[int, int]:
    """(bytes a picture, bytes whatever the batch) that the backward pass of the largest loss keeps."""
    one, two = (_kept(task, count, config, device) for count in (1, 2))
    return max(0, two - one), max(0, 2 * one - two)


def _kept(task: Task, count: int, config: TrainingConfig, device: torch.device) -> int:
    """Bytes that the graph of the largest loss of a batch of `count` keeps, but for weights and constants."""
    fixed = {p.untyped_storage()._cdata for module in _networks(task) for p in module.parameters()}
    saved = Saved(fixed)
    largest, parameters = 0, task.optimized()
    with closing(task.batches(0, count)) as batches:
        batch = next(batches)
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda value: saved.keep(value), lambda value: value),
            autocast_of(config.loop, device)(),
        ):
            for name, loss, _ in task.losses(batch, 0):
                largest = max(largest, saved.bytes)
                torch.autograd.backward(loss, inputs=parameters[name])
                saved = Saved(fixed)
    for group in parameters.values():
        for parameter in group:
            parameter.grad = None
    return largest


def _networks(task: Task) -> list[torch.nn.Module]:
    """The networks of a task, those that are not trained too."""
    found = dict.fromkeys(task.modules.values())
    model = getattr(task, "model", None)
    for part in ("unet", "autoencoder", "text", "text2"):
        module = None if model is None else model.part(part)
        if module is not None:
            found[module] = None
    return list(found)


def state_bytes(name: str, parameters: Sequence[torch.nn.Parameter]) -> int:
    """Bytes that an optimizer of this name keeps of weights."""
    if name != "adafactor":
        return round(STATE[name] * sum(parameter.numel() for parameter in parameters))
    # Of a matrix (out, in) its rows' and its columns' means alone (Shazeer and Stern 2018, section 3).
    sizes = [(p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (p.numel(), 0) for p in parameters]
    return sum(4 * (rows + columns) for rows, columns in sizes)


def _timed(
    task: Task,
    config: TrainingConfig,
    device: torch.device,
    optimizers: Mapping[str, torch.optim.Optimizer],
    averages: Mapping[str, Any],
) -> float:
    """Seconds of the fastest of a few whole steps."""
    loop, parameters, found = config.loop, task.optimized(), []
    with closing(task.batches(0, loop.batch)) as batches:
        for _ in range(STEPS):
            _settled(device)
            started = time.perf_counter()
            for _ in range(loop.accumulate):
                batch = next(batches)
                with autocast_of(loop, device)():
                    for name, loss, _ in task.losses(batch, 0):
                        torch.autograd.backward(loss / loop.accumulate, inputs=parameters[name])
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            for average in averages.values():
                average.update(loop.batch, loop.batch)
            _settled(device)
            found.append(time.perf_counter() - started)
    return min(found)


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _available(device: torch.device) -> int:
    """Bytes that are free on the device; of a CPU, in the whole machine or the control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
