"""The released models' true shapes, in every layout: does each part answer as diffusers and transformers do?

Weights are random, from a seed (`weights.py`). The reference computes from the folder that diffusers itself
made of the single file; ours from every layout. Each part of each side runs in a process of its own, which
bounds memory: SDXL's U-Net is 10.3 GB in float32. The bar is a relative error max|a - b| / max|b| of 1e-4.

Run: python benchmarks/soak/released.py --work /tmp/released --out benchmarks/soak/results/released.json
     python benchmarks/soak/released.py --tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[1]
FAMILIES = ("sd1", "sd1-inpaint", "sd2-v", "sdxl")
PARTS = ("unet", "vae", "text")
FORMATS = {"safetensors": "{}.safetensors", "ckpt": "{}.ckpt", "folder": "{}"}
BAR = 1e-4


def run(script: str, *arguments: str) -> None:
    """One of the scripts beside this folder; its failure is ours."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - our own script
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


def answers(side: str, part: str, family: str, source: Path, flags: list[str]) -> dict[str, torch.Tensor]:
    """What one side makes of the fixed inputs, by name."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.safetensors"
        run("released_parts.py", side, part, family, str(source), str(output), *flags)
        return load_file(output)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """max|a - b| / max|b|; infinite for another shape and for what is not finite."""
    if ours.shape != reference.shape or not torch.isfinite(ours).all():
        return float("inf")
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def check(family: str, work: Path, formats: list[str], flags: list[str]) -> list[dict[str, Any]]:
    """A row for every part and format of one family."""
    run(
        "weights.py",
        "--work",
        str(work),
        "--families",
        family,
        "--formats",
        "safetensors",
        "ckpt",
        "folder",
        *flags,
    )
    rows: list[dict[str, Any]] = []
    for part in PARTS:
        wanted = answers("reference", part, family, work / family, flags)
        for name in formats:
            found = answers("ours", part, family, work / FORMATS[name].format(family), flags)
            errors = {key: relative_error(found[key], tensor) for key, tensor in wanted.items()}
            rows.append({"family": family, "format": name, "part": part, **errors})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--delete", action="store_true", help="delete each family's files once it is checked")
    parser.add_argument("--tiny", action="store_true", help="fewer and narrower layers; seconds, not minutes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flags = ["--tiny"] if options.tiny else []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work: Path = options.work or Path(folder)
        for family in options.families:
            rows += check(family, work, options.formats, flags)
            for name in FORMATS.values() if options.delete else ():
                path = work / name.format(family)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    worst = max(value for row in rows for value in row.values() if isinstance(value, float))
    result = {"tiny": options.tiny, "bar": BAR, "worst": worst, "passed": worst <= BAR, "rows": rows}
    print(f"worst relative error {worst:.2e}, bar {BAR:.0e}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not result["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
