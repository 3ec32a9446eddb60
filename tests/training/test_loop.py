"""The training loop: what it computes and writes, and that going on is like never having stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.checkpoints.files import read_tensors
from sfumato.errors import CheckpointError, InputError, NumericalError, ResourceError
from sfumato.training.config import TrainingConfig
from sfumato.training.data import WHOLE, Share
from sfumato.training.lock import locked
from sfumato.training.loop import Loss, Task, train
from sfumato.training.run import make_task, run

CPU = torch.device("cpu")
Recipe = Callable[..., TrainingConfig]
Trained = Callable[..., Path]
Lines = list[dict[str, Any]]


class Line:
    """A task that fits y = 2x - 1; the batch is a function of the image count."""

    digest = "line"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(1, 1)
        self.modules: Mapping[str, nn.Module] = {"net": self.net}
        self.spoil: Callable[[int, Tensor], Tensor] = lambda seen, loss: loss
        self.closed = False

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"line": list(self.net.parameters())}

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Tensor, None, None]:
        try:
            while True:
                yield torch.randn(size, 1, generator=torch.Generator().manual_seed(seen))
                seen += size
        finally:
            self.closed = True

    def losses(self, batch: Tensor, seen: int) -> Iterator[Loss]:
        loss = (self.net(batch) - 2 * batch + 1).square().mean()
        yield "line", self.spoil(seen, loss), {"loss": loss, "twice": 2 * loss.item()}

    def evaluate(self) -> dict[str, float]:
        assert not self.net.training and not torch.is_grad_enabled()
        return {"held_out": self.net.weight.item()}

    def preview(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(self.net.weight.item()))

    def finish(self, path: Path) -> None:
        path.write_text(str(self.net.state_dict()))


@pytest.fixture
def config(recipe: Recipe, tmp_path: Path) -> TrainingConfig:
    return recipe("autoencoder", tmp_path / "run", optimizer={"learning_rate": 0.1, "decay": "constant"})


def fit(config: TrainingConfig, task: Task | None = None) -> Lines:
    lines: Lines = []
    train(config, task or Line(), CPU, lambda line: lines.append(dict(line)))
    return lines


def digests(out: Path) -> dict[str, str]:
    """Of everything that a run leaves, but for its speed and its lock."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.name == "metrics.jsonl":
            found[path.name] = str(metrics(out))
        elif path.is_file() and path.name not in ("lock", "curves.png"):  # which shows the speed
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def metrics(out: Path) -> Lines:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if "second" not in key and key != "busy"} for line in lines
    ]


def test_what_a_run_writes_and_reports(config: TrainingConfig) -> None:
    task = Line()
    lines = fit(config, task)
    assert task.closed
    assert [line["seen"] for line in lines] == [4, 8, 12, 16, 16, 20, 24, 28, 32, 32]
    assert [line["seen"] for line in lines if "held_out" in line] == [16, 32]
    assert {"loss", "twice", "seen", "images_per_second", "seconds_left", "busy"} == lines[0].keys()
    assert lines[0]["twice"] == pytest.approx(2 * lines[0]["loss"]) and lines[-2]["seconds_left"] == 0
    assert lines[-2]["loss"] < lines[0]["loss"] / 4
    assert [line["seen"] for line in metrics(config.out)] == [line["seen"] for line in lines]
    assert {path.name for path in config.out.iterdir()} == {
        "curves.png", "metrics.jsonl", "model.safetensors", "previews", "states",
    }  # fmt: skip
    assert [path.name for path in sorted((config.out / "previews").iterdir())] == [
        "000000016.png", "000000032.png",
    ]  # fmt: skip
    assert [path.name for path in sorted((config.out / "states").iterdir())] == [
        "000000000024", "000000000032",
    ]  # fmt: skip


def test_metrics_are_means_over_the_images_since_the_last_line(recipe: Recipe, tmp_path: Path) -> None:
    often, seldom = (
        fit(recipe("autoencoder", tmp_path / str(images), loop={"log_images": images})) for images in (4, 16)
    )
    means = [line["loss"] for line in seldom if "loss" in line]
    losses = [line["loss"] for line in often if "loss" in line]
    assert means == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])


def test_images_that_no_step_divides(recipe: Recipe, tmp_path: Path) -> None:
    loop = {"images": 10, "batch": 4, "save_images": 1000, "log_images": 1000, "preview_images": 1000}
    lines = fit(recipe("autoencoder", tmp_path / "run", loop=loop))
    assert [line["seen"] for line in lines] == [12, 12]
    assert (tmp_path / "run" / "states" / "000000000012").is_dir()


@pytest.mark.parametrize("at", [0, 4, 12])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, at: int, kind: str
) -> None:
    config = recipe("autoencoder", tmp_path / "run", loop={"bad_steps": 1})

    def spoil(seen: int, loss: Tensor) -> Tensor:
        if seen < at:
            return loss
        return loss * torch.inf if kind == "loss" else Infinite.apply(loss)

    task = Line()
    task.spoil = spoil
    with pytest.raises(NumericalError, match=f"line {kind} is .* at image {at};"):
        fit(config, task)
    assert task.closed
    assert [line["seen"] for line in metrics(config.out)] == list(range(4, at + 1, 4))
    assert len(list((config.out / "states").glob("*"))) == (1 if at >= 8 else 0)
    resumed = fit(config)  # with the fault gone
    assert resumed[0]["seen"] == (12 if at >= 8 else 4)


def test_steps_that_are_not_finite_are_left_out_and_counted(config: TrainingConfig) -> None:
    task, moved = Line(), []
    bad = {8, 12, 20}

    def spoil(seen: int, loss: Tensor) -> Tensor:
        moved.append(task.net.weight.item())
        return loss * torch.nan if seen in bad else loss

    task.spoil = spoil
    lines = [line for line in fit(config, task) if "images_per_second" in line]
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 1, 0, 1, 0, 0]
    assert [seen for seen, line in zip(range(0, 32, 4), lines, strict=True) if "loss" not in line] == [
        8,
        12,
        20,
    ]
    assert moved[2] == moved[3] == moved[4] != moved[5] == moved[6] != moved[7]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_too_many_such_steps_in_a_row_end_the_run(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe("autoencoder", tmp_path / "run", loop={"bad_steps": 3})
    task = Line()
    task.spoil = lambda seen, loss: loss * torch.inf if seen >= 12 or seen == 4 else loss
    with pytest.raises(
        NumericalError, match="line loss is inf at image 20 after 2 more such steps; the last"
    ):
        fit(config, task)
    weights = read_tensors(sorted((config.out / "states").iterdir())[-1] / "tensors.safetensors")[0]
    assert len(weights) == 10 and all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_a_signal_saves_within_a_step(
    recipe: Recipe, tmp_path: Path, number: int, status: int | None
) -> None:
    config = recipe("autoencoder", tmp_path / "run", loop={"save_images": 1000, "preview_images": 16})
    whole = recipe("autoencoder", tmp_path / "whole", loop={"save_images": 1000, "preview_images": 16})
    fit(whole)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    for at, saved in ((4, 8), (12, 16), (28, 32)):  # also where scores are due, and at the end
        task, told = Line(), []
        task.spoil = lambda seen, loss, at=at: (signal.raise_signal(number), loss)[1] if seen == at else loss
        with pytest.raises(SystemExit if status else KeyboardInterrupt) as ended:
            train(config, task, CPU, lambda line, told=told: told.append(dict(line)))
        assert not status or ended.value.args == (status,)
        assert told[-1]["warning"].endswith(f"saved at image {saved}; run again to go on")
        assert sorted((config.out / "states").iterdir())[-1].name == f"{saved:012d}"
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    fit(config)
    assert metrics(config.out) == metrics(whole.out)
    a, b = (digests(folder) for folder in (config.out, whole.out))
    assert {name: a[name] for name in b} == b


def test_a_second_interrupt_ends_at_once(config: TrainingConfig) -> None:
    task = Line()

    def spoil(seen: int, loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return loss

    task.spoil = spoil
    with pytest.raises(KeyboardInterrupt):
        fit(config, task)
    assert not (config.out / "states").exists()


def test_averages_of_several_lengths(recipe: Recipe, tmp_path: Path) -> None:
    several = recipe("autoencoder", tmp_path / "several", loop={"ema_images": [16, 1, 0]})
    fit(several)
    one = recipe("autoencoder", tmp_path / "one", loop={"ema_images": 1})
    fit(one)
    files = {path.name: path.read_text() for path in several.out.glob("model*")}
    assert files.keys() == {"model.safetensors", "model-ema-1.safetensors", "model-ema-0.safetensors"}
    assert len(set(files.values())) == 3
    assert files["model-ema-1.safetensors"] == (one.out / "model.safetensors").read_text()
    state = read_tensors(several.out / "states/000000000032/tensors.safetensors")[0]
    assert {"ema.net.weight", "ema-1.net.weight", "ema-0.net.weight"} <= state.keys()
    assert several.loop.half_lives == (16, 1, 0) and one.loop.half_lives == (1,)
    with pytest.raises(KeyboardInterrupt):
        train(
            recipe("autoencoder", tmp_path / "again", loop={"ema_images": [16, 1, 0]}),
            Line(),
            CPU,
            stop_at(20),
        )
    again = recipe("autoencoder", tmp_path / "again", loop={"ema_images": [16, 1, 0]})
    fit(again)
    assert digests(again.out) == digests(several.out)


def test_raw_weights_are_scored_beside_their_average(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(
        "autoencoder", tmp_path / "run", loop={"score_raw": True}, optimizer={"learning_rate": 0.1}
    )
    task = Line()
    scores = [line for line in fit(config, task) if "held_out" in line]
    assert scores[-1]["raw_held_out"] == pytest.approx(task.net.weight.item(), abs=1e-6)
    assert scores[-1]["held_out"] != scores[-1]["raw_held_out"]


class Infinite(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


class Rivals(Line):
    """Two losses that pull each other's weight the other way, as a generator's and a discriminator's do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(1, 1, bias=False) for _ in range(2))
        for module in (self.a, self.b):
            nn.init.ones_(module.weight)
        self.modules = {"a": self.a, "b": self.b}
        self.differentiated: list[bool] = []

    def evaluate(self) -> dict[str, float]:
        return {}

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"first": list(self.a.parameters()), "second": list(self.b.parameters())}

    def losses(self, batch: Tensor, seen: int) -> Iterator[Loss]:
        both = self.a.weight.sum() + 3 * self.b.weight.sum()
        yield "first", both, {"first": both}
        self.differentiated.append(self.a.weight.grad is not None and self.b.weight.grad is None)
        other = -both - 10 * self.a.weight.sum()
        yield "second", other, {"second": other}


def test_each_loss_steps_the_parameters_of_its_optimizer_alone(recipe: Recipe, tmp_path: Path) -> None:
    task = Rivals()
    one_step = {"images": 4, "ema_images": 0}
    rate = {"learning_rate": 0.1, "weight_decay": 0.0, "warmup_images": 0, "decay": "constant"}
    fit(recipe("autoencoder", tmp_path / "run", loop=one_step, optimizer=rate), task)
    assert task.differentiated == [True]
    # Adam's first step is the learning rate times the gradient's sign: a falls by its loss, b rises by its.
    assert task.a.weight.item() == pytest.approx(0.9) and task.b.weight.item() == pytest.approx(1.1)
    names = read_tensors(tmp_path / "run/states/000000000004/tensors.safetensors")[0].keys()
    assert {"optimizer.first.0.exp_avg", "optimizer.second.0.exp_avg", "ema.b.weight"} <= names


def test_accumulation_equals_the_larger_batch(recipe: Recipe, trained: Trained, tmp_path: Path) -> None:
    smooth = {"eps": 1.0}  # else Adam makes whole steps of gradients that are rounding errors
    weights = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        loop = {"images": 16, "batch": batch, "accumulate": accumulate}
        out = tmp_path / str(batch)
        trained(recipe("autoencoder", out, loop=loop, optimizer=smooth))
        weights.append(read_tensors(out / "states" / "000000000016" / "tensors.safetensors")[0])
        assert [line["seen"] for line in metrics(out)] == [4, 8, 12, 16, 16]
    for other in weights[1:]:
        for name, value in weights[0].items():
            assert torch.allclose(value, other[name], rtol=0, atol=1e-6), name
    assert not torch.equal(weights[0]["module.autoencoder.quant_conv.weight"], torch.zeros(4, 4, 1, 1))


def stop_at(*images: int) -> Callable[[Mapping[str, float | str]], None]:
    """A report that interrupts a run, as Ctrl-C does, at the first line of each of these image counts."""
    left = list(images)

    def report(line: Mapping[str, float | str]) -> None:
        if line.get("seen") in left:
            left.remove(int(line["seen"]))
            raise KeyboardInterrupt

    return report


@pytest.fixture(scope="module")
def drawn(latent: Recipe, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished text-to-image run."""
    return trained(latent(tmp_path_factory.mktemp("drawn") / "run")).parent


def test_going_on_is_the_same_as_never_having_stopped(
    recipe: Recipe, latent: Recipe, first_stage: Path, drawn: Path, trained: Trained, tmp_path: Path
) -> None:
    for config, undisturbed in (
        (recipe("autoencoder", tmp_path / "first"), first_stage),
        (latent(tmp_path / "second"), drawn),
    ):
        report = stop_at(4, 12, 24, 32)  # before any state, after one, while one is due, at the end
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                trained(config, report)
        trained(config, report)
        assert digests(config.out) == digests(undisturbed)
        seen = [(line["seen"], "loss" in line) for line in metrics(config.out)]
        assert len(seen) == len(set(seen)) == 10


def test_the_number_of_workers_changes_nothing(
    recipe: Recipe, first_stage: Path, trained: Trained, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(recipe("autoencoder", tmp_path / "run", data={"workers": 0}), stop_at(20))
    model = trained(recipe("autoencoder", tmp_path / "run", data={"workers": 5}))
    assert model.read_bytes() == (first_stage / "model.safetensors").read_bytes()


def test_a_finished_run_makes_its_model_again(drawn: Path, latent: Recipe, trained: Trained) -> None:
    before = digests(drawn)
    (drawn / "model.safetensors").unlink()
    trained(latent(drawn))
    assert digests(drawn) == before


def test_moments_come_back_in_the_layout_of_their_weights(latent: Recipe, drawn: Path) -> None:
    """Fused AdamW reads memory in order: a moment in another layout would move other weights."""
    kernels = [p for p in make_task(latent(drawn), CPU).modules["unet"].parameters() if p.ndim == 4]
    assert any(not p.is_contiguous() for p in kernels), "else the runs above prove nothing"


def test_torn_metrics_are_dropped(config: TrainingConfig) -> None:
    fit(config)
    whole = metrics(config.out)
    with (config.out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"seen": 36}\n{"loss": 1.0}\n[]\n{"seen": "x"}\nnull}\n\xff\xfe}\n{"seen": 3, "lo')
    fit(config)
    assert metrics(config.out) == whole


def test_a_changed_recipe_is_refused(recipe: Recipe, config: TrainingConfig) -> None:
    fit(config)
    before = digests(config.out)
    optimizer = {"learning_rate": 0.1, "decay": "cosine"}
    changed = recipe("autoencoder", config.out, seed=4, loop={"batch": 8}, optimizer=optimizer)
    with pytest.raises(
        InputError, match=r"loop.batch: 4 -> 8; optimizer.decay: .* -> 'cosine'; seed: 3 -> 4"
    ):
        fit(changed)
    other = Line()
    other.digest = "other pictures"
    with pytest.raises(InputError, match="data_digest: 'line' -> 'other pictures'"):
        fit(config, other)
    assert digests(config.out) == before


def test_what_may_change_while_a_run_is_under_way(recipe: Recipe, config: TrainingConfig) -> None:
    fit(config)
    longer = recipe(
        "autoencoder", config.out, name="other", notices="credits",
        loop={"images": 40, "log_images": 8, "save_images": 4, "preview_images": 8, "keep": 1},
        optimizer={"learning_rate": 0.1, "decay": "constant"},
    )  # fmt: skip
    assert [line["seen"] for line in fit(longer)] == [40, 40]
    assert [path.name for path in (config.out / "states").iterdir()] == ["000000000040"]


def test_a_damaged_newest_state_is_passed_over(config: TrainingConfig) -> None:
    fit(config)
    before = digests(config.out)
    (config.out / "states" / "000000000032" / "state.json").write_text("{")
    lines = fit(config)
    assert "000000000032 is damaged and passed over" in lines[0]["warning"]
    assert [line.get("seen") for line in lines] == [None, 28, 32, 32]
    assert digests(config.out) == before
    for state in (config.out / "states").iterdir():
        (state / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"Delete .* to begin again"):
        fit(config)


def test_a_state_of_other_networks_is_refused(config: TrainingConfig) -> None:
    fit(config)
    task = Line()
    task.net = nn.Linear(1, 2)
    task.modules = {"net": task.net}
    with pytest.raises(
        CheckpointError,
        match=r"at image 32 does not fit, 4 tensors differ: ema\.net\.bias: shape \(1,\) for shape \(2,\)",
    ):
        fit(config, task)


def toml(config: TrainingConfig, path: Path) -> Path:
    """The parts of an autoencoder recipe that differ from the defaults, as a file."""
    values = json.loads(config.model_dump_json(exclude_none=True, exclude_unset=True))
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for table, entries in values.items():
        if isinstance(entries, dict):
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in entries.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_run_trains_by_a_file_and_holds_its_folder(
    recipe: Recipe, first_stage: Path, tmp_path: Path, pictures: Path
) -> None:
    path = toml(recipe("autoencoder", tmp_path / "run"), tmp_path / "recipe.toml")
    held: list[str] = []

    def report(_: object) -> None:
        with pytest.raises(ResourceError, match="is training in"), locked(tmp_path / "run"):
            pass
        held.append("yes")

    assert run(path, report=report) == tmp_path / "run" / "model.safetensors"
    assert len(held) >= 10 and digests(tmp_path / "run") == digests(first_stage)
    with pytest.raises(InputError, match="inside of the pictures' folder"):
        run(path, [f"out={pictures / 'runs'}"])


CHILD = """
import sys, time, torch
from pathlib import Path
import sfumato.training.state as state
from sfumato.training.run import run
torch.set_num_threads(int(sys.argv[2]))
digest = state.sha256
state.sha256 = lambda path: (time.sleep(0.3), digest(path))[1]  # a disk so slow that the kill finds the save
run(Path(sys.argv[1]), report=lambda _: time.sleep(0.02))
"""


@pytest.mark.slow
def test_killed_for_real(recipe: Recipe, first_stage: Path, tmp_path: Path) -> None:
    """kill -9 while training, then, once resumed, inside of a save; the next command ends like no other."""
    path = toml(recipe("autoencoder", tmp_path / "run"), tmp_path / "recipe.toml")
    states = tmp_path / "run" / "states"
    source = str(Path(train.__code__.co_filename).parents[2])
    command = [sys.executable, "-c", CHILD, str(path), str(torch.get_num_threads())]

    def kill_when(ready: Callable[[], bool]) -> None:
        child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": source})
        while not ready():
            assert child.poll() is None, "the run ended before its kill"
            time.sleep(0.001)
        child.kill()
        assert child.wait() == -signal.SIGKILL

    kill_when((states / "000000000008").exists)
    kill_when(lambda: any(states.glob(".000000000024.*.tmp")))
    assert any(states.glob(".000000000024.*.tmp")) and not (states / "000000000024").exists()
    subprocess.run(command, env={**os.environ, "PYTHONPATH": source}, check=True)
    assert digests(tmp_path / "run") == digests(first_stage)
