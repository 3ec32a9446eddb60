"""The network behind `sfumato upscale` against resampling: nearness to the truth, outlines, rims, seconds.

Held-out drawings of 256 pixels are made small by averaging, and again by that and the embedded autoencoder's
round trip, which is what the model's own pictures went through; then they are enlarged four times. The truth
of the latter is the drawing in the tones that they came back with (`degradations.fitted`): what was made
green is not to be made red. `psnr` is in dB over all values, `psnr_of_drawing` against the drawing itself;
`edges` the mean difference of neighbouring pixels' differences, in 8-bit steps; `rims` the mean of what lies
beyond the values of the truth nearby, in 8-bit steps: haloes and ringing.

The set: sfumato data build illustrations --size 256 --out data/illustrations-256
Run: python benchmarks/upscaler.py data/illustrations-256 --out benchmarks/results/upscaler.json \
    --sheet docs/pictures/upscaler.png
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import sfumato
from sfumato import images
from sfumato.checkpoints.upscaler import load_upscaler
from sfumato.generation import draw
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.recipes.sheet import Labels, labelled
from sfumato.training.data import Position, open_dataset
from sfumato.training.tasks.degradations import decoded, eight_bits, fitted, smaller
from sfumato.upscale import EMBEDDED, enlarge

SCALE, SIDE = 4, 256
NEARBY = 4  # pixels of the large picture around one
SHOWN = {"clean": (10, 130, 300), "decoded": (60, 330)}  # held-out pictures on the sheet
DRAWN = {
    "a noto drawing of a fox": 1,
    "a twemoji drawing of a house": 4,
    "a dog on a blue background": 8,
    "two tomatoes on a gray background": 19,
    "a tulip in a yellow pot with round eyes and a grin, on a red background": 31,
}  # of the README's sheet, with its seeds
Way = Callable[[Image.Image], Image.Image]


def resampled(filter: Image.Resampling) -> Way:
    return lambda picture: picture.resize((picture.width * SCALE, picture.height * SCALE), filter)


def tensor(picture: Image.Image) -> Tensor:
    """(1, 3, h, w) in 0..1."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255).movedim(-1, 0)[None]


def picture(values: Tensor) -> Image.Image:
    """The inverse, of (3, h, w)."""
    return images.to_pil(values[None] * 2 - 1)[0]


def scores(made: Tensor, truth: Tensor) -> dict[str, float]:
    """Of one picture (1, 3, h, w)."""
    error = made - truth
    high, low = (F.max_pool2d(each, 2 * NEARBY + 1, 1, NEARBY) for each in (truth, -truth))
    beyond = (made - high).clamp_min(0) + (-low - made).clamp_min(0)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return {
        "psnr": float(-10 * torch.log10(error.square().mean().clamp_min(1e-10))),
        "edges": float(edges) * 255,
        "rims": float(beyond.mean()) * 255,
    }


def inputs(root: Path, indices: list[int], autoencoder: AutoencoderKL, scale: float) -> dict[str, Tensor]:
    """Held-out pictures as they are ("truth"), made small ("clean"), and that decoded again ("decoded").

    "fitted" is the truth of the last.
    """
    data = open_dataset(root, (SIDE, SIDE), 3, "test")
    truth = torch.cat([tensor(data.picture(index)) for index in indices])
    small = smaller(truth, SCALE)
    trips = [
        decoded(small[place : place + 1], autoencoder, scale, [0.0], [Position(7, 0, index, index)])
        for place, index in enumerate(indices)
    ]
    seen = torch.cat(trips)
    return {
        "truth": truth,
        "clean": eight_bits(small),
        "decoded": eight_bits(seen),
        "fitted": eight_bits(fitted(truth, small, seen)),
    }


def sheet(
    held_out: dict[str, dict[str, Tensor]], drawn: list[Image.Image], ways: dict[str, Way]
) -> Image.Image:
    """Rows of pictures: as they came, by Lanczos, by our network, as they should be where that is known."""
    rows: list[tuple[str, Image.Image, Image.Image | None]] = []
    for kind, found in held_out.items():
        name = {"clean": "held out, made small", "decoded": "the same, decoded"}[kind]
        rows += [(name, picture(s), picture(t)) for s, t in zip(found[kind], found["truth"], strict=True)]
    rows += [("drawn by the embedded model", each, None) for each in drawn]
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    shown = [
        cell
        for _, small, truth in rows
        for cell in (ways["nearest"](small), ways["lanczos"](small), ways["ours"](small), truth or blank)
    ]
    columns = Labels("", ("64 x 64", "Lanczos x 4", "ours x 4", "as it was drawn"))
    return labelled(shown, columns, Labels("", tuple(name for name, _, _ in rows)))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    upscaler = load_upscaler(options.model)
    ways: dict[str, Way] = {
        "nearest": resampled(Image.Resampling.NEAREST),
        "bicubic": resampled(Image.Resampling.BICUBIC),
        "lanczos": resampled(Image.Resampling.LANCZOS),
        "ours": lambda small: enlarge(small, upscaler),
    }
    model = sfumato.load(device="cpu")
    autoencoder = model.autoencoder
    assert isinstance(autoencoder, AutoencoderKL)
    total = len(open_dataset(options.data, (SIDE, SIDE), 3, "test"))
    found = inputs(
        options.data,
        list(range(0, total, max(1, total // options.count)))[: options.count],
        autoencoder,
        model.latent_scale,
    )
    result: dict[str, object] = {
        "network": upscaler.kind,
        "parameters": sum(each.numel() for each in upscaler.network.parameters()),
        "bytes": options.model.stat().st_size,
        "pictures": len(found["truth"]),
    }
    for kind in ("clean", "decoded"):
        table = {}
        for name, way in ways.items():
            started = time.perf_counter()
            made = [way(picture(each)) for each in found[kind]]
            seconds = (time.perf_counter() - started) / len(made)
            truth = found["truth" if kind == "clean" else "fitted"]
            each = [scores(tensor(m), t[None]) for m, t in zip(made, truth, strict=True)]
            for one, m, drawing in zip(each, made, found["truth"], strict=True):
                one["psnr_of_drawing"] = scores(tensor(m), drawing[None])["psnr"]
            means = {key: round(sum(one[key] for one in each) / len(each), 3) for key in each[0]}
            table[name] = {**means, "seconds": round(seconds, 4)}
        result[kind] = table
        ours, theirs = table["ours"], table["lanczos"]
        result[f"{kind}_better"] = ours["psnr"] > theirs["psnr"] and ours["edges"] < theirs["edges"]
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    text = json.dumps(result, indent=2)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    if options.sheet is not None:
        shown = {
            kind: inputs(options.data, [i % total for i in chosen], autoencoder, model.latent_scale)
            for kind, chosen in SHOWN.items()
        }
        drawn = images.to_pil(draw(model, list(DRAWN), list(DRAWN.values())))
        sheet(shown, drawn, ways).save(options.sheet, "PNG", optimize=True)


if __name__ == "__main__":
    main()
