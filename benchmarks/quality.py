r"""Scores of the embedded model against its recipe's held-out pictures; prints them and writes them as JSON.

Run: python benchmarks/quality.py --judge runs/attributes.safetensors \
         --recipe configs/illustrations-finish.toml
The recipe says where the pictures lie and, by its repeats, which of them belong to the model's domain.
Default settings, seed i for prompt i, no picking. Beside each figure stand chance, the
judge's accuracy on real pictures and the autoencoder's own round trip of those.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sfumato
from attributes import Facts, Judge, facts, load_judge, picture
from sfumato.data.pictures import Pictures, Row
from sfumato.generation import draw
from sfumato.training.config import DataConfig, read_config
from sfumato.training.data import Illustrations
from sfumato.training.sheets import save_sheet

BATCH = 50
PAIRS = 400_000  # pairs of training pictures whose distances are measured
NEIGHBOURS = 2_000  # training pictures whose nearest neighbour is looked for
SAME = 0.2  # below: one picture, stored twice


def chosen(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` rows by the hash of their names."""
    return sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest())[:count]


def drawn(model: sfumato.StableDiffusion, rows: Sequence[Row]) -> Tensor:
    """A picture for the canonical caption of each row."""
    found = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        seeds = list(range(start, start + len(part)))
        found.append(draw(model, [row["captions"][0] for row in part], seeds).clamp(-1, 1))
    return torch.cat(found)


@torch.no_grad()
def round_trip(model: sfumato.StableDiffusion, pictures: Tensor) -> Tensor:
    """Through the autoencoder and back."""
    return torch.cat(
        [model.decode_latents(model.encode_image(part)).clamp(-1, 1) for part in pictures.split(BATCH)]
    )


def small(pictures: Tensor) -> Tensor:
    """(n, 3 * 32 * 32): what distances are measured between."""
    return F.interpolate(pictures, (32, 32), mode="area").flatten(1)


def psnr(pictures: Tensor, other: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB."""
    error = (pictures - other).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
    return float((10 * torch.log10(4 / error)).mean())


def nearest_drawing(
    pictures: Tensor, rows: Sequence[Row], known: dict[str, tuple[Tensor, list[str]]]
) -> float:
    """(a) share of pictures whose nearest training drawing of the asked style is of the asked object."""
    right = 0
    for candidate, row in zip(small(pictures), rows, strict=True):
        drawings, names = known[row["attributes"]["style"]]
        distances = (drawings - candidate).square().sum(dim=1)
        right += names[int(distances.argmin())] == row["attributes"]["object"]
    return right / len(rows)


def accuracy(
    judge: Judge, pictures: Tensor, wanted: Sequence[Facts], heads: Sequence[str] | None = None
) -> float:
    """Share of wanted attributes that the judge sees; `heads` restricts which."""
    told = [{head: value for head, value in row.items() if heads is None or head in heads} for row in wanted]
    answers = [right for found in judge.right(pictures, told).values() for right in found]
    return sum(answers) / len(answers)


def by_head(judge: Judge, pictures: Tensor, wanted: Sequence[Facts]) -> dict[str, float]:
    return {
        head: round(sum(right) / len(right), 3)
        for head, right in sorted(judge.right(pictures, wanted).items())
    }


def chance(judge: Judge, wanted: Sequence[Facts], heads: Sequence[str] | None = None) -> float:
    """Expected accuracy of a uniform guess."""
    counts = Counter(head for row in wanted for head in row if heads is None or head in heads)
    return sum(count / len(judge.values[head]) for head, count in counts.items()) / sum(counts.values())


def nearest_distances(pictures: Tensor, training: Tensor, least: float = 0.0) -> Tensor:
    """Euclidean distance of each picture (as `small`) to the nearest training picture beyond `least`."""
    best = torch.full((len(pictures),), float("inf"))
    for part in training.split(4096):
        distances = torch.cdist(pictures, as_small(part))
        best = torch.minimum(best, distances.masked_fill(distances < least, float("inf")).amin(dim=1))
    return best


def as_small(stored: Tensor) -> Tensor:
    return stored.float() / 127.5 - 1


def memorisation(pictures: Tensor, real: Tensor, training: Tensor) -> dict[str, float]:
    """(d) share nearer to a training picture than the 1st percentile of the training pictures' own distances.

    Those distances are taken twice: from a training picture to the nearest other one, which a copy undercuts,
    and between any two, which most unseen combinations of the same parts undercut as well.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(len(training), (2, PAIRS), generator=generator)
    pairs = torch.cat(
        [
            (as_small(training[a]) - as_small(training[b])).square().sum(dim=1).sqrt()
            for a, b in zip(first.split(4096), second.split(4096), strict=True)
        ]
    )
    neighbours = nearest_distances(as_small(training[first[:NEIGHBOURS]]), training, SAME)
    drawn, held_out = (nearest_distances(small(group), training) for group in (pictures, real))
    found = {}
    for name, distances in (("neighbours", neighbours), ("pairs", pairs[pairs >= SAME])):
        limit = float(torch.quantile(distances, 0.01))
        found |= {
            f"{name}_limit": limit,
            f"samples_below_{name}": float((drawn < limit).float().mean()),
            f"real_held_out_below_{name}": float((held_out < limit).float().mean()),
        }
    return found


def score(
    model: sfumato.StableDiffusion, domain: DataConfig, judge: Judge, count: int, sheets: Path | None
) -> dict[str, Any]:
    pictures = Pictures(domain.path)
    train, test = (
        Illustrations(domain.path, domain.shape, domain.channels, split, domain.repeats).rows
        for split in ("train", "test")
    )

    def real(rows: Sequence[Row]) -> Tensor:
        return torch.stack([picture(pictures, row) for row in rows])

    results: dict[str, Any] = {}

    def report(name: str, values: dict[str, Any]) -> None:
        results[name] = {key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()}
        print(json.dumps({name: results[name]}), flush=True)

    held_out = chosen(test, 512)
    held_out_pictures = real(held_out)
    report("autoencoder", {"held_out_psnr": psnr(held_out_pictures, round_trip(model, held_out_pictures))})

    # (a) drawings seen in training, on white
    seen = {(r["attributes"]["object"], r["attributes"]["style"]): r for r in train
            if r["kind"] == "drawing" and r["attributes"]["background"] == "white"}  # fmt: skip
    known = {}
    for style in sorted({style for _, style in seen}):
        rows = [row for (_, own), row in seen.items() if own == style]
        known[style] = (small(real(rows)), [row["attributes"]["object"] for row in rows])
    rows = chosen(list(seen.values()), count)
    samples = drawn(model, rows)
    report("a_seen_drawings", {
        "right": nearest_drawing(samples, rows, known), "prompts": len(rows), "bar": 0.6,
        "chance": sum(1 / len(known[row["attributes"]["style"]][1]) for row in rows) / len(rows),
        "round_trip": nearest_drawing(round_trip(model, real(rows)), rows, known),
        "judge_on_samples": accuracy(judge, samples, [facts(row) for row in rows], ["object"]),
    })  # fmt: skip
    show(sheets, "a-seen-drawings", samples)

    # (b) styles in which training never showed the object
    rows = chosen([row for row in test if row["kind"] == "drawing"], count)
    samples, originals, wanted = drawn(model, rows), real(rows), [facts(row) for row in rows]
    report("b_held_out_drawings", {
        "right": accuracy(judge, samples, wanted, ["object"]), "prompts": len(rows), "bar": 0.3,
        "chance": chance(judge, wanted, ["object"]),
        "judge_on_real": accuracy(judge, originals, wanted, ["object"]),
        "round_trip": accuracy(judge, round_trip(model, originals), wanted, ["object"]),
    })  # fmt: skip
    show(sheets, "b-held-out-drawings", samples)

    # (c) combinations of attributes that training never showed
    everything, everything_real = [samples], [originals]
    for kind in ("scene", "avatar"):
        rows = chosen([row for row in test if row["kind"] == kind], count)
        samples, originals, wanted = drawn(model, rows), real(rows), [facts(row) for row in rows]
        everything.append(samples)
        everything_real.append(originals)
        report(f"c_held_out_{kind}s", {
            "right": accuracy(judge, samples, wanted), "prompts": len(rows), "bar": 0.6,
            "chance": chance(judge, wanted),
            "judge_on_real": accuracy(judge, originals, wanted),
            "round_trip": accuracy(judge, round_trip(model, originals), wanted),
            "by_attribute": by_head(judge, samples, wanted),
        })  # fmt: skip
        show(sheets, f"c-held-out-{kind}s", samples)

    # (d) copies
    groups = [train[start : start + 512] for start in range(0, len(train), 512)]
    stored = torch.cat([((small(real(group)) + 1) * 127.5).round().byte() for group in groups])
    report(
        "d_memorisation",
        memorisation(torch.cat(everything), torch.cat(everything_real), stored) | {"bar": 0.05},
    )
    return results


def show(folder: Path | None, name: str, pictures: Tensor) -> None:
    if folder is not None:
        save_sheet(folder / f"{name}.png", pictures[:64], columns=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="where the pictures lie, if not where the recipe says")
    parser.add_argument("--judge", type=Path, required=True, help="what attributes.py wrote")
    parser.add_argument("--model", type=Path, help="a model file; the embedded model without it")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets of the samples")
    options = parser.parse_args()
    started = time.perf_counter()
    model = sfumato.load(options.model)
    domain = read_config(options.recipe, [] if options.data is None else [f"data.path={options.data}"]).data
    results = score(model, domain, load_judge(options.judge), options.count, options.sheets)
    results["run"] = {
        "model": model.name,
        "sha256": model.digest,
        "defaults": dict(model.defaults),
        "count": options.count,
        "seconds": round(time.perf_counter() - started),
        "torch": torch.__version__,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
