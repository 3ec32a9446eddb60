"""Inpaints by random masks: does every byte outside the mask come back as it was, and does the inside change?

The embedded model draws a few steps at strength 0.9 in pictures of random sizes: the whole picture, or only
what is masked. Masks are boxes, ellipses, strokes and scattered points; none is blurred.

Run: python benchmarks/soak/masks.py --count 200 --out benchmarks/soak/results/masks.json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import sfumato
from sfumato import Request
from sfumato.generation import generate

SIDES = (48, 64, 80, 96)
ODD_SIDES = (50, 63, 77, 101, 150)  # for pictures of which a part is drawn
CONTENTS = ("original", "fill", "noise", "nothing")


def picture(chance: random.Random, size: tuple[int, int]) -> Image.Image:
    """Blots of colour with some grain."""
    image = Image.new("RGB", size, tuple(chance.randrange(256) for _ in range(3)))
    for _ in range(6):
        ImageDraw.Draw(image).ellipse(box(chance, size), fill=tuple(chance.randrange(256) for _ in range(3)))
    grain = np.random.default_rng(chance.randrange(2**32)).integers(-9, 10, (*size[::-1], 3))
    return Image.fromarray((np.asarray(image).astype(int) + grain).clip(0, 255).astype(np.uint8))


def box(chance: random.Random, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top = (chance.randrange(side) for side in size)
    return left, top, left + chance.randint(0, size[0]), top + chance.randint(0, size[1])


def mask(chance: random.Random, size: tuple[int, int]) -> Image.Image:
    """Some white, at least one point of it."""
    image = Image.new("L", size, 0)
    pen = ImageDraw.Draw(image)
    for _ in range(chance.randint(1, 4)):
        kind = chance.choice(("box", "ellipse", "stroke", "points"))
        if kind == "box":
            pen.rectangle(box(chance, size), fill=255)
        elif kind == "ellipse":
            pen.ellipse(box(chance, size), fill=255)
        elif kind == "stroke":
            pen.line(box(chance, size), fill=255, width=chance.randint(1, 9))
        else:
            pen.point([chance.randrange(side) for _ in range(20) for side in size], fill=255)
    image.putpixel(tuple(chance.randrange(side) for side in size), 255)  # type: ignore[arg-type]
    return image


def one(model: Any, number: int, steps: int) -> dict[str, Any]:
    """What came of the mask of that number: always the same one."""
    chance = random.Random(number)  # noqa: S311 - no secrets
    part = number % 3 == 2
    size = tuple(chance.choice(ODD_SIDES if part else SIDES) for _ in range(2))
    init, drawn = picture(chance, size), mask(chance, size)  # type: ignore[arg-type]
    request = Request(
        prompt="a red apple on a blue background", init=init, mask=drawn, strength=0.9, steps=steps,
        seed=number, mask_content=chance.choice(CONTENTS), only_masked=part, only_masked_padding=8,
    )  # fmt: skip
    result = generate(model, request).images[0]
    old, new, outside = (np.asarray(each).astype(int) for each in (init, result, drawn))
    outside = outside == 0
    return {
        "same_size": result.size == size,
        "bytes_changed_outside": int((old != new)[outside].sum()) if result.size == size else -1,
        "outside": int(outside.sum()) * 3,
        "changed_inside": float((old != new)[~outside].mean()) if result.size == size else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started, model = time.perf_counter(), sfumato.load(device="cpu")
    found = [one(model, number, options.steps) for number in range(options.count)]
    wrong = [number for number, each in enumerate(found) if each["bytes_changed_outside"] != 0]
    report = {
        "masks": len(found),
        "identical_outside": len(found) - len(wrong),
        "wrong": wrong,
        "bytes_outside": sum(each["outside"] for each in found),
        "changed_inside": round(sum(each["changed_inside"] for each in found) / len(found), 4),
        "steps": options.steps,
        "seconds": round(time.perf_counter() - started, 1),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
