"""What a first stage leaves beside its weights: statistics of its latents, and ways to preview them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.preview import PreviewConfig, PreviewDecoder
from sfumato.nn.vq import VQModel

WIDTH = 32  # of the preview decoder
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Spread:
    """Means and deviations of the channels of unscaled latents; scale: brings all together to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float


@torch.no_grad()
def measured(
    network: AutoencoderKL | VQModel, batches: Iterable[Tensor]
) -> tuple[Spread, tuple[tuple[float, ...], ...]]:
    """(the latents' spread, the least-squares matrix from a latent's channels and 1 to its pixels' colour).

    The spread counts the posterior's own, for diffusion learns from draws. The matrix (z + 1, c) takes
    latents as they are encoded; `scaled` makes it one for what a U-Net sees.
    """
    config = network.config
    products = torch.zeros(config.embed_dim + 1, config.embed_dim + 1, dtype=torch.float64)
    colours = torch.zeros(config.embed_dim + 1, config.in_channels, dtype=torch.float64)
    spreads = torch.zeros(config.embed_dim, dtype=torch.float64)
    for pictures in batches:
        encoded = network.encode(pictures)
        mode, small = encoded.mode(), F.interpolate(pictures, encoded.mean.shape[-2:], mode="area")
        latents = _places(F.pad(mode, (0, 0, 0, 0, 0, 1), value=1.0))  # (places, z + 1), the last all ones
        products += latents.T @ latents
        colours += latents.T @ _places(small)
        spreads += _places(encoded.std).square().sum(dim=0)
    count = products[-1, -1]
    mean, square = products[-1, :-1] / count, (products.diagonal()[:-1] + spreads) / count
    variance, whole = square - mean.square(), square.mean() - mean.mean().square()
    matrix = torch.linalg.lstsq(products, colours, driver="gelsd").solution  # its normal equations
    spread = Spread(tuple(mean.tolist()), tuple(variance.sqrt().tolist()), float(whole.rsqrt()))
    return spread, tuple(tuple(row) for row in matrix.tolist())


def _places(maps: Tensor) -> Tensor:
    """(b, c, h, w) -> (b * h * w, c), in double precision, on the CPU."""
    return maps.double().cpu().movedim(1, -1).flatten(0, -2)


def scaled(matrix: tuple[tuple[float, ...], ...], scale: float) -> tuple[tuple[float, ...], ...]:
    """The matrix for latents times `scale`: its last row, the constant, stays."""
    *weights, constant = matrix
    return (*(tuple(value / scale for value in row) for row in weights), constant)


def distil(
    network: AutoencoderKL | VQModel, batches: Iterable[Tensor], steps: int, scale: float, seed: int
) -> PreviewDecoder:
    """A tiny decoder that learned in `steps` batches of pictures what `network` makes of their latents.

    The same weights come of the same arguments; torch's own generator is left as it was.
    """
    config = network.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = PreviewDecoder(
            PreviewConfig(config.embed_dim, config.out_ch, WIDTH, round(math.log2(config.downsampling)))
        )
    student.to(next(network.parameters()).device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step, pictures in zip(range(steps), batches, strict=False):
        with torch.no_grad():
            latents = network.encode(pictures).mode()
            wanted = network.decode(latents).float().clamp(-1, 1)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.enable_grad():
            loss = (student(latents.float() * scale) - wanted).abs().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student.eval()
