"""What samplers cost beside the network: seconds of their own arithmetic and noise for every step.

The denoiser hands back a stored tensor; latents are 4x32x32, those of 256 px Stable Diffusion 1. The share is
of the least processor time that a guided evaluation of that network took in `results/compare.json`.

Run: python benchmarks/overhead.py --out benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.brownian import BrownianNoise
from sfumato.diffusion.noise import ImageNoise
from sfumato.diffusion.prediction import Unguided
from sfumato.diffusion.samplers import SAMPLERS, Sampler
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import SPACINGS

SHAPE = (4, 32, 32)
STEPS = 20
CPU = torch.device("cpu")
SCHEDULE = Schedule(ScheduleConfig())
BAR = 0.01


def seconds_per_step(
    row: Sampler, noise: Callable[[float, float], Tensor], repeats: int
) -> tuple[float, int]:
    """(the fastest run's processor seconds for each step, its evaluations)."""
    options: dict[str, Any] = {"schedule": SCHEDULE} if "schedule" in row.options else {}
    answer, calls = torch.randn(1, *SHAPE), 0

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return answer

    levels, found = SPACINGS["karras"](SCHEDULE, STEPS), []
    for _ in range(repeats):
        x, calls = torch.randn(1, *SHAPE) * levels.start_scale, 0
        started = time.process_time()
        steps = sum(1 for _ in row(Unguided(denoise), x, levels.sigmas, noise, **options))
        found.append((time.process_time() - started) / steps)
    return min(found), calls


def network_seconds() -> float:
    """Of one guided evaluation, as recorded."""
    cases = json.loads((Path(__file__).parent / "results" / "compare.json").read_text())["cases"]
    return next(case["ours"]["cpu_seconds"]["min"] for case in cases if case["case"] == "unet-256")


def noise_of(row: Sampler) -> Callable[[float, float], Tensor]:
    """The kind of noise that the row declares, drawn on the CPU."""
    if row.noise == "fresh":
        return ImageNoise([1], SHAPE, device=CPU)
    return BrownianNoise([1], SHAPE, low=SCHEDULE.sigma_min, high=SCHEDULE.sigma_max, device=CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored, network = torch.randn(1, *SHAPE), network_seconds()
    rows: dict[str, dict[str, float | int]] = {}
    for name, row in SAMPLERS.items():
        seconds, calls = seconds_per_step(row, lambda sigma, target: stored, options.repeats)
        with_noise, _ = seconds_per_step(row, noise_of(row), options.repeats)
        rows[name] = {
            "evaluations": calls,
            "microseconds": round(seconds * 1e6, 1),
            "microseconds_with_noise": round(with_noise * 1e6, 1),
            "share": round(with_noise / network, 8),
        }
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "torch": version("torch"),
        "load_before": os.getloadavg()[0],
        "latents": [1, *SHAPE],
        "steps": STEPS,
        "network_seconds": network,
        "bar": BAR,
        "worst_share": max(row["share"] for row in rows.values()),
        "within_bar": all(row["share"] <= BAR for row in rows.values()),
        "samplers": rows,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
