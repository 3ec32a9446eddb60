"""Reads generated recipes by the ten thousand: never an exception, and ours come back equal.

A third of them are soups of the text form's marks and JSON of the graphs' and metadata's names, a third are
picture files with bytes changed, and a third requests of ours, written into a file and read back.

Run: python benchmarks/soak/recipes.py --count 50000 --out benchmarks/soak/results/recipes.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.spacing import SPACINGS
from sfumato.errors import InputError
from sfumato.recipes import embed, from_texts, read
from sfumato.recipes.recipe import PATHS
from sfumato.recipes.text_form import from_text
from sfumato.request import MAX_SEED, Request

MARKS = (
    "Steps: 5, ", "Steps: ", ",", '"', "\\", "\n", ":", "{", "[", "]", "}", "0", "Size: 64x64, ", "Seed: 3, ",
    "Negative prompt: ", "Sampler: ", "Euler a", "DPM++ 2M Karras", "Schedule type: ", "Karras", "a: ", "fox",
    'Lora hashes: "a: 1"', "Civitai resources: [", '{"a": 1}', "Version: ", "v1.9", "sfumato 0.1", "-1",
    "1e999", "nan", "9" * 400, "🦊", "\0", "\r", "\ud800", "Eta: ", "Sigma churn: ", "0.5", ", ",
)  # fmt: skip
KEYS = (
    *Request.model_fields, "inputs", "class_type", "1", "2", "model", "positive", "image", "loras", "text",
    "latent_image", "sampler_name", "scheduler", "sigmas", "guider", "clip", "batch_size", "batch_index",
    "positive_prompt", "cfg_scale", "lora_name", "noise_seed", "cfg", "pixels", "grid", "value",
)  # fmt: skip
CLASSES = ("KSampler", "SaveImage", "CLIPTextEncode", "ConditioningConcat", "KarrasScheduler", "FreeU_V2")
LEAVES: tuple[Any, ...] = (
    None, True, 0, -1, 3, 0.5, 1e300, 10**40, "", "fox", "euler", "karras", "1", ["1", 0], ["2", 1], [],
)  # fmt: skip
NAMES = ("sfumato", "prompt", "invokeai_metadata", "sd-metadata", "UserComment", "ImageDescription", "Make")
UNITS = (
    "a: [", 'a:"', 'a: ["x', "a: {", ", ", " ", "a", "a:", '\\"', "Steps: 1\n", "[[", '"\\', "\n", '{"a":',
    "Negative prompt:", "Lora hashes: a", "a: b, ",
)  # fmt: skip
LENGTH = 100_000


def structure(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON, made of the names that the readers look for."""
    kind = chance.random()
    if depth > 4 or kind < 0.3:
        return chance.choice((*LEAVES, *CLASSES))
    size = chance.randint(0, 6)
    if kind < 0.4:
        return [structure(chance, depth + 1) for _ in range(size)]
    return {chance.choice(KEYS): structure(chance, depth + 1) for _ in range(size)}


def strangers(chance: random.Random) -> None:
    """Any text, and any JSON under any name: read without an exception, and what is read is JSON."""
    soup = "".join(chance.choice(MARKS) for _ in range(chance.randint(0, 40)))
    json.dumps(from_texts({"parameters": soup}).values)
    text = json.dumps(structure(chance))
    found = from_texts(
        {chance.choice(NAMES): text[: chance.choice((len(text), chance.randint(0, len(text))))]}
    )
    json.dumps(found.values)


def damaged(chance: random.Random, whole: dict[str, bytes], folder: Path) -> None:
    """A picture file with bytes changed or cut off: read, or refused as one."""
    kind = chance.choice(sorted(whole))
    data = bytearray(whole[kind])
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    path = folder / f"damaged.{kind}"
    path.write_bytes(data[: chance.choice((len(data), chance.randint(1, len(data))))])
    try:
        read(path)
    except InputError:
        return


def request(chance: random.Random) -> Request:
    """Any request, with an option or two."""
    sampler, spacing = chance.choice(sorted(SAMPLERS)), chance.choice(("auto", *sorted(SPACINGS)))
    letters = [
        chr(chance.choice((chance.randrange(32, 127), chance.randrange(0x100, 0xD800)))) for _ in range(40)
    ]
    options: dict[str, float | str] = {}
    if "s_noise" in SAMPLERS[sampler].options:
        options["s_noise"] = chance.uniform(0.5, 2)
    return Request(
        prompt="".join(letters[:25]), negative_prompt="".join(letters[25:]), steps=chance.randint(1, 100),
        sampler=sampler, spacing=spacing, sampler_options=options, guidance=chance.uniform(0, 20),
        seed=chance.randrange(MAX_SEED - 8), width=chance.randint(1, 16_384), height=chance.randint(1, 9),
        rescale=chance.random(), num_images=chance.randint(1, 8), deterministic=chance.random() < 0.5,
    )  # fmt: skip


def ours(chance: random.Random, image: Image.Image, folder: Path) -> None:
    """A request written into a file comes back equal, AssertionError if not."""
    asked = request(chance)
    assert asked.seed is not None
    index = chance.randrange(asked.num_images)
    values = json.loads(asked.model_dump_json(exclude=set(PATHS)))
    values |= {"seed": asked.seed + index, "batch_index": index, "batch_size": values.pop("num_images")}
    path = folder / f"ours.{chance.choice(('png', 'jpg', 'webp'))}"
    path.write_bytes(embed.encode(image, embed.format_of(path.suffix), values))
    found = read(path)
    assert found.request == asked, (found.request, asked)
    assert found.index == index


def timed(function: Callable[[str], object], text: str) -> float:
    """Processor seconds of one call."""
    started = time.process_time()
    function(text)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    failures = list[str]()
    image = Image.new("RGB", (5, 4), "orange")
    example = {"prompt": "a fox 🦊", "steps": 20, "seed": 3}
    whole = {name: embed.encode(image, kind, example) for name, kind in embed.FORMATS.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks: tuple[Callable[[random.Random], None], ...] = (
            strangers,
            lambda chance: damaged(chance, whole, folder),
            lambda chance: ours(chance, image, folder),
        )
        for number in range(options.count):
            try:
                tasks[number % 3](random.Random(number))  # noqa: S311 - no secrets
            except Exception as error:  # what must not happen is counted
                failures.append(f"{number}: {type(error).__name__}: {error}")
    slow = {
        unit: min(timed(from_text, "x\nSteps: 1, " + (unit * LENGTH)[:LENGTH]) for _ in range(3))
        for unit in UNITS
    }
    result = {
        "recipes": options.count,
        "exceptions": len(failures),
        "failures": failures[:20],
        "characters": LENGTH,
        "worst_seconds": max((round(seconds, 4), unit) for unit, seconds in slow.items()),
    }
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
