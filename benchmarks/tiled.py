"""What decoding in bands and tiles costs and saves: peak memory, seconds, and nearness to the whole decoder.

Every way runs in a process of its own, and its peak is the most resident memory the system saw (VmHWM). What
the process held before decoding, weights included, is measured too: `peak_mb` is all of it, `added_mb` the
decoding's own. The weights of the first stage are random, its shape is Stable Diffusion's.

Run: python benchmarks/tiled.py --pixels 1024 --out benchmarks/results/tiled.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.families import AUTOENCODERS
from sfumato.nn.autoencoder import AutoencoderKL, Decoder
from sfumato.nn.tiled import decode_tiled
from sfumato.runtime import shapes_only

WAYS = ("whole", "exact", "fast")
BARS = {"decibels": 50.0, "share": 1 / 3}


def memory(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def decode(way: str, pixels: int, out: Path) -> None:
    """Decode once, in this process; write the picture and print what it took."""
    torch.manual_seed(0)
    config = AUTOENCODERS["kl-f8"]
    with shapes_only():
        model = AutoencoderKL(config)
    del model.encoder, model.quant_conv  # which would be part of the peak
    model.decoder, model.post_quant_conv = Decoder(config), nn.Conv2d(config.embed_dim, config.z_channels, 1)
    model.eval().requires_grad_(False)
    z = torch.randn(1, 4, pixels // 8, pixels // 8)
    with torch.no_grad():
        model.decode(z[..., :8, :8])  # what kernels allocate once
    before, started = memory("VmRSS"), time.perf_counter()
    with torch.no_grad():
        made = model.decode(z) if way == "whole" else decode_tiled(model, z, way)  # type: ignore[arg-type]
    seconds, peak = time.perf_counter() - started, memory("VmHWM")
    made.numpy().tofile(out)
    print(json.dumps({"seconds": round(seconds, 1), "peak": peak, "before": before}))


def measured(way: str, pixels: int, out: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--pixels", str(pixels), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    values = json.loads(done.stdout)
    megabyte = 2**20
    return {
        "seconds": values["seconds"],
        "peak_mb": round(values["peak"] / megabyte),
        "added_mb": round((values["peak"] - values["before"]) / megabyte),
    }


def decibels(given: Tensor, wanted: Tensor) -> float:
    """Peak signal over noise of pictures whose values span 2."""
    return float(10 * torch.log10(4 / (given - wanted).double().square().mean().clamp_min(1e-20)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--way", choices=WAYS, default=None, help="what a process of its own measures")
    arguments = parser.parse_args()
    if arguments.way is not None:
        decode(arguments.way, arguments.pixels, arguments.out)
        return
    ways: dict[str, dict[str, Any]] = {}
    pictures: dict[str, Tensor] = {}
    for way in WAYS:
        with tempfile.NamedTemporaryFile(suffix=".f32") as file:
            ways[way] = measured(way, arguments.pixels, Path(file.name))
            pictures[way] = torch.frombuffer(bytearray(file.read()), dtype=torch.float32)
    for way in WAYS[1:]:
        ways[way]["decibels"] = round(decibels(pictures[way], pictures["whole"]), 1)
        ways[way]["share_of_peak"] = round(ways[way]["peak_mb"] / ways["whole"]["peak_mb"], 3)
        ways[way]["share_of_added"] = round(ways[way]["added_mb"] / ways["whole"]["added_mb"], 3)
    exact = ways["exact"]
    result = {
        "pixels": arguments.pixels,
        "autoencoder": "kl-f8, float32",
        "ways": ways,
        "bars": BARS,
        "passed": exact["decibels"] >= BARS["decibels"] and exact["share_of_peak"] <= BARS["share"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    text = json.dumps(result, indent=2)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
