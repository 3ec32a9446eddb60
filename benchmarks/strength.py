"""Image-to-image with the embedded model at every strength: how much of the picture is left?

Pictures drawn from prompts are started from towards the next prompt of the list, ten in a batch. Similarity
is the peak signal-to-noise ratio to the picture.

Run: python benchmarks/strength.py --out benchmarks/results/strength.json --chart docs/pictures/strength.png
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import sfumato
from sfumato import Request, charts, images
from sfumato.generation import draw, generate

PROMPTS = (
    "a noto drawing of a fox",
    "a rose on a gray background",
    "a fluent drawing of a rocket",
    "a tree to the left of a car on a yellow background",
    "golden hills under an orange sky",
    "a tall red critter with horns, one eye and a grin, on a blue background",
)
STRENGTHS = tuple(index / 10 for index in range(11))
BATCH = 10


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """(n,) decibels between samples in -1..1."""
    return 10 * torch.log10(4 / (one - other).square().flatten(1).mean(dim=1).clamp(min=1e-10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chart", type=Path)
    options = parser.parse_args()
    started, model = time.perf_counter(), sfumato.load(device="cpu")
    rows, ends, decoded = [], [], []
    for batch in range(math.ceil(options.count / BATCH)):
        count = min(BATCH, options.count - batch * BATCH)
        source, target = PROMPTS[batch % len(PROMPTS)], PROMPTS[(batch + 1) % len(PROMPTS)]
        given = draw(model, [source] * count, range(100 * batch, 100 * batch + count))
        inits = images.to_pil(given)
        old = images.to_tensor(inits)
        drawn = [strength_of(model, inits, target, strength, options.steps) for strength in STRENGTHS]
        noise = generate(model, Request(prompt=target, num_images=count, seed=7, steps=options.steps)).samples
        rows.append(torch.stack([psnr(each, old) for each in drawn], dim=1))
        ends.append((drawn[-1] - noise).abs().flatten(1).amax(dim=1))
        decoded.append(
            (drawn[0] - model.decode_latents(model.encode_image(old))).abs().flatten(1).amax(dim=1)
        )
    table = torch.cat(rows)  # (pictures, strengths)
    means = [round(float(value), 2) for value in table.mean(dim=0)]
    falling = [all(high >= low for high, low in pairwise(row)) for row in table.tolist()]
    report = {
        "pictures": len(table),
        "steps": options.steps,
        "strengths": STRENGTHS,
        "psnr_to_the_picture": means,
        "mean_falls": all(high > low for high, low in pairwise(means)),
        "pictures_that_fall_at_every_strength": sum(falling),
        "largest_rise_of_a_picture_in_dB": round(float((table[:, 1:] - table[:, :-1]).max()), 2),
        "strength_0_against_the_autoencoder": float(torch.cat(decoded).max()),
        "strength_1_against_noise_alone": float(torch.cat(ends).max()),
        "seconds": round(time.perf_counter() - started, 1),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.chart is not None:
        low, high = (table.quantile(share, dim=0).tolist() for share in (0.1, 0.9))
        lines = [("mean", means), ("lowest tenth", low), ("highest tenth", high)]
        picture = charts.chart(
            [charts.Line(name, list(zip(STRENGTHS, values, strict=True))) for name, values in lines],
            charts.Axis("strength"), charts.Axis("PSNR to the picture (dB)"),
            title=f"Image-to-image, {len(table)} pictures",
        )  # fmt: skip
        charts.save(picture, options.chart)


def strength_of(
    model: sfumato.StableDiffusion, inits: list[Image.Image], prompt: str, strength: float, steps: int
) -> Tensor:
    """Samples (n, c, h, w) drawn from the pictures."""
    request = Request(
        prompt=prompt, init=inits, strength=strength, steps=steps, seed=7, num_images=len(inits),
    )  # fmt: skip
    return generate(model, request).samples


if __name__ == "__main__":
    main()
