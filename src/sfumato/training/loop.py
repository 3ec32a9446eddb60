"""The one training loop: its clock is images seen; the same command run again goes on where it stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.checkpoints.files import disk_errors, write_atomically
from sfumato.checkpoints.load import check_fit, copy_into
from sfumato.errors import NumericalError
from sfumato.training.config import LoopConfig, OptimizerConfig, TrainingConfig
from sfumato.training.data import WHOLE, Share
from sfumato.training.ema import Ema
from sfumato.training.state import State, latest_state, save_state

# What may change in a recipe while its run is under way.
RESUME_FREE = {"out", "device", "notices", "name"}
LOOP_FREE = {"images", "log_images", "save_images", "preview_images", "keep"}

Report = Callable[[Mapping[str, float | str]], None]
"""Is told each line of metrics, and warnings as {"warning": text}."""
Loss = tuple[str, Tensor, Mapping[str, float | Tensor]]
"""(optimizer, scalar, metrics)."""


class Task(Protocol):
    """What is trained: networks, batches and losses. Everything else is the loop's."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The networks whose weights are saved and averaged."""
        ...

    @property
    def digest(self) -> str:
        """Changes with the data and the files that training reads."""
        ...

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        """The parameters that each optimizer steps."""
        ...

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Any, None, None]:
        """This process's share of batches of `size` from image `seen` of the run on.

        They are a function of the seed and `seen` alone.
        """
        ...

    def losses(self, batch: Any, seen: int) -> Iterator[Loss]:
        """Yield losses in turn; the gradient of each goes to the parameters of its optimizer and no others.

        Each is differentiated before the next is asked for; the optimizers step after the last. So a second
        network, such as a discriminator, is a second loss.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Held-out scores of the modules as they stand."""
        ...

    def preview(self, path: Path) -> None:
        """Write a PNG sheet of what the modules can do now."""
        ...

    def finish(self, path: Path) -> None:
        """Write the model file from the modules as they stand."""
        ...


def train(config: TrainingConfig, task: Task, device: torch.device, report: Report) -> Path:
    """Train until `config.loop.images`; returns the model file. The caller holds the folder (`lock.locked`).

    Raises `NumericalError` at the first loss, gradient or weight that is not finite, before it is written;
    `InputError` for states of another recipe, `CheckpointError` if all are damaged, `ResourceError` for a
    full disk.
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
        report({"warning": warning})
    if state is not None:
        _restore(state, task.modules, ema, optimizers)
    seen = 0 if state is None else state.seen
    metrics = MetricsFile(out / "metrics.jsonl", seen)

    step_images = loop.batch * loop.accumulate
    totals: dict[str, Tensor] = {}
    steps, since, clock = 0, seen, time.perf_counter()
    with closing(task.batches(seen, loop.batch)) as batches:
        while seen < loop.images:
            # Gradients. Dropout alone draws from the global generator, which restarts from the image count.
            torch.manual_seed((config.seed * 1_000_003 + seen) % 2**63)
            checked: dict[str, Tensor] = {}
            for _ in range(loop.accumulate):
                batch = next(batches)
                with autocast():
                    for name, loss, values in task.losses(batch, seen):
                        torch.autograd.backward(loss / loop.accumulate, inputs=parameters[name])
                        checked[f"{name} loss"] = checked.get(f"{name} loss", 0) + loss.detach()
                        for key, value in values.items():
                            total = torch.as_tensor(value, dtype=torch.float32, device=device).detach()
                            totals[key] = totals.get(key, 0) + total / loop.accumulate

            # One step of every optimizer, or none.
            for name, group in parameters.items():
                norm = nn.utils.clip_grad_norm_(group, config.optimizer.clip_norm)
                checked[f"{name} gradient"] = norm
            _check_finite(checked, seen, out)
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config.optimizer, seen, loop.images)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seen += step_images
            steps += 1
            ema.update(seen, step_images)

            # Metrics, pictures, states.
            last = seen >= loop.images
            if last or _passes(seen, step_images, loop.log_images):
                now = time.perf_counter()
                speed = (seen - since) / (now - clock)
                line = {key: float(value) / steps for key, value in totals.items()}
                line |= {"seen": seen, "images_per_second": speed}
                line["seconds_left"] = max(0, loop.images - seen) / speed
                metrics.write(line)
                report(line)
                totals, steps, since, clock = {}, 0, seen, now
            if last or _passes(seen, step_images, loop.preview_images):
                with ema.applied(), _evaluating(task.modules):
                    scores = {"seen": seen, **task.evaluate()}
                    task.preview(out / "previews" / f"{seen:09d}.png")
                metrics.write(scores)
                report(scores)
                since, clock = seen, time.perf_counter()
            if last or _passes(seen, step_images, loop.save_images):  # after its metrics: they are whole then
                save_state(
                    out / "states", _state(seen, fingerprint, task.modules, ema, optimizers), loop.keep
                )

    path = out / "model.safetensors"
    with ema.applied(), _evaluating(task.modules):
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


class MetricsFile:
    """JSON lines, one per report; lines past the image a run resumes from are dropped."""

    def __init__(self, path: Path, seen: int) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        kept = "".join(line for line in text.splitlines(keepends=True) if 0 <= _seen(line) <= seen)
        write_atomically(path, lambda temporary: temporary.write_text(kept, encoding="utf-8"))

    def write(self, values: Mapping[str, float]) -> None:
        line = json.dumps({key: round(value, 6) for key, value in values.items()}) + "\n"
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)


def _seen(line: str) -> int:
    """The image count of a line of metrics, -1 for what a kill left half written."""
    if not line.endswith("}\n"):
        return -1
    try:
        return int(json.loads(line)["seen"])
    except (ValueError, TypeError, KeyError):
        return -1


def _check_finite(values: Mapping[str, Tensor], seen: int, out: Path) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise NumericalError(
                f"the {name} is {float(value)} at image {seen}; the last state in {out / 'states'} is good",
                'Lower optimizer.learning_rate, or use loop.precision = "float32".',
            )


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
    state: State, modules: Mapping[str, nn.Module], ema: Ema, optimizers: Mapping[str, torch.optim.Optimizer]
) -> None:
    """Put a state back, in place; `CheckpointError` if it is of other networks."""
    failure = f"the state at image {state.seen} does not fit"
    for part, module in modules.items():
        copy_into(module, _within(state.tensors, f"module.{part}."), failure)
    averages = _within(state.tensors, "ema.")
    check_fit(ema.average, averages, failure)
    for name, average in ema.average.items():
        average.copy_(averages[name])
    for part, optimizer in optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        restored: dict[int, dict[str, Tensor]] = {}
        for name, value in _within(state.tensors, f"optimizer.{part}.").items():
            index, key = name.split(".")
            like = parameters[int(index)]
            # In the layout of the parameter, not the file's: fused AdamW walks through memory, not indices.
            value = value.clone() if value.shape != like.shape else torch.empty_like(like).copy_(value)
            restored.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
