"""What both sides of a comparison share: the task they are given, the clock, the memory, the inputs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROMPTS = ["a photograph of an astronaut riding a horse", ""]
GUIDANCE = 7.5
STEPS = 8


@dataclass(frozen=True)
class Task:
    """One run of one side: what to do, with which weights, at which size, how often, and where to put it."""

    kind: str
    source: str
    pixels: int
    repeats: int
    threads: int
    output: str
    context_dim: int
    spawned: float  # seconds since the epoch at which the process was asked for


@dataclass
class Outcome:
    """What a side measured; memory in MB. `besides`: the warm step that a cold start's `seconds` hold.

    `anonymous_mb` is what loading took of memory that no file backs, `private_mb` what the process holds of
    it at the end.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    load_seconds: float = 0.0
    anonymous_mb: float = 0.0
    besides: float = 0.0
    peak_mb: float = 0.0
    private_mb: float = 0.0


def memory(field_name: str) -> float:
    """MB of this process by the kernel's name: VmHWM the peak, RssAnon what no file backs."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field_name)


class Stopwatch:
    """Loads once, then times calls: wall-clock and this process's own CPU seconds."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.outcome = Outcome()

    def load(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, which loads a model; its seconds and anonymous memory are kept."""
        before, started = memory("RssAnon"), time.perf_counter()
        loaded = call()
        self.outcome.load_seconds = time.perf_counter() - started
        self.outcome.anonymous_mb = memory("RssAnon") - before
        return loaded

    def repeat(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, timed `repeats` times after one run that is not."""
        result = call()
        for _ in range(self.task.repeats):
            result = self.once(call)
        return result

    def once(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, timed."""
        started, cpu = time.perf_counter(), time.process_time()
        result = call()
        self.outcome.seconds.append(time.perf_counter() - started)
        self.outcome.cpu_seconds.append(time.process_time() - cpu)
        return result

    def since_spawned(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, timed from the start of the process on; then once more, warm, to know it."""
        result = call()
        total, cpu = time.time() - self.task.spawned, time.process_time()
        started = time.perf_counter()
        call()
        self.outcome.besides = time.perf_counter() - started
        self.outcome.seconds.append(total)
        self.outcome.cpu_seconds.append(2 * cpu - time.process_time())
        return result


def noise(shape: tuple[int, ...], seed: int) -> Any:
    """A tensor of unit noise, the same on both sides."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(task: Task, batch: int) -> Any:
    """Noised latents (batch, 4, h / 8, w / 8)."""
    return noise((batch, 4, task.pixels // 8, task.pixels // 8), seed=1)


def run(cases: dict[str, Callable[[Task, Stopwatch], Any]]) -> None:
    """Do the task on the command line, write its result, print what was measured as the last line."""
    task = Task(**json.loads(sys.argv[1]))
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(task.threads)
    watch = Stopwatch(task)
    with torch.inference_mode():
        result = cases[task.kind](task, watch)
    watch.outcome.peak_mb, watch.outcome.private_mb = memory("VmHWM"), memory("RssAnon")
    save_file({"result": result.float().contiguous()}, task.output)
    print(json.dumps(asdict(watch.outcome)))
