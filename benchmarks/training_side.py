"""What both sides of the training comparison share: sizes, and what is measured of a process."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from compare_side import memory

PICTURES, PIXELS, STORED = (
    512,
    64,
    256,
)  # how many, at what size they are trained, at what size they lie there
BATCH, WARM_UP = 32, 4  # pictures in a step, steps that are not counted
LEARNING_RATE, CLIP_NORM, EMA_DECAY = 5e-4, 1.0, 0.9999
TOKENS, TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_INNER, VOCABULARY = 32, 256, 3, 4, 768, 1536
WIDTHS, HEAD_WIDTH, GROUPS, CHANNELS = (64, 128, 192), 32, 16, 4  # the recipe folder-diffusion.toml


@dataclass
class Watch:
    """Seconds and memory of one side's run."""

    imported_mb: float = field(default_factory=lambda: memory("RssAnon"))
    started: float = field(default_factory=time.perf_counter)
    cpu_started: float = field(default_factory=time.process_time)
    ends: list[float] = field(default_factory=list)
    cpu_ends: list[float] = field(default_factory=list)
    private_mb: float = 0.0

    def step(self) -> None:
        """A training step has ended."""
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())
        self.private_mb = max(self.private_mb, memory("RssAnon"))


@dataclass(frozen=True)
class Outcome:
    """Steps after the first ones and images since the start, by the clock and by processor time; MB."""

    steps_per_second: float
    images_per_second: float
    steps_per_cpu_second: float
    images_per_cpu_second: float
    peak_mb: float
    private_mb: float
    imported_mb: float
    parameters: int
    last_loss: float


def options() -> argparse.Namespace:
    """What a side is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--encode", action="store_true", help="make the latents and no more")
    parser.add_argument("--cached", action="store_true", help="the latents are there")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def tell(watch: Watch, parameters: int, last_loss: float) -> None:
    """Print the outcome as the last line."""
    bare, whole = _rates(watch.started, watch.ends)
    cpu_bare, cpu_whole = _rates(watch.cpu_started, watch.cpu_ends)
    peak = memory("VmHWM")
    outcome = Outcome(
        bare, whole, cpu_bare, cpu_whole, peak, watch.private_mb, watch.imported_mb, parameters, last_loss
    )
    sys.stdout.write("\n" + json.dumps(asdict(outcome)) + "\n")


def _rates(started: float, ends: list[float]) -> tuple[float, float]:
    """(steps a second after the first ones, images a second since the start)."""
    return (len(ends) - WARM_UP) / (ends[-1] - ends[WARM_UP - 1]), len(ends) * BATCH / (ends[-1] - started)
