"""Two small sets to fine-tune the embedded model on, made of a built illustration set.

`night`: 36 drawings as embers in the night, a style that the model has never seen; each caption names it.
`pim`: 24 pictures of one figure of the held-out split, on several backgrounds, for a word of its own.

Run: python benchmarks/finetune_pictures.py data/illustrations data/fine-tuning
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.data.pictures import Pictures, Row

SIDE = 64
# Colours that the embedded model's autoencoder keeps; gold on blue, for one, comes back green.
NIGHT, EMBER = np.array([20, 20, 24]), np.array([255, 160, 60])
STYLE_OBJECTS = 36
FIGURE = "avatar-critters-test-00140"
BACKGROUNDS = {
    "a white": (255, 255, 255), "a pink": (244, 143, 177), "a blue": (66, 133, 220),
    "a gray": (158, 158, 158), "a yellow": (255, 213, 79), "a purple": (149, 97, 200),
    "a red": (229, 83, 75), "a black": (20, 20, 24),
}  # fmt: skip


def main(source: Path, out: Path) -> None:
    """Write both sets as folders of pictures with captions."""
    pictures = Pictures(source)
    seen: set[str] = set()
    drawings: list[Row] = []
    for row in pictures.rows("train"):
        thing = str(row["attributes"].get("object"))
        plain = row["kind"] == "drawing" and row["attributes"]["background"] == "white"
        if plain and row["attributes"]["style"] in ("fluent", "noto") and thing not in seen:
            seen.add(thing)
            drawings.append(row)
    stride = len(drawings) // STYLE_OBJECTS
    for row in drawings[::stride][:STYLE_OBJECTS]:
        caption = f"{row['captions'][0]} at night"
        save(out / "night", row["id"], night(pictures.image(row, SIDE)), caption)
    (figure,) = (row for row in pictures.rows("test") if row["id"] == FIGURE)
    image = pictures.image(figure, SIDE)
    for number, (name, colour) in enumerate(BACKGROUNDS.items()):
        for shift in (-3, 0, 3):
            moved = on_background(image, colour, shift)
            save(out / "pim", f"{number}{shift:+d}", moved, f"pim on {name} background")


def night(picture: Image.Image) -> Image.Image:
    """The picture's darkness as light: embers in the night."""
    darkness = 1 - np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255
    return Image.fromarray((NIGHT + (EMBER - NIGHT) * np.sqrt(darkness)).astype(np.uint8))


def on_background(picture: Image.Image, colour: tuple[int, int, int], shift: int) -> Image.Image:
    """The picture with another colour for that of its corner, moved to the side."""
    pixels = np.roll(np.asarray(picture.convert("RGB"), dtype=np.float32), shift, axis=1)
    distance = np.abs(pixels - pixels[1, 1]).max(axis=2, keepdims=True)
    share = np.clip(1 - distance / 60, 0, 1)
    return Image.fromarray(
        np.clip(pixels + share * (np.array(colour) - pixels[1, 1]), 0, 255).astype(np.uint8)
    )


def save(folder: Path, name: str, picture: Image.Image, caption: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
