"""How a picture becomes the small one that a network learns to enlarge; all chance comes from its position.

The kinds of loss are those of Real-ESRGAN (Wang et al. 2021, section 3), milder, and one more: the round trip
through an autoencoder, for that is where drawn pictures come from.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.training.data import Position
from sfumato.training.settings_upscaler import UpscalerTaskConfig

FILTERS = ("box", "box", "box", "bicubic", "triangle")  # one is drawn: how renderers and programs make small
BLURS = (0.3, 0.8)  # deviation of a Gaussian, in small pixels
QUALITIES = (60, 98)  # of JPEG
NEARBY, LEAST_VARIANCE = 3, 1e-3  # small pixels around one, and what counts as flat, in `fitted`
RADIUS = 3  # small pixels that a blur reaches


@dataclass(frozen=True)
class Way:
    """What one picture goes through.

    filter: of the downscaling. blur: deviation in small pixels, 0 for none. quality: of JPEG, None for none.
    latent_noise: deviations of noise on the latent of the round trip, None for no round trip. turn: 0 to 7,
    one of the square's symmetries.
    """

    filter: str = "box"
    blur: float = 0.0
    quality: int | None = None
    latent_noise: float | None = None
    turn: int = 0


def drawn(config: UpscalerTaskConfig, position: Position) -> Way:
    """The way of the sample at a position."""
    generator = position.generator("degradation")

    def chance() -> float:
        return float(torch.rand((), generator=generator))

    decoded, blurred, packed = chance(), chance(), chance()
    noise, blur, quality = chance(), chance(), chance()
    kind, turn = FILTERS[int(chance() * len(FILTERS))], int(chance() * 8)
    if config.autoencoder is not None and decoded < config.decoded:
        return Way(latent_noise=config.latent_noise * noise, turn=turn)
    return Way(
        kind,
        BLURS[0] + (BLURS[1] - BLURS[0]) * blur if blurred < config.blurred else 0.0,
        round(QUALITIES[0] + (QUALITIES[1] - QUALITIES[0]) * quality) if packed < config.packed else None,
        turn=turn,
    )


def smaller(pictures: Tensor, scale: int, kind: str = "box") -> Tensor:
    """(b, c, h, w) -> (b, c, h / scale, w / scale), sides being multiples of scale."""
    if kind == "box":
        return F.avg_pool2d(pictures, scale)
    size = [side // scale for side in pictures.shape[-2:]]
    mode = {"bicubic": "bicubic", "triangle": "bilinear"}[kind]
    return F.interpolate(pictures, size=size, mode=mode, antialias=True, align_corners=False)


def worn(small: Tensor, way: Way) -> Tensor:
    """One picture (c, h, w) in 0..1 softened and packed as a JPEG file, where its way says so."""
    if way.blur:
        small = blurred(small[None], way.blur)[0]
    return small if way.quality is None else _repacked(small, way.quality)


def blurred(pictures: Tensor, deviation: float) -> Tensor:
    """(b, c, h, w) under a Gaussian of that deviation in pixels, repeated at the edges."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=pictures.dtype, device=pictures.device)
    weights = torch.softmax(-(offsets**2) / (2 * deviation**2), dim=0)
    channels = pictures.shape[1]
    for shape, padding in (((1, -1), (RADIUS, RADIUS, 0, 0)), ((-1, 1), (0, 0, RADIUS, RADIUS))):
        kernel = weights.reshape(1, 1, *shape).expand(channels, 1, -1, -1)
        pictures = F.conv2d(F.pad(pictures, padding, mode="replicate"), kernel, groups=channels)
    return pictures


@torch.no_grad()
def decoded(
    pictures: Tensor,
    autoencoder: AutoencoderKL,
    latent_scale: float,
    noise: Sequence[float],
    positions: Sequence[Position],
) -> Tensor:
    """(b, c, h, w) in 0..1 -> the same through the autoencoder: a sample of the posterior, and noise on it.

    noise: for each picture, in deviations of a latent; latent_scale: the inverse of such a deviation.
    """
    posterior = autoencoder.encode(pictures * 2 - 1)
    drawn = [
        torch.randn((2, *posterior.mean.shape[1:]), generator=position.generator("round trip"))
        for position in positions
    ]
    own, added = torch.stack(drawn, dim=1).to(pictures.device)
    amounts = torch.tensor(noise, device=pictures.device).reshape(-1, 1, 1, 1) / latent_scale
    latents = posterior.mean + posterior.std * own + amounts * added
    return (autoencoder.decode(latents).float() + 1) / 2


def fitted(large: Tensor, small: Tensor, seen: Tensor) -> Tensor:
    """The large pictures (b, c, h, w) in the tones that `seen` has where `small` is what they are made small.

    A decoder changes colours and loses what is tiny; neither can be told from its picture. So what is asked
    for is the guided filter's answer (He and Sun 2015): around each small pixel the line that leads best from
    `small` to `seen`, drawn at full size with the outlines of `large`.
    """

    def mean(values: Tensor) -> Tensor:
        padded = F.pad(values, (NEARBY,) * 4, mode="replicate")
        return F.avg_pool2d(padded, 2 * NEARBY + 1, stride=1)

    centre, aim = mean(small), mean(seen)
    slope = (mean(small * seen) - centre * aim) / (mean(small * small) - centre**2 + LEAST_VARIANCE)
    lines = torch.cat([mean(slope), mean(aim - slope * centre)], dim=1)
    lines = F.interpolate(lines, size=large.shape[-2:], mode="bilinear", align_corners=False)
    slope, start = lines.chunk(2, dim=1)
    return (slope * large + start).clamp(0, 1)


def eight_bits(pictures: Tensor) -> Tensor:
    """Values in 0..1 as a picture file has them."""
    return (pictures.clamp(0, 1) * 255).round() / 255


def turned(pictures: Tensor, turn: int) -> Tensor:
    """One of the square's eight symmetries, 0 to 7, of (..., h, w)."""
    pictures = pictures.flip(-1) if turn & 1 else pictures
    pictures = pictures.flip(-2) if turn & 2 else pictures
    return pictures.transpose(-1, -2) if turn & 4 else pictures


def corner(position: Position, height: int, width: int, side: int) -> tuple[int, int]:
    """(top, left) of a square of that side inside a small picture, drawn for the position."""
    top, left = torch.rand(2, generator=position.generator("crop")).tolist()
    return math.floor(top * (height - side + 1)), math.floor(left * (width - side + 1))


def _repacked(small: Tensor, quality: int) -> Tensor:
    pixels = (small.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "JPEG", quality=quality)
    with Image.open(file, formats=["JPEG"]) as opened:
        values = np.array(opened, dtype=np.float32).reshape(pixels.shape)
    return torch.from_numpy(values / 255).movedim(-1, 0).to(small.device)
