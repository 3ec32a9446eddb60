"""Switching LoRA on a model of full size: seconds to read, apply and restore, and whether the weights stay.

Writes two LoRA of random factors in kohya's names for a model's shapes (attention and feed-forward of U-Net
and text encoders, as trainers do by default; "all" is every layer and convolution), then applies them in
turn. A switch is what a queue does between two pictures: take one off, put the other on.

Run: python benchmarks/lora.py --model sd1.safetensors --out benchmarks/results/lora.json
     python benchmarks/lora.py --cycles 1000          (the embedded model: the weights' digest must stay)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.addons.apply import Lora, Weighted, apply_addons, read_lora
from sfumato.checkpoints.addons.names import names_of
from sfumato.checkpoints.files import write_tensors
from sfumato.checkpoints.load import ModelFile, open_model
from sfumato.model import EMBEDDED
from sfumato.presets import ModelConfig

BAR = 2.0  # seconds for a switch on Stable Diffusion 1, on a CPU
TRAINED = ("to_q", "to_k", "to_v", "to_out_0", "ff_net_0_proj", "ff_net_2", "proj_in", "proj_out",
           "q_proj", "k_proj", "v_proj", "out_proj", "mlp_fc1", "mlp_fc2")  # fmt: skip
PREFIXES = {"unet": "lora_unet_", "text": "lora_te_", "text2": "lora_te2_"}


def factors(config: ModelConfig, kind: str, rank: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a LoRA for every layer of the kind, under diffusers' names as kohya writes them."""
    generator = torch.Generator().manual_seed(seed)
    for part, prefix in PREFIXES.items():
        if (own := getattr(config, part)) is None:
            continue
        for name, layer in names_of(part, own).underscored.items():
            target = layer.get("weight")
            if target is None or target.layout != "diffusers" or len(target.shape) < 2 or "embedding" in name:
                continue
            if name.startswith("encoder_") or (kind == "trained" and not name.endswith(TRAINED)):
                continue  # text encoders go by a second, bare name
            rows, *rest = target.shape
            ones = [1] * (len(rest) - 1)
            yield f"{prefix}{name}.lora_down.weight", torch.randn(rank, *rest, generator=generator).half()
            up = torch.randn(rows, rank, *ones, generator=generator) * 1e-3 / prod(rest) ** 0.5
            yield f"{prefix}{name}.lora_up.weight", up.half()
            yield f"{prefix}{name}.alpha", torch.tensor(rank / 2)


def digest(model: ModelFile) -> str:
    """Of every weight that a LoRA may change."""
    found = hashlib.sha256()
    for part in sorted(PREFIXES.keys() & set(model.modules)):
        for tensor in model.module(part).state_dict().values():
            found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def switches(model: ModelFile, loras: list[Lora], count: int) -> dict[str, list[float]]:
    """Seconds of putting on and of taking off, one LoRA after the other, and of the processor for both."""
    times: dict[str, list[float]] = {"apply": [], "restore": [], "cpu": []}
    for turn in range(count):
        start, busy = time.perf_counter(), time.process_time()
        with apply_addons(model.config, model.modules, [Weighted(loras[turn % len(loras)], 0.8, 0.8)]):
            times["apply"].append(time.perf_counter() - start)
            start = time.perf_counter()
        times["restore"].append(time.perf_counter() - start)
        times["cpu"].append(time.process_time() - busy)
    return times


def measure(place: str, kind: str, rank: int, turns: int, cycles: int) -> dict[str, Any]:
    """One row of results; SystemExit where the weights are not what they were."""
    model = open_model(place)
    for part in PREFIXES.keys() & set(model.modules):
        model.module(part)  # what is measured is the switch, not the first reading of the weights
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{seed}.safetensors" for seed in (1, 2)]
        for seed, path in enumerate(paths):
            write_tensors(path, dict(factors(model.config, kind, rank, seed)), {})
        start = time.perf_counter()
        loras = [read_lora(path) for path in paths]
        read = (time.perf_counter() - start) / 2
        before = digest(model)
        switches(model, loras, 2)
        times = switches(model, loras, turns)
        switches(model, loras, cycles)
        same = digest(model) == before
        sums = [left + right for left, right in zip(times["apply"], times["restore"], strict=True)]
        row = {
            "model": model.opened.family,
            "kind": kind,
            "rank": rank,
            "layers": len(loras[0].adapters),
            "lora_mb": round(paths[0].stat().st_size / 1e6, 1),
            "read_s": round(read, 3),
            "apply_s": round(statistics.median(times["apply"]), 3),
            "restore_s": round(statistics.median(times["restore"]), 4),
            "switch_s": round(statistics.median(sums), 3),
            "switch_max_s": round(max(sums), 3),
            "switch_cpu_s": round(statistics.median(times["cpu"]), 3),
            "cycles": 2 + turns + cycles,
            "digest_unchanged": same,
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "threads": torch.get_num_threads(),
        }
    if not same:
        raise SystemExit(f"the weights are not what they were: {row}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=str(EMBEDDED))
    parser.add_argument("--kinds", nargs="+", choices=("trained", "all"), default=["trained"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--cycles", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = [measure(given.model, kind, given.rank, given.turns, given.cycles) for kind in given.kinds]
    text = json.dumps({"bar_s": BAR, "torch": torch.__version__, "rows": rows}, indent=1)
    sys.stdout.write(text + "\n")
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
