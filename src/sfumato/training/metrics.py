"""The lines of metrics that a run writes, which belong to its states."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from sfumato.checkpoints.files import disk_errors, write_atomically
from sfumato.training.distributed import Processes

Batch = TypeVar("Batch")
SPEED = "images_per_second"


class Window:
    """What was measured since the last line: its means, and the speed."""

    def __init__(self, seen: int) -> None:
        self.clear(seen)

    def clear(self, seen: int) -> None:
        """Begin anew at an image count."""
        self.totals: dict[str, Tensor] = {}
        self.steps = self.skipped = 0
        self.resume(seen)

    def resume(self, seen: int) -> None:
        """Leave the time since the last line out of the speed."""
        self.since, self.clock, self.waited = seen, time.perf_counter(), 0.0

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time that it takes to come is not the accelerator's."""
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count a step and what it measured."""
        self.steps += 1
        self.totals = self.totals | {key: self.totals.get(key, 0) + value for key, value in values.items()}

    def skip(self) -> None:
        """Count a step that was not taken."""
        self.skipped += 1

    def line(self, seen: int, images: int, processes: Processes) -> dict[str, float]:
        """The means over all processes up to image `seen` of a run of `images`; the next ones begin here."""
        means = {key: float(value) / self.steps for key, value in self.totals.items()}
        if processes.world > 1:
            told = processes.gathered(means)
            means = {key: sum(each.get(key, 0.0) for each in told) / len(told) for key in means}
        elapsed = time.perf_counter() - self.clock
        speed = (seen - self.since) / elapsed
        line = means | {"seen": seen, SPEED: speed, "seconds_left": max(0, images - seen) / speed}
        line["busy"] = 1 - self.waited / elapsed  # the share of time in which no picture was waited for
        if self.skipped:
            line["skipped_steps"] = self.skipped
        self.clear(seen)
        return line


class MetricsFile:
    """JSON lines, one per report; lines past the image a run resumes from are dropped."""

    def __init__(self, path: Path, seen: int) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        kept = "".join(line for line in text.splitlines(keepends=True) if 0 <= _seen(line) <= seen)
        write_atomically(path, lambda temporary: temporary.write_text(kept, encoding="utf-8"))
        last = [json.loads(line) for line in kept.splitlines()[-2:]]
        self.scored = any(line["seen"] == seen and SPEED not in line for line in last)
        """Whether the image count it goes on from has its held-out scores."""

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
