"""The sheet of docs/image-to-image.md: pictures inpainted and outpainted by the embedded model, none picked.

Run: python benchmarks/sheet_pictures.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

import sfumato
from sfumato import Request, charts
from sfumato.generation import generate

OUT = Path(__file__).parent.parent / "docs" / "pictures" / "edits.png"
SCALE, GAP = 2, 4
CRITTER, CACTUS = "a tall red critter with", "a cactus in a"
INPAINTED = (  # what there is, the box of the mask, what is drawn
    ("a noto drawing of a fox, on a blue background", (0, 44, 64, 64), "a fox on a green background"),
    (
        "a star above a tree on a green background",
        (12, 0, 52, 31),
        "a heart above a tree on a green background",
    ),
    (
        "a big balloon on the right, on an orange background",
        (0, 0, 28, 64),
        "a house to the left of a balloon on an orange background",
    ),
    (
        f"{CRITTER} horns, one eye and a grin, on a blue background",
        (8, 8, 56, 34),
        f"{CRITTER} round ears, happy eyes and a smile, on a blue background",
    ),
    (
        "golden hills under an orange sky",
        (0, 0, 64, 30),
        "golden hills under a blue sky with a yellow sun",
    ),
    (
        f"{CACTUS} pink pot with happy eyes and a smile, on a blue background",
        (10, 34, 54, 64),
        f"{CACTUS} yellow pot, on a blue background",
    ),
)
OUTPAINTED = (  # what there is, what is around it, pixels at the left and at the right
    ("golden hills under an orange sky", "golden hills under an orange sky", (0, 64)),
    ("blue mountains under a pink sky with a yellow sun", "blue mountains under a pink sky", (32, 32)),
    ("green hills under a blue sky", "green hills under a blue sky", (64, 0)),
    ("golden hills under a blue sky with a yellow sun", "golden hills under a blue sky", (24, 40)),
)


def large(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)


def framed(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The picture, larger, with a frame around a part of it."""
    sheet, place = large(picture), [SCALE * side for side in box]
    ImageDraw.Draw(sheet).rectangle((place[0], place[1], place[2] - 1, place[3] - 1), outline="red")
    return sheet


def main() -> None:
    model, rows = sfumato.load(device="cpu"), []

    def drawn(prompt: str, seed: int, **fields: Any) -> Image.Image:
        return generate(model, Request(prompt=prompt, seed=seed, **fields)).images[0]

    for seed, (prompt, box, other) in enumerate(INPAINTED):
        init, mask = drawn(prompt, seed), Image.new("L", (64, 64))
        mask.paste(255, box)
        results = [drawn(other, seed, init=init, mask=mask, strength=strength) for strength in (0.75, 1)]
        rows.append([framed(init, box), *map(large, results)])
    sheet = _pasted([left + right for left, right in zip(rows[::2], rows[1::2], strict=True)])
    rows = []
    for seed, (prompt, other, (left, right)) in enumerate(OUTPAINTED):
        init = drawn(prompt, seed)
        wide = drawn(other, seed, init=init, outpaint_left=left, outpaint_right=right)
        rows.append([framed(wide, (left, 0, left + 64, 64)), large(wide)])
    below = _pasted([left + right for left, right in zip(rows[::2], rows[1::2], strict=True)])
    both = Image.new("RGB", (max(sheet.width, below.width), sheet.height + below.height), "white")
    both.paste(sheet, (0, 0))
    both.paste(below, (0, sheet.height))
    charts.save(both, OUT)


def _pasted(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures on one white sheet."""
    width = max(sum(each.width + GAP for each in row) for row in rows)
    sheet = Image.new("RGB", (width, sum(row[0].height + GAP for row in rows)), "white")
    top = 0
    for row in rows:
        left = 0
        for each in row:
            sheet.paste(each, (left, top))
            left += each.width + GAP
        top += row[0].height + GAP
    return sheet


if __name__ == "__main__":
    main()
