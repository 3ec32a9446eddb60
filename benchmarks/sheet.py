"""The README's sheet: the embedded model's pictures of fixed prompts, seed i for prompt i, none picked.

Run: python benchmarks/sheet.py
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F

import sfumato
from sfumato.generation import draw
from sfumato.training.sheets import save_sheet

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
PROMPTS = (
    "a red apple",
    "a noto drawing of a fox",
    "a noto drawing of a cat",
    "a twemoji drawing of a guitar",
    "a twemoji drawing of a house",
    "a fluent drawing of a rocket",
    "a noto drawing of a pizza",
    "a fluent drawing of a panda",
    "a dog on a blue background",
    "an octopus on a yellow background",
    "a rose on a gray background",
    "a snowman on a purple background",
    "a big owl in the middle, on a pink background",
    "a small heart at the top, on a green background",
    "a small star on the left, on a blue background",
    "a big balloon on the right, on an orange background",
    "three carrots on a pink background",
    "two sailboats on a green background",
    "four bees on a yellow background",
    "two tomatoes on a gray background",
    "a tree to the left of a car on a yellow background",
    "a sun above a whale on a blue background",
    "a crown above a lion on a red background",
    "a banana to the right of a monkey on a green background",
    "a tall red critter with horns, one eye and a grin, on a blue background",
    "a square green critter with round ears, happy eyes and a smile, on a purple background",
    "golden hills under an orange sky",
    "blue mountains under a pink sky with a yellow sun",
    "a striped green planet with a wide ring, in a black sky",
    "a cracked red planet with a moon, in a blue sky",
    "a cactus in a pink pot with happy eyes and a smile, on a blue background",
    "a tulip in a yellow pot with round eyes and a grin, on a red background",
)


def main() -> None:
    pictures = draw(sfumato.load(), PROMPTS, seeds=range(len(PROMPTS)))
    save_sheet(FOLDER / "sheet.png", F.interpolate(pictures, scale_factor=2, mode="nearest"), columns=8)
    lines = [f"{seed:2}  {prompt}" for seed, prompt in enumerate(PROMPTS)]
    (FOLDER / "sheet.txt").write_text("seed  prompt\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
