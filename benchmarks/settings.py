r"""Which sampler, steps and guidance the embedded model draws best with, by the judge of quality.py.

For each setting the share of attributes that come out as asked, of drawings in styles never seen with their
object, of held-out scenes and of held-out avatars; the same captions and seeds for every setting.

Run: python benchmarks/settings.py --judge runs/attributes.safetensors \
         --recipe configs/illustrations-finish.toml
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sfumato
from attributes import Judge, facts, load_judge
from quality import BATCH, accuracy, chosen
from sfumato.data.pictures import Row
from sfumato.generation import draw
from sfumato.training.config import read_config
from sfumato.training.data import Illustrations

OUT = Path(__file__).parent / "results" / "settings.json"
SETTINGS: tuple[dict[str, Any], ...] = (
    {"sampler": "dpmpp_2m", "steps": 25, "guidance": 3.0},
    {"sampler": "dpmpp_2m", "steps": 15, "guidance": 3.0},
    {"sampler": "dpmpp_2m", "steps": 10, "guidance": 3.0},
    {"sampler": "unipc", "steps": 15, "guidance": 3.0},
    {"sampler": "deis", "steps": 15, "guidance": 3.0},
    {"sampler": "euler", "steps": 25, "guidance": 3.0},
    {"sampler": "euler_a", "steps": 25, "guidance": 3.0},
    {"sampler": "dpmpp_2m_sde", "steps": 25, "guidance": 3.0},
    {"sampler": "dpmpp_3m_sde", "steps": 25, "guidance": 3.0},
    {"sampler": "restart", "steps": 10, "guidance": 3.0},
    {"sampler": "dpmpp_2m", "steps": 15, "guidance": 2.0},
    {"sampler": "dpmpp_2m", "steps": 15, "guidance": 4.0},
    {"sampler": "dpmpp_2m", "steps": 15, "guidance": 6.0},
    {"sampler": "dpmpp_2m", "steps": 15, "guidance": 6.0, "rescale": 0.7},
    {"sampler": "dpmpp_2m", "steps": 15, "guidance": 4.0, "guidance_stop": 0.7},
)


def drawn(model: sfumato.StableDiffusion, rows: Sequence[Row], request: sfumato.Request) -> Tensor:
    """A picture for the canonical caption of each row, seed i for row i."""
    parts = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        captions = [row["captions"][0] for row in part]
        parts.append(draw(model, captions, list(range(start, start + len(part))), request).clamp(-1, 1))
    return torch.cat(parts)


def score(
    model: sfumato.StableDiffusion, groups: dict[str, list[Row]], judge: Judge, setting: dict[str, Any]
) -> dict[str, Any]:
    """The setting, its shares, and the seconds it took."""
    started, found = time.perf_counter(), {}
    for kind, rows in groups.items():
        samples = drawn(model, rows, sfumato.Request(**setting))
        heads = ["object"] if kind == "drawing" else None
        found[kind] = round(accuracy(judge, samples, [facts(row) for row in rows], heads), 3)
    mean = round(sum(found.values()) / len(found), 3)
    return {**setting, **found, "mean": mean, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="where the pictures lie, if not where the recipe says")
    parser.add_argument("--judge", type=Path, required=True, help="what attributes.py wrote")
    parser.add_argument("--count", type=int, default=150, help="prompts of each kind")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    domain = read_config(options.recipe, [] if options.data is None else [f"data.path={options.data}"]).data
    rows = Illustrations(domain.path, domain.shape, domain.channels, "test", domain.repeats).rows
    kinds = ("drawing", "scene", "avatar")
    groups = {kind: chosen([row for row in rows if row["kind"] == kind], options.count) for kind in kinds}
    model, judge, found = sfumato.load(), load_judge(options.judge), []
    for setting in SETTINGS:
        found.append(score(model, groups, judge, setting))
        print(json.dumps(found[-1]), flush=True)
        result = {"prompts": {kind: len(group) for kind, group in groups.items()}, "settings": found}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
