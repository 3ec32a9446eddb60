r"""What each term of a first stage's loss buys: KL-f4 and VQ-f4 with and without SSIM and discriminator.

Run: python benchmarks/autoencoders.py --data data/illustrations --out runs/autoencoders
Eight runs of the same small budget, one after the other, each held-out picture in each. Writes
benchmarks/results/autoencoders.json and docs/pictures/autoencoders.png; a run that is whole is not run again.
`--table` prints the table of docs/autoencoders.md from the JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.checkpoints.load import load_file
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.codebook import usage
from sfumato.nn.ssim import multi_scale_ssim, ssim
from sfumato.nn.vq import VQModel
from sfumato.training import run
from sfumato.training.data import open_dataset, to_tensor
from sfumato.training.sheets import save_sheet

ROOT = Path(__file__).parents[1]
JSON, SHEET = ROOT / "benchmarks/results/autoencoders.json", ROOT / "docs/pictures/autoencoders.png"
SIDE, SCORED, SHOWN = 64, 512, 12
PATCHES, DIRECTIONS, PATCH = 64, 256, 7  # of the sliced Wasserstein distance, as in Karras et al. 2018
TERMS = {
    "L1": {},
    "L1 + SSIM": {"perceptual": "ssim", "perceptual_weight": 0.5},
    "L1 + GAN": {"adversarial": "hinge"},
    "L1 + SSIM + GAN": {"perceptual": "ssim", "perceptual_weight": 0.5, "adversarial": "hinge"},
}
STAGES = {"KL-f4": "double_z = true", "VQ-f4": "double_z = false\nn_embed = 512"}
RECIPE = """
task = "autoencoder"
name = "{name}"
out = "{out}"
seed = 1
[data]
path = "{data}"
size = {side}
repeats = {{ drawing = 3 }}
[first_stage]
ch = 16
ch_mult = [1, 1, 2]
num_res_blocks = 1
z_channels = 4
embed_dim = 4
resolution = {side}
attn_type = "none"
num_groups = 1
{stage}
[autoencoder]
kl_weight = 5e-4
codebook = "ema"
disc_start = {half}
disc_layers = 2
disc_width = 32
preview_images = 0
{terms}
[optimizer]
learning_rate = 5e-4
weight_decay = 0.0
warmup_images = 400
[loop]
images = {images}
batch = 8
ema_images = 2000
log_images = 1000
preview_images = {images}
save_images = {half}
precision = "bfloat16"
"""


def trained(stage: str, name: str, data: Path, out: Path, images: int) -> tuple[Path, float]:
    """(the model file of one run, seconds of training that its log tells)."""
    folder = out / f"{stage} {name}".lower().replace(" + ", "-").replace(" ", "-")
    terms = "\n".join(f"{key} = {json.dumps(value)}" for key, value in TERMS[name].items())
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        RECIPE.format(
            name=f"{stage} {name}", out=folder / "run", data=data, side=SIDE, stage=STAGES[stage],
            terms=terms, half=images // 2, images=images,
        )
    )  # fmt: skip
    path = folder / "run" / "model.safetensors"
    if not path.exists():
        run(recipe)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "images_per_second" in line]
    starts = [0, *[line["seen"] for line in lines]]
    return path, sum(
        (line["seen"] - start) / line["images_per_second"] for start, line in zip(starts, lines, strict=False)
    )


@torch.no_grad()
def figures(path: Path, pictures: Tensor) -> tuple[dict[str, float], Tensor]:
    """(scores of a model on pictures (n, 3, h, w), their round trips)."""
    network = load_file(path, torch.float32).module("autoencoder")
    assert isinstance(network, AutoencoderKL | VQModel)
    backs, counts = [], torch.zeros(network.config.n_embed or 1)
    for part in pictures.split(64):
        latents = network.encode(part).mode()
        backs.append(network.decode(latents).clamp(-1, 1))
        if isinstance(network, VQModel):
            counts += torch.bincount(network.quantize.indices(latents).flatten(), minlength=len(counts))
    back = torch.cat(backs)
    error = (back - pictures).square().mean(dim=(1, 2, 3))
    scores = {
        "psnr": float((10 * torch.log10(4 / error)).mean()),
        "l1": float((back - pictures).abs().mean()),
        "ssim": float(ssim(back, pictures).mean()),
        "ms_ssim": float(multi_scale_ssim(back, pictures).mean()),
        "sharpness": float(gradients(back).mean() / gradients(pictures).mean()),
        "patch_distance": patch_distance(back, pictures),
    }
    if isinstance(network, VQModel):
        scores["codes_used"], scores["perplexity"] = usage(counts)
    return scores, back


def gradients(pictures: Tensor) -> Tensor:
    """Size of the finite differences: sharper pictures have more."""
    return pictures.diff(dim=-1)[..., 1:, :].square().add(pictures.diff(dim=-2)[..., 1:].square()).sqrt()


def patch_distance(pictures: Tensor, others: Tensor) -> float:
    """Sliced Wasserstein distance of 7x7 patches of the finest Laplacian level, times 1000.

    It compares how often each kind of detail occurs, not where (Karras et al. 2018, section 5).
    """
    first, second = _patches(pictures), _patches(others)
    directions = torch.randn(first.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(directions, dim=0) / second.std()
    along = [(each @ directions).sort(dim=0).values for each in (first, second)]
    return float((along[0] - along[1]).abs().mean() * 1000)


def _patches(pictures: Tensor) -> Tensor:
    """(n * PATCHES, 3 * PATCH^2) pieces of what blurring by half the size takes away."""
    small = F.interpolate(F.avg_pool2d(pictures, 2), pictures.shape[-2:], mode="bilinear")
    unfolded = F.unfold(pictures - small, PATCH)  # (n, 3 * PATCH^2, places)
    places = torch.randperm(unfolded.shape[2], generator=torch.Generator().manual_seed(1))[:PATCHES]
    return unfolded[..., places].movedim(1, -1).flatten(0, 1)


def table(found: dict[str, Any]) -> str:
    """The rows of docs/autoencoders.md."""
    heads = (
        "first stage",
        "loss",
        "PSNR dB",
        "SSIM",
        "MS-SSIM",
        "sharpness",
        "patch distance",
        "entries used",
    )
    lines = [f"| {' | '.join(heads)} | minutes |", "|" + " --- |" * 9]
    for row in found["runs"]:
        used = f"{row['codes_used']:.0%} ({row['perplexity']:.0f})" if "codes_used" in row else "–"
        lines.append(
            f"| {row['stage']} | {row['loss']} | {row['psnr']:.2f} | {row['ssim']:.3f} "
            f"| {row['ms_ssim']:.3f} | {row['sharpness']:.2f} | {row['patch_distance']:.0f} | {used} "
            f"| {row['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/illustrations"))
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoders"))
    parser.add_argument("--images", type=int, default=6_000)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(JSON.read_text())))
        return
    dataset = open_dataset(options.data, (SIDE, SIDE), 3, "test")
    stride = len(dataset) // SCORED
    pictures = torch.stack([to_tensor(dataset.picture(index * stride)) for index in range(SCORED)])
    shown = torch.arange(0, SCORED, SCORED // SHOWN)[:SHOWN]
    rows, sheet = [], [pictures[shown]]
    for stage in STAGES:
        for name in TERMS:
            started = time.perf_counter()
            path, seconds = trained(stage, name, options.data, options.out, options.images)
            scores, back = figures(path, pictures)
            sheet.append(back[shown])
            rows.append({"stage": stage, "loss": name, "seconds": round(seconds, 1)})
            rows[-1] |= {key: round(value, 5) for key, value in scores.items()}
            print(rows[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"
    found = {"images": options.images, "side": SIDE, "scored": SCORED, "machine": machine, "runs": rows}
    JSON.write_text(json.dumps(found, indent=1) + "\n")
    save_sheet(SHEET, torch.cat(sheet), SHOWN)
    print(table(found))


if __name__ == "__main__":
    main()
