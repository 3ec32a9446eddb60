"""One of two processes that train together: `test_distributed` starts it twice, with RANK 0 and 1.

It leaves folders of runs, the gradients of first steps and what was raised, for the tests to look at.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.checkpoints.files import write_tensors
from sfumato.errors import ResourceError, SfumatoError
from sfumato.training import sharding, state
from sfumato.training.config import TrainingConfig, read_config
from sfumato.training.data import WHOLE, Share
from sfumato.training.distributed import ALONE, Processes, joined
from sfumato.training.loop import Loss, Task, train
from sfumato.training.run import make_task

CPU = torch.device("cpu")


class Made:
    """A task on made-up pictures (b, 3, 8, 8), of which each process takes its share."""

    digest = "made"
    modules: Mapping[str, nn.Module]

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Tensor, None, None]:
        while True:
            whole = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seen))
            yield whole[share.rank :: share.world]
            seen += size

    def evaluate(self) -> dict[str, float]:
        return {}

    def preview(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def finish(self, path: Path) -> None:
        tensors = {
            f"{part}.{name}": t for part, m in self.modules.items() for name, t in m.state_dict().items()
        }
        write_tensors(path, tensors, {})


class Blocks(nn.Module):
    """Blocks in a list, as U-Nets have them, rows that two processes cannot halve, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.SiLU()) for _ in range(2)]
        )
        self.out = nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.mean(dim=(0, 2, 3)), 0.5)  # another in every process
        for block in self.blocks:
            x = x + block(x)
        return self.out(x) * self.scale


class Single(Made):
    """One network."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Blocks()
        self.modules = {"net": self.net}

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"net": list(self.net.parameters())}

    def losses(self, batch: Tensor, seen: int) -> Iterator[Loss]:
        loss = (self.net(batch) - 1).square().mean()
        yield "net", loss, {"loss": loss}


class Pair(Made):
    """Two networks with an optimizer each, that pull on each other as generator and discriminator do."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.maker = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3))
        self.critic = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 1, 1))
        self.modules = {"maker": self.maker, "critic": self.critic}
        self.unused = nn.Parameter(torch.ones(1))

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"maker": list(self.maker.parameters()), "critic": [*self.critic.parameters(), self.unused]}

    def losses(self, batch: Tensor, seen: int) -> Iterator[Loss]:
        made = self.maker(batch)
        loss = (made - 1).square().mean() - self.critic(made).mean()
        yield "maker", loss, {"made": loss}
        against = self.critic(made.detach()).square().mean() + (2 - self.critic(batch)).square().mean()
        yield "critic", against, {"against": against}


@contextmanager
def noted(path: Path, writes: bool) -> Iterator[None]:
    """Within the context the gradients of the first step of each optimizer go to a file."""
    clip = sharding.clip
    found: dict[int, list[Tensor]] = {}

    def noting(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        gradients = [sharding.whole(p.grad).flatten() for p in parameters if p.grad is not None]
        found.setdefault(id(parameters), [each.clone() for each in gradients])
        return clip(parameters, limit)

    sharding.clip = noting
    try:
        yield
    finally:
        sharding.clip = clip
    if writes:
        save_file({str(place): torch.cat(each) for place, each in enumerate(found.values())}, path)


def told(action: Callable[[], object]) -> str:
    """The kind and words of what an action raised."""
    try:
        action()
    except (SfumatoError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(root: Path, recipe: Path) -> None:
    with joined("cpu") as (processes, _):
        work(root, recipe, processes)


def work(root: Path, recipe: Path, processes: Processes) -> None:
    def config(name: str, *overrides: str) -> TrainingConfig:
        return read_config(recipe, [f"out={root / name}", *overrides])

    def fit(wanted: TrainingConfig, task: Task, among: Processes = processes) -> None:
        torch.manual_seed(wanted.seed)
        with noted(wanted.out.with_suffix(".safetensors"), among.first):
            train(wanted, task, CPU, lambda _: None, among)

    # The same runs by two and by one.
    fsdp = 'loop.parallel="fsdp"'
    short = ["loop.images=8", "loop.preview_images=1000", "loop.save_images=1000"]
    fit(config("pair-two"), Pair())
    fit(config("two"), Single())
    fit(config("sharded", fsdp), Single())
    if processes.first:
        fit(config("pair-one"), Pair(), ALONE)
        fit(config("one"), Single(), ALONE)
    # A U-Net's gradients; what it draws is for one process alone, and slow.
    for name, among in (("unet-one", ALONE), ("unet-two", processes), ("unet-sharded", processes)):
        wanted = config(name, *short, *([fsdp] if name == "unet-sharded" else []))
        torch.manual_seed(0)
        task = make_task(wanted, CPU)
        task.evaluate, task.preview, task.finish = dict, Single().preview, Single().preview
        if among is processes or processes.first:
            fit(wanted, task, among)

    # States of two for one, of one for two, and of two for two.
    fit(config("halved", "loop.images=16", fsdp), Single())
    fit(config("half-ddp", "loop.images=16"), Single())
    if processes.first:
        fit(config("half-one", "loop.images=16"), Single(), ALONE)
        shutil.copytree(root / "halved", root / "halved-then-one")
        shutil.copytree(root / "half-one", root / "one-then-sharded")
        fit(config("halved-then-one"), Single(), ALONE)
    processes.together(lambda: None)
    fit(config("one-then-sharded", fsdp), Single())
    fit(config("halved", fsdp), Single())
    fit(config("half-ddp"), Single())

    # What goes wrong in one process ends both, or is tried again by both.
    second = processes.rank == 1
    said: dict[str, str] = {}

    def fail() -> None:
        if second:
            raise ResourceError("the disk of the second is full")

    said["uneven"] = told(lambda: fit(config("uneven", "loop.batch=7"), Single()))
    eight_bits = config("whole", fsdp, 'optimizer.name="adam8bit"')
    said["needs whole weights"] = told(lambda: fit(eight_bits, Single()))
    said["two optimizers"] = told(lambda: fit(config("pair-sharded", fsdp), Pair()))
    said["one fails"] = told(lambda: processes.together(fail))
    said["one fails first"] = told(lambda: processes.in_turn(fail))
    said["first fails"] = told(
        lambda: processes.in_turn(lambda: processes.first and read_config(root / "none"))
    )
    said["write again"] = told(lambda: broken_once(lambda: fit(config("retried"), Single()), second, 1))
    said["never"] = told(lambda: broken_once(lambda: fit(config("gave-up"), Single()), second, 9))
    spoiled = Single()
    if second:
        spoiled.losses = spoiled_losses  # pyright: ignore[reportAttributeAccessIssue]
    said["not finite"] = told(lambda: fit(config("spoiled", "loop.bad_steps=2"), spoiled))

    # One is asked to stop: both save, and go on together.
    task = Single()
    if second:
        task.losses = asked_at(task, 16)  # pyright: ignore[reportAttributeAccessIssue]
    said["asked"] = told(lambda: fit(config("asked"), task))
    said["states"] = " ".join(sorted(path.name for path in (root / "asked" / "states").iterdir()))
    fit(config("asked"), Single())
    (root / f"said-{processes.rank}.json").write_text(json.dumps(said))


def broken_once(action: Callable[[], None], broken: bool, times: int) -> None:
    """Do an action while this process's first writes of tensors fail, if it is the broken one."""
    left = [times if broken else 0]
    write, state.PAUSE = state.write_tensors, 0.01

    def writing(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        write(path, tensors, metadata)

    state.write_tensors = writing
    try:
        action()
    finally:
        state.write_tensors = write


def asked_at(task: Single, at: int) -> Callable[[Tensor, int], Iterator[Loss]]:
    losses = task.losses

    def asking(batch: Tensor, seen: int) -> Iterator[Loss]:
        if seen == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(batch, seen)

    return asking


def spoiled_losses(batch: Tensor, seen: int) -> Iterator[Loss]:
    task = Single()
    yield "net", task.net(batch).sum() * torch.nan, {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
