"""Two ControlNets of Stable Diffusion 1's size at once: strict loading, and the memory of a step at 512 px.

Files with random weights are written in a release's layout and names, the model's own among them, and drawn
with in a process of its own, whose peak is the most resident memory that the system saw (VmHWM).

Run: python benchmarks/soak/controls.py --out benchmarks/soak/results/controls.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sfumato.checkpoints.controls.layouts import control_pairs
from sfumato.checkpoints.controls.load import find_control
from sfumato.checkpoints.files import open_file
from sfumato.checkpoints.layouts.tables import to_foreign
from sfumato.errors import CheckpointError
from sfumato.families import FAMILIES
from sfumato.nn.controlnet import ControlNet, ControlNetConfig

BAR_GB = 10.0
KINDS = ("canny", "soft_edges")


def write(folder: Path, tiny: bool) -> list[dict[str, Any]]:
    """A ControlNet file of each kind, with what is in it."""
    config = FAMILIES["sd1"].unet
    assert config is not None
    if tiny:
        config = dataclasses.replace(config, model_channels=32, context_dim=32, num_heads=4)
    found = []
    for seed, kind in enumerate(KINDS):
        torch.manual_seed(seed)
        network = ControlNet(ControlNetConfig(dataclasses.replace(config)))
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)  # those that begin at zero too
        path = folder / f"control_sd15_{kind}.safetensors"
        tensors = to_foreign(control_pairs(network.config), network.state_dict())
        save_file({f"{name}": value.half().contiguous() for name, value in tensors.items()}, path)
        opened = find_control(open_file(path))
        found.append({"kind": kind, "tensors": len(opened.pairs), "bytes": path.stat().st_size})
        del network
    return found


def refused(path: Path) -> int:
    """How many of three spoilt copies of a file are refused: a tensor short, one more, another shape."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    first = sorted(tensors)[0]
    spoilt = [
        {name: value for name, value in tensors.items() if name != first},
        {**tensors, "more.weight": torch.zeros(1)},
        {**tensors, first: torch.zeros(3)},
    ]
    count = 0
    for index, each in enumerate(spoilt):
        other = path.with_name(f"spoilt-{index}.safetensors")
        save_file(each, other)
        try:
            find_control(open_file(other))
        except CheckpointError:
            count += 1
        other.unlink()
    return count


def draw(model: str, folder: Path, side: int, steps: int) -> None:
    """Draw under both, in this process; print what it took."""
    from PIL import Image

    from sfumato import Request
    from sfumato.generation import generate
    from sfumato.model import load
    from sfumato.request import ControlPicture

    loaded = load(model or None, device="cpu")
    hint = Image.effect_noise((side, side), 80).convert("RGB")
    controls = tuple(ControlPicture(kind=kind, picture=hint) for kind in KINDS)
    started = time.perf_counter()
    request = Request(
        prompt="a red apple", steps=steps, seed=1, width=side, height=side, control=controls,
        control_dir=str(folder),
    )  # fmt: skip
    result = generate(loaded, request)
    seconds = time.perf_counter() - started
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    finite = bool(torch.isfinite(result.latents).all())
    print(json.dumps({"seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 2), "finite": finite}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="Stable Diffusion 1 of any weights")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="load tiny files alone")
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.draw is not None:
        draw(given.model, given.draw, given.side, given.steps)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = write(folder, given.tiny)
        result: dict[str, Any] = {"files": files, "spoilt_refused": f"{refused(next(folder.iterdir()))} of 3"}
        if not given.tiny:
            command = [sys.executable, __file__, "--draw", place, "--model", given.model]
            command += ["--side", str(given.side), "--steps", str(given.steps)]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
            result |= {"side": given.side, "steps": given.steps, **json.loads(told), "bar_gb": BAR_GB}
    print(json.dumps(result, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["spoilt_refused"] != "3 of 3" or result.get("peak_gb", 0) > BAR_GB:
        sys.exit(1)


if __name__ == "__main__":
    main()
