"""How good round trips are: PSNR, SSIM, LPIPS, spread of the latents, use of the codebook, worst tiles."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.codebook import usage
from sfumato.nn.lpips import LPIPS
from sfumato.nn.ssim import ssim
from sfumato.nn.vq import VQModel
from sfumato.training.sheets import save_sheet

TILES = 4  # tiles along a side of which the worst is shown
SPREAD = "held_out_latent"


def round_trip(network: AutoencoderKL | VQModel, pictures: Tensor) -> Tensor:
    """(b, c, h, w) in -1..1 through the likeliest latent and back, clamped."""
    return network.decode(network.encode(pictures).mode()).float().clamp(-1, 1)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """(b, c, h, w) in -1..1, twice -> (b,) peak signal-to-noise ratio in dB."""
    error = (first - second).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


@torch.no_grad()
def scores(
    network: AutoencoderKL | VQModel, batches: Iterable[Tensor], lpips: LPIPS | None
) -> dict[str, float]:
    """Means over pictures; mean and deviation of each latent channel; use of the codebook in all of them."""
    found: dict[str, list[Tensor]] = {"psnr": [], "l1": [], "ssim": []}
    latents, counts = [], torch.zeros(network.config.n_embed or 1)
    for pictures in batches:
        encoded = network.encode(pictures)
        back = network.decode(encoded.mode()).float().clamp(-1, 1)
        found["psnr"].append(psnr(back, pictures))
        found["l1"].append((back - pictures).abs().mean(dim=(1, 2, 3)))
        found["ssim"].append(ssim(back, pictures))
        if lpips is not None:
            found.setdefault("lpips", []).append(lpips(back, pictures))
        latents.append(encoded.mode().movedim(1, 0).flatten(1))
        if isinstance(network, VQModel):
            indices = network.quantize.indices(encoded.mode()).flatten()
            counts += torch.bincount(indices, minlength=len(counts)).cpu()
    values = {f"held_out_{name}": float(torch.cat(parts).mean()) for name, parts in found.items()}
    spread = torch.cat(latents, dim=1)  # (c, places)
    for channel, row in enumerate(spread):
        values |= {f"{SPREAD}_mean_{channel}": float(row.mean()), f"{SPREAD}_std_{channel}": float(row.std())}
    if isinstance(network, VQModel):
        values["held_out_codes_used"], values["held_out_perplexity"] = usage(counts)
    return values


@torch.no_grad()
def round_trip_sheet(
    network: AutoencoderKL | VQModel, batches: Iterable[Tensor], path: Path, shown: int, columns: int
) -> None:
    """Pictures in odd rows, their round trips below; the last two rows are the worst tiles, enlarged.

    A row that is not full is left out, but for the first.
    """
    pairs = torch.cat([torch.stack([part, round_trip(network, part)]) for part in batches], dim=1)
    columns = min(columns, pairs.shape[1])
    count = min(shown, pairs.shape[1]) // columns * columns
    rows = [pairs[:, :count], worst_tiles(pairs, columns)]  # (2, b, c, h, w) each
    ordered = torch.cat([part.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2) for part in rows])
    save_sheet(path, ordered, columns)


def worst_tiles(pairs: Tensor, count: int) -> Tensor:
    """(2, count, c, h, w): of `pairs` (2, b, c, h, w) the worst tiles, one of a picture, at a picture's size.

    A tile is a quarter of the picture's side; the worst has the largest squared error.
    """
    height, width = pairs.shape[-2:]
    tile = (max(1, height // TILES), max(1, width // TILES))
    errors = F.avg_pool2d(
        (pairs[0] - pairs[1]).square().mean(dim=1, keepdim=True), tile
    )  # (b, 1, rows, columns)
    worst, place = errors.flatten(1).max(dim=1)
    cut = []
    for index in worst.topk(count).indices.tolist():
        row, column = divmod(int(place[index]), errors.shape[-1])
        top, left = row * tile[0], column * tile[1]
        cut.append(pairs[:, index, :, top : top + tile[0], left : left + tile[1]])
    tiles = torch.stack(cut, dim=1)  # (2, count, c, h / 4, w / 4)
    return F.interpolate(tiles.flatten(0, 1), (height, width), mode="nearest").unflatten(0, (2, count))
