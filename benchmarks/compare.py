"""Side by side: this package and diffusers on the same weights and inputs, in fresh processes, in turn.

Each pair runs ours, then the reference, so that whatever else the machine does meets both. No time counts
before the results are equal: relative error max|a - b| / max|b| <= 1e-4, or 50 dB for whole pictures. The
machine's matrix product (2048 x 2048, float32) is timed before, between and after; utilisation is exact
multiplications (`flops.py`) over that. CPU seconds are each process's own, which others on the machine do
not lengthen; peak memory is VmHWM, mapped files included. The weights come from `weights.py`.

Run: python benchmarks/compare.py --work /tmp/released --out benchmarks/results/compare.json
     python benchmarks/compare.py --tiny --pairs 2
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import weights
from compare_side import Outcome, Task
from flops import build, decoder_macs, encoder_macs, text_macs, unet_macs
from releases import FAMILIES, Family, tiny
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.nn.unet import UNet

HERE = Path(__file__).parent
SIDES = {"ours": HERE / "compare_ours.py", "reference": HERE / "compare_diffusers.py"}
TOLERANCE = 1e-4
DECIBELS = 50.0
PICTURES = ("picture",)  # kinds whose rounding errors eight steps and a decoder have carried on
GEMM = 2048
HEADER = "case              ours, diffusers s   ratio (least-most)  cpu ratio  peak MB, ratio use  difference"


@dataclass(frozen=True)
class Case:
    """What is compared; `source` is a file of `weights.py`, `pixels` the side of the picture."""

    kind: str
    source: str = "sd1.safetensors"
    pixels: int = 256
    repeats: int = 3


CASES = {
    "unet-256": Case("unet"),
    "unet-512": Case("unet", pixels=512, repeats=1),
    "decode-256": Case("decode"),
    "decode-512": Case("decode", pixels=512, repeats=1),
    "encode-256": Case("encode"),
    "text": Case("text", repeats=10),
    "open-safetensors": Case("opened"),
    "load-safetensors": Case("load"),
    "load-fp16": Case("load", "sd1-fp16.safetensors"),
    "load-ckpt": Case("load", "sd1.ckpt"),
    "load-folder": Case("load", "sd1"),
    "cold-256": Case("cold"),
    "picture-256": Case("picture"),
}
SLOW = ("unet-512", "decode-512")  # minutes a pair on one core; asked for by name


def macs(case: Case, family: Family) -> int:
    """Multiply-accumulates of what a case times once; 0 where it is not arithmetic that is timed."""
    side = case.pixels // 8
    tower = next(iter(family.towers.values()))
    config = CLIPTextConfig(
        hidden_size=tower.width,
        intermediate_size=4 * tower.width,
        num_hidden_layers=tower.used,
        num_attention_heads=tower.heads,
    )
    counts: dict[str, Callable[[], int]] = {
        "unet": lambda: unet_macs(build(UNet, family.unet), 2, side),
        "decode": lambda: decoder_macs(build(AutoencoderKL, family.autoencoder), side),
        "encode": lambda: encoder_macs(build(AutoencoderKL, family.autoencoder), case.pixels),
        "text": lambda: text_macs(build(CLIPTextEncoder, config), 2),
    }
    if case.kind == "picture":
        return 8 * counts["unet"]() + counts["decode"]() + counts["text"]()
    return counts.get(case.kind, lambda: 0)()


def gemm_gflops() -> float:
    """The best of three square matrix products, in 10^9 FLOP a second."""
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * GEMM**3 / min(seconds[1:]) / 1e9


def run_side(script: Path, task: Task) -> Outcome:
    """One task in a process of its own; its errors end the comparison."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads), "HF_HUB_OFFLINE": "1"}
    arguments = asdict(task) | {"spawned": time.time()}
    command = [sys.executable, str(script), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{script.name} failed at {task}:\n{done.stderr[-3000:]}")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def difference(case: Case, ours: Path, reference: Path) -> dict[str, Any]:
    """How far apart two results are, and whether that is equal enough for their times to count."""
    a, b = load_file(ours)["result"], load_file(reference)["result"]
    if a.shape != b.shape or not torch.isfinite(a).all():
        return {"equal": False, "shapes": [list(a.shape), list(b.shape)]}
    relative = ((a - b).abs().max() / b.abs().max()).item()
    if case.kind not in PICTURES:
        return {"equal": relative <= TOLERANCE, "relative_error": relative}
    decibels = -10 * math.log10(max((a - b).square().mean().item(), 1e-20))
    return {"equal": decibels >= DECIBELS, "psnr_db": round(decibels, 1)}


def compare(name: str, work: Path, family: Family, pairs: int, threads: int) -> dict[str, Any]:
    """All pairs of one case, interleaved, and what follows from them."""
    case = CASES[name]
    outcomes: dict[str, list[Outcome]] = {side: [] for side in SIDES}
    gemm: list[float] = []
    results: list[dict[str, Any]] = []
    assert family.unet.context_dim is not None
    with tempfile.TemporaryDirectory() as folder:
        outputs = {side: Path(folder) / f"{side}.safetensors" for side in SIDES}
        for _ in range(pairs):
            for side, script in SIDES.items():
                gemm.append(gemm_gflops())
                task = Task(
                    kind=case.kind,
                    source=str(work / case.source),
                    pixels=case.pixels,
                    repeats=case.repeats,
                    threads=threads,
                    output=str(outputs[side]),
                    context_dim=family.unet.context_dim,
                    spawned=0.0,
                )
                outcomes[side].append(run_side(script, task))
            results.append(difference(case, outputs["ours"], outputs["reference"]))
            if not results[-1]["equal"]:
                return {"case": name, "pairs": len(results), "difference": results[-1]}
    gemm.append(gemm_gflops())
    worst = max(results, key=lambda result: result.get("relative_error", -result.get("psnr_db", 0.0)))
    return {
        "case": name,
        "pairs": pairs,
        "difference": worst,
        **{side: summary(case, found, macs(case, family), gemm) for side, found in outcomes.items()},
        **ratios(outcomes["ours"], outcomes["reference"]),
        "gemm_gflops": spread(gemm),
    }


def summary(case: Case, outcomes: list[Outcome], multiplications: int, gemm: list[float]) -> dict[str, Any]:
    """One side's figures over all pairs."""
    seconds = [statistics.median(outcome.seconds) for outcome in outcomes]
    cpu = [statistics.median(outcome.cpu_seconds) for outcome in outcomes]
    found: dict[str, Any] = {
        "seconds": spread(seconds),
        "cpu_seconds": spread(cpu),
        "peak_mb": spread([outcome.peak_mb for outcome in outcomes]),
        "private_mb": spread([outcome.private_mb for outcome in outcomes]),
        "load_seconds": spread([outcome.load_seconds for outcome in outcomes]),
        "anonymous_mb": spread([outcome.anonymous_mb for outcome in outcomes]),
    }
    if case.kind == "cold":
        found["warm_step_seconds"] = spread([outcome.besides for outcome in outcomes])
        found["seconds_besides_step"] = spread([outcome.seconds[0] - outcome.besides for outcome in outcomes])
    if multiplications:
        found["gflops"] = round(2 * multiplications / statistics.median(seconds) / 1e9, 1)
        found["utilisation"] = round(found["gflops"] / statistics.median(gemm), 3)
    return found


def ratios(ours: list[Outcome], reference: list[Outcome]) -> dict[str, Any]:
    """Ours over the reference, pair by pair: time besides a cold start's step, CPU time, peak memory."""

    def of(value: Callable[[Outcome], float]) -> dict[str, float]:
        return spread([value(a) / value(b) for a, b in zip(ours, reference, strict=True)])

    return {
        "ratio": of(lambda outcome: statistics.median(outcome.seconds) - outcome.besides),
        "cpu_ratio": of(lambda outcome: statistics.median(outcome.cpu_seconds)),
        "memory_ratio": of(lambda outcome: outcome.peak_mb),
        "private_ratio": of(lambda outcome: outcome.private_mb),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most, to four digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on, and with."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "cores_used": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_average_before": round(os.getloadavg()[0], 2),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: installed(name) for name in packages},
    }


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    name = f"{result['case']:17}"
    if "ratio" not in result:
        return f"{name} NOT EQUAL {result['difference']}"
    ours, reference = result["ours"], result["reference"]
    ratio, cpu = result["ratio"], result["cpu_ratio"]
    error = result["difference"].get("relative_error")
    shown = f"{result['difference'].get('psnr_db')} dB" if error is None else f"{error:.1e}"
    return (
        f"{name} {ours['seconds']['median']:8.3f} {reference['seconds']['median']:8.3f} s  "
        f"{ratio['median']:6.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})  cpu {cpu['median']:6.3f}  "
        f"{ours['peak_mb']['median']:6.0f} {reference['peak_mb']['median']:6.0f} MB "
        f"{result['memory_ratio']['median']:5.2f}  {ours.get('utilisation', 0):5.0%}  {shown}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder of weights.py; written where it is missing")
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a small model of the same layers")
    parser.add_argument("--note", default="", help="what else the machine was doing, for the JSON")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    family = tiny(FAMILIES["sd1"]) if options.tiny else FAMILIES["sd1"]
    names = options.cases or [name for name in CASES if name not in SLOW]
    found: dict[str, Any] = {
        **machine(options.threads),
        "tiny": options.tiny,
        "note": options.note,
        "cases": [],
    }
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        weights.write(work, family, ["safetensors", "fp16", "ckpt", "folder"], seed=0)
        for name in names:
            found["cases"].append(compare(name, work, family, options.pairs, options.threads))
            print(row(found["cases"][-1]), flush=True)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not all("ratio" in result for result in found["cases"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
