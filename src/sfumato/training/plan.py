"""What a run will take, before it is begun: memory by what needs it, seconds a step, the whole of it.

Weights and what training keeps of each are counted before any of it is allocated. Then two small batches tell
what a picture adds to the activations, which are what the backward pass keeps; steps are taken and timed, and
nothing of them is kept.
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
from PIL import Image

from sfumato.errors import DataError, InputError
from sfumato.runtime import resolve_device
from sfumato.training.config import TrainingConfig
from sfumato.training.data import Dataset, Placed, Position
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
GROUPS = Path("/sys/fs/cgroup")
# Limit and use of a control group's memory, in version 2 and in version 1 of their file system.
USES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
STATE = {"adamw": 8.0, "lion": 4.0, "sgd": 4.0, "adam8bit": 2.03}  # bytes a weight, in float32


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    parameters, trained: numbers of weights. weights, gradients, optimizer, averages, activations: bytes, the
    last for a whole batch, None where the others alone do not fit. available: bytes that were free before.
    seconds: of an optimizer's step; None where a batch does not fit. encoding: seconds until all pictures are
    encoded, 0 where there is nothing to; pictures of a class (`finetune.prior`) are not counted.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int | None
    available: int
    seconds: float | None
    steps: int
    encoding: float

    @property
    def memory(self) -> int:
        """Bytes that a step takes at its peak."""
        kept = self.weights + self.gradients + self.optimizer + self.averages
        return round(kept + MARGIN * (self.activations or 0))

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
        if self.activations is not None:
            yield f"activations   {self.activations / GIB:8.3f} GiB  (of a batch)"
        yield f"in all        {self.memory / GIB:8.3f} GiB  of {self.available / GIB:.3f} GiB that are free"
        if self.activations is None:
            yield "this does not fit, with no picture yet: take optimizer.name = adam8bit or adafactor, fewer"
            yield "loop.ema_images, a smaller network, or several processes with loop.parallel = fsdp"
            return
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

    Errors as `run`, and `InputError` among several processes: one alone plans.
    """
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise InputError(
            f"{world} processes were started, and a run is planned by one",
            "Leave out torchrun; give loop.batch divided by the number of processes.",
        )
    device, loop = resolve_device(config.device), config.loop
    available = _available(device)
    with tempfile.TemporaryDirectory() as folder:
        count = max(2, min(loop.batch, FEW))
        few: list[_Few] = []

        def told(line: Mapping[str, Any]) -> None:
            if "encoded" in line and few:
                few[-1].encoded(line)
            report(line)

        def narrowed(dataset: Dataset) -> Dataset:
            few.append(_Few(dataset, count))
            return cast(Dataset, few[-1])

        task = make_task(_elsewhere(config, Path(folder), count), device, told, narrowed)
        modules, parameters = task.modules, task.optimized()
        trained = {id(p): p for group in parameters.values() for p in group}
        every = {id(p): p for module in _networks(task) for p in module.parameters()}
        averaged = [p for module in modules.values() for p in module.parameters()]
        counted = Plan(
            parameters=sum(p.numel() for p in every.values()),
            trained=sum(p.numel() for p in trained.values()),
            weights=sum(p.nbytes for p in every.values()),
            gradients=sum(p.nbytes for p in trained.values()),
            optimizer=state_bytes(config.optimizer.name, list(trained.values())),
            averages=len(loop.half_lives) * sum(p.nbytes for p in averaged),
            activations=None,
            available=available,
            seconds=None,
            steps=-(-loop.images // (loop.batch * loop.accumulate)),
            encoding=sum(each.seconds for each in few),
        )
        if not counted.fits:
            return counted
        per_picture, fixed = _activations(task, config, device)
        counted = replace(counted, activations=fixed + per_picture * loop.batch)
        if not counted.fits:
            return counted
        optimizers = make_optimizers(config.optimizer, parameters, modules)
        averages = averages_of(modules, loop.half_lives)
        seconds = _timed(task, config, device, optimizers, averages)
    return replace(counted, seconds=seconds)


def _elsewhere(config: TrainingConfig, folder: Path, count: int) -> TrainingConfig:
    """The recipe with all that it writes in `folder`, and a few grey pictures there instead of a class's own.

    Those would be drawn by the model, and stay where the recipe wants them.
    """
    if config.finetune is None or config.finetune.prior is None:
        return config.model_copy(update={"out": folder / "run"})
    path = folder / "prior"
    path.mkdir()
    height, width = config.data.shape
    for number in range(count):
        Image.new("RGB", (width, height), (128, 128, 8 * number)).save(path / f"{number:06d}.png")
    prior = config.finetune.prior.model_copy(update={"path": path})
    finetune = config.finetune.model_copy(update={"prior": prior})
    return config.model_copy(update={"out": folder / "run", "finetune": finetune})


class _Few:
    """The first pictures of a data set, under all of its captions: vocabularies are learned from them.

    seconds: what encoding takes of the whole data set, by the first batch of these.
    """

    def __init__(self, dataset: Dataset, count: int) -> None:
        self._dataset, self._count = dataset, min(count, len(dataset))
        shown = [i for i in dataset.order if i < self._count]
        self.order: Sequence[int] = shown or list(range(self._count))
        self.seconds, self._began = 0.0, 0.0
        if isinstance(dataset, Placed):
            # As attributes: from Python 3.12 on `__getattr__` does not make this `Placed`.
            for name in {*Placed.__annotations__, *vars(Placed)}:
                if not name.startswith("_") and not hasattr(type(self), name) and name != "order":
                    setattr(self, name, getattr(dataset, name))
            if shown:
                dataset.only(shown)  # what replaces an unusable picture

    def __len__(self) -> int:
        return self._count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def captions(self, index: int) -> list[str]:
        if index:
            return self._dataset.captions(index)
        return [text for each in range(len(self._dataset)) for text in self._dataset.captions(each)]

    def sound(self, position: Position) -> Position:
        """Another of the few, even where the data set shows none of them."""
        dataset = cast(Placed, self._dataset)
        for index in (position.index, *range(self._count)):
            if dataset.size(index) == dataset.size(position.index):
                found = dataset.sound(replace(position, index=index))
                if found.index < self._count:
                    return found
        raise DataError(f"none of the first {self._count} pictures can be read", "See `sfumato data check`.")

    def picture(self, index: int) -> Image.Image:
        self._began = self._began or time.perf_counter()
        return self._dataset.picture(index)

    def variant(self, index: int, flipped: bool) -> Image.Image | None:
        self._began = self._began or time.perf_counter()
        return cast(Placed, self._dataset).variant(index, flipped)

    def encoded(self, line: Mapping[str, Any]) -> None:
        """Take note of a report of the encoding, of which the first counts."""
        if self._began and not self.seconds:
            rows = line["encoded"] + line["seconds_left"] * line["images_per_second"]
            share = line["encoded"] / rows * self._count / len(self._dataset)
            self.seconds = (time.perf_counter() - self._began) / share


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
    """Bytes that are free on the device; of a CPU, in the whole machine or in the control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_left(GROUPS, Path("/proc/self/cgroup"))])


def _left(root: Path, own: Path) -> Iterator[int]:
    """Bytes that the control groups of this process still allow, those above it too; none without limits.

    root: where their file system is; own: the list of the process's groups.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "memory" if kinds else root
        place = top / name.strip("/")
        # A container sees its own group as the top, under whatever name the machine has for it.
        for folder in (place, *place.parents):
            for limit, used in USES:
                try:
                    most = int((folder / limit).read_text(encoding="ascii"))
                    yield max(0, most - int((folder / used).read_text(encoding="ascii")) + _cache(folder))
                except (OSError, ValueError):  # not there, or "max"
                    continue
            if folder == top:
                break


def _cache(folder: Path) -> int:
    """Bytes of files that a control group holds in memory and gives up when they are needed."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    values = dict(line.split() for line in lines)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
