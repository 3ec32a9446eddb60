"""Every sampler on the embedded model: pictures to look at, and evaluations to within 2 % of a long run.

Writes docs/pictures/samplers.png (a row per sampler, the same prompts and seeds in every row, 20 steps),
docs/pictures/convergence.png and benchmarks/results/samplers.json.

Run: python benchmarks/samplers.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import sfumato
from sfumato.charts import Axis, Line, chart, save
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.generation import draw
from sfumato.generation.convergence import converge, deterministic
from sfumato.images import captioned, grid, to_pil

ROOT = Path(__file__).parent.parent
PROMPTS = (
    "a red apple",
    "a noto drawing of a fox",
    "a twemoji drawing of a guitar",
    "a fluent drawing of a rocket",
    "a dog on a blue background",
    "a rose on a gray background",
)
EVALUATIONS = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 25, 30, 40, 50, 60, 80, 120)
WITHIN = 0.02
CHART = ("euler", "heun", "dpm2", "lms", "plms", "dpmpp_2m", "deis", "unipc", "ipndm", "dpm_fast")


def pictures(model: sfumato.StableDiffusion, name: str, steps: int) -> torch.Tensor:
    """The prompts by one sampler, seed i for prompt i."""
    request = sfumato.Request(sampler=name, steps=steps, guidance=SAMPLERS[name].guidance)
    found = draw(model, PROMPTS, list(range(len(PROMPTS))), request)
    if not bool(torch.isfinite(found).all()):
        raise SystemExit(f"{name} with {steps} steps gave values that are not finite")
    return found


def groups(names: list[str]) -> dict[str, list[str]]:
    """By spacing: a row's own, or "uniform" where its own starts below the last timestep."""
    lower = [name for name in names if SAMPLERS[name].spacing == "leading"]
    return {"auto": [name for name in names if name not in lower], "uniform": lower}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "samplers.json")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--images", type=int, default=4, help="pictures that errors are averaged over")
    options = parser.parse_args()
    model = sfumato.load()
    rows = []
    for name, row in SAMPLERS.items():
        drawn = pictures(model, name, 20)
        pictures(model, name, 50)
        large = F.interpolate(drawn, scale_factor=1.5, mode="bicubic").clamp(-1, 1)
        rows.append(captioned(grid(to_pil(large), len(PROMPTS)), row.title))
        print(name, "drawn with 20 and 50 steps", flush=True)
    save(grid(rows, 2), options.pictures / "samplers.png")

    request = sfumato.Request(prompt=PROMPTS[0], seed=0, num_images=options.images)
    errors: dict[str, list[tuple[int, float]]] = {name: [] for name in deterministic()}
    for spacing, names in groups(list(errors)).items():
        asked = request.model_copy(update={"spacing": spacing})
        for point in converge(model, asked, names, EVALUATIONS):
            errors[point.sampler].append((point.evaluations, point.error))
    table: dict[str, Any] = {}
    for name, points in errors.items():
        worse = [count for count, error in points if error > WITHIN]
        better = [count for count, _ in points if not worse or count > max(worse)]
        table[name] = {"within_2_percent": min(better, default=None), "errors": points}
        print(f"{name:18} {table[name]['within_2_percent']}", flush=True)
    lines = [Line(SAMPLERS[name].title, errors[name]) for name in CHART]
    axes = Axis("evaluations of the network", log=True), Axis("error relative to 1000 steps", log=True)
    save(chart(lines, *axes, title="Samplers on the embedded model"), options.pictures / "convergence.png")
    result = {"prompt": PROMPTS[0], "pictures": options.images, "reference": "1000 steps of heun, karras"}
    options.out.write_text(json.dumps(result | {"samplers": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
