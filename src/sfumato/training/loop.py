"""The one training loop: its clock is images seen, and the same command run again goes on where it stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.checkpoints.files import write_atomically
from sfumato.errors import NumericalError
from sfumato.training.config import LoopConfig, OptimizerConfig, TrainingConfig
from sfumato.training.ema import Ema
from sfumato.training.state import State, latest_state, save_state

RESUME_FREE = {
    "out",
    "device",
    "notices",
    "name",
}  # keys of a recipe that may change while a run is under way
LOOP_FREE = {"images", "log_images", "save_images", "preview_images", "keep"}


class Task(Protocol):
    """What is trained: networks, batches and losses. Everything else is the loop's."""

    modules: Mapping[str, nn.Module]
    digest: str

    def batches(self, seen: int, size: int) -> Iterator[Any]:
        """Batches from image `seen` of the run on, a function of the seed and `seen` alone."""
        ...

    def losses(self, batch: Any, seen: int) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        """Yield (optimizer name, loss, metrics); each optimizer owns the modules named in `optimized`."""
        ...

    def optimized(self) -> Mapping[str, list[nn.Parameter]]: ...

    def evaluate(self) -> dict[str, float]:
        """Held-out scores of the modules as they stand."""
        ...

    def preview(self, path: Path) -> None:
        """Write a PNG sheet of what the modules can do now."""
        ...

    def finish(self, path: Path) -> None:
        """Write the model file from the modules as they stand."""
        ...


def train(
    config: TrainingConfig, task: Task, device: torch.device, report: Callable[[dict[str, float]], None]
) -> Path:
    """Train until `config.loop.images`; returns the model file. `report` gets each line of metrics.

    Raises `NumericalError` at the first loss or gradient that is not finite, before anything is written.
    """
    loop, out = config.loop, config.out
    parameters = task.optimized()
    optimizers = {name: _adamw(group, config.optimizer) for name, group in parameters.items()}
    ema = Ema(task.modules, loop.ema_images)
    autocast = _autocast(loop, device)

    # Resume: the newest whole state, and the metrics that belong to it.
    fingerprint = _fingerprint(config, task)
    state, warnings = latest_state(out / "states", fingerprint)
    for warning in warnings:
        report({"warning": warning})  # type: ignore[dict-item]
    seen = 0
    if state is not None:
        seen = state.seen
        _restore(state.tensors, task.modules, ema, optimizers)
    metrics = Metrics(out / "metrics.jsonl", seen)

    step_images = loop.batch * loop.accumulate
    batches = task.batches(seen, loop.batch)
    totals: dict[str, Tensor] = {}
    steps, since, clock = 0, seen, time.perf_counter()
    while seen < loop.images:
        # One optimizer step. Dropout is the only user of the global generator, so it restarts from the image count.
        torch.manual_seed(config.seed * 1_000_003 + seen)
        for optimizer in optimizers.values():
            rate = learning_rate(config.optimizer, seen, loop.images)
            for group in optimizer.param_groups:
                group["lr"] = rate
        for _ in range(loop.accumulate):
            batch = next(batches)
            with autocast():
                for _, loss, values in task.losses(batch, seen):
                    (loss / loop.accumulate).backward()
                    for key, value in values.items():
                        total = torch.as_tensor(value, dtype=torch.float32, device=device).detach()
                        totals[key] = (
                            totals.get(key, torch.zeros((), device=device)) + total / loop.accumulate
                        )
        for name, optimizer in optimizers.items():
            norm = nn.utils.clip_grad_norm_(parameters[name], config.optimizer.clip_norm)
            if not math.isfinite(norm := float(norm)):
                raise NumericalError(
                    f"the gradient of {name} is {norm} at image {seen}; the last state in {out / 'states'} is good",
                    'Lower optimizer.learning_rate, or use loop.precision = "float32".',
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += step_images
        steps += 1
        ema.update(seen, step_images)

        # Metrics, pictures, states.
        if _passes(seen, step_images, loop.log_images) or seen >= loop.images:
            now = time.perf_counter()
            speed = (seen - since) / (now - clock)
            line = {key: float(value) / steps for key, value in totals.items()}
            line |= {"seen": seen, "images_per_second": speed, "seconds_left": (loop.images - seen) / speed}
            metrics.write(line)
            report(line)
            totals, steps, since, clock = {}, 0, seen, now
        if _passes(seen, step_images, loop.preview_images) or seen >= loop.images:
            with ema.applied() if loop.ema_images else nullcontext(), _evaluating(task.modules):
                scores = task.evaluate()
                task.preview(out / "previews" / f"{seen:09d}.png")
            metrics.write({"seen": seen, **scores})
            report({"seen": seen, **scores})
            since, clock = seen, time.perf_counter()
        if _passes(seen, step_images, loop.save_images) or seen >= loop.images:
            save_state(out / "states", _state(seen, fingerprint, task.modules, ema, optimizers), loop.keep)

    path = out / "model.safetensors"
    with ema.applied() if loop.ema_images else nullcontext(), _evaluating(task.modules):
        task.finish(path)
    return path


def learning_rate(config: OptimizerConfig, seen: int, images: int) -> float:
    """Linear warm-up, then constant, cosine to 0, or constant with the last fifth straight to 0."""
    warm = min(1.0, (seen + 1) / (config.warmup_images + 1))
    done = min(1.0, seen / images)
    fall = {
        "constant": 1.0,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * done),
        "trapezoid": min(1.0, (1 - done) * 5),
    }[config.decay]
    return config.learning_rate * warm * fall


class Metrics:
    """JSON lines, one per report; lines past the image a run resumes from are dropped."""

    def __init__(self, path: Path, seen: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _whole(line) and json.loads(line)["seen"] <= seen]
        text = "".join(line + "\n" for line in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def write(self, values: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: round(value, 6) for key, value in values.items()}) + "\n")


def _whole(line: str) -> bool:
    """A kill may leave a last line half written."""
    return line.startswith("{") and line.endswith("}")


def _passes(seen: int, step: int, every: int) -> bool:
    return seen // every > (seen - step) // every


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Weight decay on matrices and kernels only, as is common for norms and biases."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def _autocast(loop: LoopConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
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


def _fingerprint(config: TrainingConfig, task: Task) -> dict[str, Any]:
    values = config.model_dump(mode="json", exclude=RESUME_FREE)
    values["loop"] = {key: value for key, value in values["loop"].items() if key not in LOOP_FREE}
    values["data"].pop("path")
    return (
        {"data_digest": task.digest}
        | {f"{k}.{n}": v for k, t in values.items() if isinstance(t, dict) for n, v in t.items()}
        | {key: value for key, value in values.items() if not isinstance(value, dict)}
    )


def _state(
    seen: int,
    fingerprint: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    ema: Ema,
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> State:
    tensors = {
        f"module.{part}.{name}": value
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }
    tensors |= {f"ema.{name}": value for name, value in ema.average.items()}
    for part, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{part}.{index}.{key}": value for key, value in values.items()}
    return State(seen, fingerprint, tensors)


def _restore(
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    ema: Ema,
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> None:
    for part, module in modules.items():
        prefix = f"module.{part}."
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, strict=True
        )
    for name, average in ema.average.items():
        average.copy_(tensors[f"ema.{name}"])
    for part, optimizer in optimizers.items():
        prefix = f"optimizer.{part}."
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(prefix):
                index, key = name.removeprefix(prefix).split(".")
                state.setdefault(int(index), {})[key] = value.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
