"""Trains a recipe by one process and by several, with all weights each or a part: how far apart are the ends?

Each way runs twice: its two ends are bit-equal. Sums are rounded in another order by another number of
processes; Adam then makes whole steps of gradients that are rounding errors, so `--smooth` makes them small.

Run: python benchmarks/soak/ddp.py --out benchmarks/soak/results/ddp.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sfumato.data.shapes import write_shapes
from sfumato.training.state import INDEX, latest_state

IMAGES = 480
SMOOTH = ["--optimizer.eps=1.0", "--unet.dropout=0.0"]  # dropout is drawn anew by each process


def kills() -> ModuleType:
    """The script beside this one, whose recipes and commands these are; scripts are no package."""
    path = Path(__file__).with_name("kills.py")
    spec = importlib.util.spec_from_file_location("soak_kills", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def apart(one: Path, other: Path) -> float:
    """The norm of the difference of two runs' last weights, of the norm of how far the second's moved."""
    a, b, start = (state_of(folder) for folder in (one, other, other.with_name("start")))
    names = [name for name in b if name.startswith("module.")]
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in names)
    moved = sum(float((start[name].double() - b[name].double()).square().sum()) for name in names)
    return (difference / moved) ** 0.5


def state_of(run: Path) -> Mapping[str, Tensor]:
    """The tensors of a run's last state, whoever wrote it."""
    index = json.loads((sorted((run / "states").iterdir())[-1] / INDEX).read_text(encoding="utf-8"))
    state, _ = latest_state(run / "states", index["fingerprint"])
    assert state is not None
    return state.tensors


def compared(root: Path, recipe: Path, processes: int, overrides: list[str]) -> dict[str, Any]:
    """What each way of training a recipe costs, and how far its weights are from those of one process."""
    soak = kills()
    ways = {
        "one process": (1, []),
        f"{processes} processes, ddp": (processes, ['--loop.parallel="ddp"']),
        f"{processes} processes, fsdp": (processes, ['--loop.parallel="fsdp"']),
    }
    # The first step of the warm-up moves next to nothing: its state stands for the start.
    soak.finish(soak.prepared(recipe, root / "start", 1, [*overrides, "--loop.images=1"]))
    found: dict[str, Any] = {}
    for name, (count, words) in ways.items():
        ends = []
        for again in ("first", "again"):
            run = soak.prepared(recipe, root / f"{name} {again}", count, [*overrides, *words])
            began = time.monotonic()
            soak.finish(run)
            ends.append(run.out)
        found[name] = {
            "seconds": round(time.monotonic() - began, 1),
            "bit_equal_again": soak.weights(soak.Run(ends[0], [])) == soak.weights(soak.Run(ends[1], [])),
            "apart_from_one": apart(ends[0], root / "one process first"),
        }
        shutil.rmtree(ends[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, help="a recipe file; else tiny shapes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--images", type=int, default=IMAGES, help="of the tiny shapes")
    parser.add_argument("--smooth", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, recipe = Path(folder), options.recipe
        if recipe is None:
            soak = kills()
            write_shapes(root / "shapes", size=16)
            recipe = soak.written(root, "shapes-diffusion", soak.KINDS["scratch diffusion"], options.images)
        found = compared(root, recipe, options.processes, SMOOTH if options.smooth else [])
    result = {"torch": torch.__version__, **found}
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(way["bit_equal_again"] for way in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
