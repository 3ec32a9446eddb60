"""The one training loop: its clock is images seen; the same command run again goes on where it stopped."""

from __future__ import annotations

import math
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import NumericalError
from sfumato.training import sharding
from sfumato.training.board import Board
from sfumato.training.config import LoopConfig, TrainingConfig
from sfumato.training.curves import draw_curves
from sfumato.training.distributed import ALONE, Processes, check_batch
from sfumato.training.ema import Ema
from sfumato.training.metrics import MetricsFile, Window
from sfumato.training.optimizers import learning_rate, make_optimizers, set_rates
from sfumato.training.signals import end, stoppable
from sfumato.training.snapshot import averages_of, fingerprint, restore, tensors_of
from sfumato.training.state import State, latest_state, save_state
from sfumato.training.task import Loss, Report, Task

__all__ = ["Loss", "Report", "Task", "learning_rate", "train"]


def train(
    config: TrainingConfig, task: Task, device: torch.device, report: Report, processes: Processes = ALONE
) -> Path:
    """Train until `config.loop.images`; returns the model file. The caller holds the folder (`lock.locked`).

    Asked to stop by SIGINT or SIGTERM, it saves a state after the step at hand, and raises
    `KeyboardInterrupt` or `SystemExit(143)`. Raises `NumericalError` when `loop.bad_steps` steps in a row had
    a loss or gradient that is not finite, and for such weights, before they are written; `InputError` for
    states of another recipe, `CheckpointError` if all are damaged, `ResourceError` for a full disk.
    """
    loop, out, modules = config.loop, config.out, task.modules
    check_batch(loop.batch, processes.world)
    sharded = loop.parallel == "fsdp" and processes.world > 1
    if sharded:
        sharding.shard(modules, device, processes.world, config.optimizer)
    parameters = task.optimized()
    if sharded:
        sharding.check_trained(parameters, modules)
    replicated = [p for group in parameters.values() for p in group if not sharding.is_sharded(p)]
    buffers = [b for module in modules.values() for b in module.buffers() if b.is_floating_point()]
    processes.copy_first(replicated)
    optimizers = make_optimizers(config.optimizer, parameters, modules)
    averages = averages_of(modules, loop.half_lives)
    autocast = autocast_of(loop, device)

    # Resume: the newest whole state, and the metrics that belong to it.
    recipe = fingerprint(config, task.digest)
    state, warnings = latest_state(out / "states", recipe, processes)
    for warning in warnings:
        report({"warning": warning})
    if state is not None:
        restore(state, modules, averages, optimizers)
    seen = 0 if state is None else state.seen
    metrics = MetricsFile(out / "metrics.jsonl", seen) if processes.first else None
    board = Board(out, seen) if loop.tensorboard and processes.first else None

    def tell(line: Mapping[str, float]) -> None:
        if metrics is not None:
            metrics.write(line)
            if board is not None:
                board.write(line)
            report(line)

    def score() -> None:
        if processes.first or sharded:
            tell({"seen": seen} | _scores(task, averages["ema"], loop.score_raw, out, seen, processes))
        if processes.first:
            draw_curves(out)

    def save() -> None:
        now = State(seen, recipe, tensors_of(modules, averages, optimizers))
        save_state(out / "states", now, loop.keep, processes, loop.write_retries, report)

    step_images = loop.batch * loop.accumulate
    unscored = metrics is not None and seen > 0 and not metrics.scored
    if processes.largest([unscored])[0] and _due(seen, step_images, loop.preview_images, loop.images):
        score()  # the run was stopped before it
    window, bad_steps = Window(seen), 0
    with stoppable() as stop, closing(task.batches(seen, loop.batch, processes.share)) as batches:
        while seen < loop.images:
            # Gradients. Dropout alone draws from the global generator, which restarts from the image count.
            torch.manual_seed((config.seed * 1_000_003 + seen + processes.rank * 7_368_787) % 2**63)
            checked: dict[str, Tensor] = {}
            measured: dict[str, Tensor] = {}
            for _ in range(loop.accumulate):
                batch = window.wait_for(batches)
                with autocast():
                    for name, loss, values in task.losses(batch, seen):
                        inputs = None if sharded else parameters[name]  # sharded weights are no leaves
                        torch.autograd.backward(loss / loop.accumulate, inputs=inputs)
                        checked[f"{name} loss"] = checked.get(f"{name} loss", 0) + loss.detach()
                        for key, value in values.items():
                            total = torch.as_tensor(value, dtype=torch.float32, device=device).detach()
                            measured[key] = measured.get(key, 0) + total / loop.accumulate
            processes.average(replicated)

            # One step of every optimizer, or none.
            for name, group in parameters.items():
                checked[f"{name} gradient"] = sharding.clip(group, config.optimizer.clip_norm)
            wrong = _not_finite(checked)
            bad, asked = processes.largest([bool(wrong), stop.signal])
            bad_steps = bad_steps + 1 if bad else 0
            if bad_steps == loop.bad_steps:
                raise _diverged(wrong, seen, bad_steps, out)
            for optimizer in optimizers.values():
                set_rates(config.optimizer, optimizer, seen, loop.images)
                if not bad:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            processes.copy_first(buffers)
            seen += step_images
            for average in averages.values():
                average.update(seen, step_images)
            window.skip() if bad else window.add(measured)

            # Metrics, pictures, states.
            if _due(seen, step_images, loop.log_images, loop.images):
                tell(window.line(seen, loop.images, processes))
            if asked:
                save()
                told = f"{signal.Signals(asked).name}: saved at image {seen}; run again to go on"
                report({"warning": told})
                end(asked)
            if _due(seen, step_images, loop.preview_images, loop.images):
                score()
                window.resume(seen)
            if _due(seen, step_images, loop.save_images, loop.images):  # after its metrics: they are whole
                save()

    for name, average in averages.items():
        file = "model.safetensors" if name == "ema" else f"model-{name}.safetensors"
        if processes.first or sharded:
            with _lent(task, average), sharding.whole_states(modules), _folder(out, processes) as folder:
                task.finish(folder / file)
    return out / "model.safetensors"


def _scores(
    task: Task, average: Ema, raw: bool, out: Path, seen: int, processes: Processes
) -> dict[str, float]:
    """Held-out scores of the averaged weights, and of the weights themselves if asked; a sheet is written."""
    scores: dict[str, float] = {}
    if raw:
        with _evaluating(task.modules):
            scores = {f"raw_{name}": value for name, value in task.evaluate().items()}
    with _lent(task, average), _folder(out / "previews", processes) as folder:
        scores = task.evaluate() | scores
        scores |= task.preview(folder / f"{seen:09d}.png") or {}
    return scores


@contextmanager
def _lent(task: Task, average: Ema) -> Iterator[None]:
    """The averaged weights in the networks, which evaluate."""
    with average.applied(), _evaluating(task.modules):
        yield


@contextmanager
def _folder(wanted: Path, processes: Processes) -> Iterator[Path]:
    """The folder for the process that writes; for others, who compute along, one that is thrown away."""
    if processes.first:
        yield wanted
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _not_finite(values: Mapping[str, Tensor]) -> str:
    """The first value that is not finite, in words; empty if all are."""
    wrong = (f"{name} is {float(value)}" for name, value in values.items() if not math.isfinite(value))
    return next(wrong, "")


def _diverged(wrong: str, seen: int, steps: int, out: Path) -> NumericalError:
    after = f" after {steps - 1} more such steps" if steps > 1 else ""
    return NumericalError(
        f"the {wrong or 'loss of another process is not finite'} at image {seen}{after}; "
        f"the last state in {out / 'states'} is good",
        'Lower optimizer.learning_rate, or use loop.precision = "float32".',
    )


def _due(seen: int, step: int, every: int, images: int) -> bool:
    """Whether this step passed a multiple of `every`, or was the last."""
    return seen >= images or seen // every > (seen - step) // every


def autocast_of(loop: LoopConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    wanted = loop.precision
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if wanted == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


@contextmanager
def _evaluating(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules in evaluation mode without gradients, back in training mode afterwards."""
    for module in modules.values():
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules.values():
            module.train()
