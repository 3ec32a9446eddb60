"""T2I-Adapter: features of a picture, added inside a U-Net's encoder (Mou et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import InputError, nearest
from sfumato.nn.unet import Patch
from sfumato.nn.unet_config import UNetConfig

Kind = Literal["full", "full-xl", "light"]
KINDS = ("full", "full-xl", "light")
XL_HALVING = 2  # the one level of SDXL's adapters that halves the sides


@dataclass(frozen=True)
class T2IAdapterConfig:
    """Architecture of an adapter; the defaults are those of Stable Diffusion 1 for pictures in colour.

    in_channels: of the pictures, 3 or 1. channels: of the features, one for each level. num_res_blocks: in
    each level. kind: "full", "light" (narrow inside), "full-xl" (SDXL's, with one halving). unshuffle: pixels
    along a side that become channels first. Raises InputError for an unknown kind.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    kind: Kind = "full"
    unshuffle: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.kind not in KINDS:
            raise InputError(f"there is no kind of adapter {self.kind!r}", nearest(self.kind, KINDS))

    def halves(self, level: int) -> bool:
        """Whether a level begins by halving the sides."""
        return level == XL_HALVING if self.kind == "full-xl" else level > 0

    @property
    def downsampling(self) -> int:
        """What the sides of a picture must be multiples of."""
        return self.unshuffle * 2 ** sum(self.halves(level) for level in range(len(self.channels)))


class AdapterResBlock(nn.Module):
    """Residual block, (b, in_channels, h, w) -> (b, channels, h, w), its input halved first if `halve`."""

    def __init__(self, in_channels: int, channels: int, kernel: int, *, halve: bool) -> None:
        super().__init__()
        self.halve = halving(halve)
        same = in_channels == channels
        self.in_conv = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1)
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_conv(self.halve(x))
        return x + self.block2(F.relu(self.block1(x)))


class LightExtractor(nn.Module):
    """One level of the light adapter: residual blocks at a quarter of its width."""

    def __init__(self, in_channels: int, channels: int, num_res_blocks: int, *, halve: bool) -> None:
        super().__init__()
        inner = channels // 4
        self.halve = halving(halve)
        self.in_conv = nn.Conv2d(in_channels, inner, 1)
        self.body = nn.Sequential(
            *(AdapterResBlock(inner, inner, 3, halve=False) for _ in range(num_res_blocks))
        )
        self.out_conv = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.body(self.in_conv(self.halve(x))))


class T2IAdapter(nn.Module):
    """The features of a picture, one map for each level of a U-Net's encoder; see `forward`."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        entry = config.in_channels * config.unshuffle**2
        if config.kind == "light":
            self.conv_in = nn.Identity()
            self.body = nn.ModuleList(_light_levels(config, entry))
        else:
            self.conv_in = nn.Conv2d(entry, config.channels[0], 3, padding=1)
            self.body = nn.ModuleList(_full_blocks(config))

    def forward(self, picture: Tensor) -> list[Tensor]:
        """Features (b, channels[i], h_i, w_i) of pictures (b, in_channels, h, w) in 0..1.

        Raises InputError where the channels differ, or the sides are no multiples of `downsampling`.
        """
        config, step = self.config, self.config.downsampling
        if picture.ndim != 4 or picture.shape[1] != config.in_channels:
            raise InputError(
                f"The picture has shape {tuple(picture.shape)}; "
                f"this adapter takes (b, {config.in_channels}, h, w)."
            )
        if any(side % step for side in picture.shape[2:]):
            raise InputError(
                f"The sides {tuple(picture.shape[2:])} must be multiples of {step}.", "Draw at such a size."
            )
        blocks = 1 if config.kind == "light" else config.num_res_blocks
        features: list[Tensor] = []
        h = self.conv_in(F.pixel_unshuffle(picture, config.unshuffle))
        for i, block in enumerate(self.body, 1):
            h = block(h)
            if i % blocks == 0:
                features.append(h)
        return features


def adapter_places(config: UNetConfig) -> list[int]:
    """The blocks of a U-Net's encoder that an adapter's features are added to, one for each level.

    The last residual block of a level with attention; without, what follows it: the halving, if there is one.
    So do diffusers' down blocks, and the adapters of SDXL need it.
    """
    places, index = list[int](), 0
    for level in range(len(config.channel_mult)):
        index += config.residual_blocks(level)
        halved = level < len(config.channel_mult) - 1
        places.append(index if config.attended(level) or not halved else index + 1)
        index += halved
    return places


def adapter_patch(config: UNetConfig, features: Sequence[Tensor]) -> Patch:
    """The patch that adds an adapter's features inside a U-Net of these options.

    features: (b, c_i, h_i, w_i), already weighted; b is the batch's, or 1. One that is left when every level
    has its own is added to the middle block's output (SDXL's fourth). Raises InputError for too many.
    """
    places = adapter_places(config)
    if len(features) > len(places) + 1:
        raise InputError(
            f"{len(features)} features; this U-Net has {len(places)} levels and a middle.",
            "Give an adapter of the same family.",
        )
    by_block = dict(zip(places, features, strict=False))
    middle = features[len(places) :]

    def encoder(i: int, h: Tensor) -> Tensor:
        return h + fitting(by_block[i], h) if i in by_block else h

    def skip(i: int, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return (h + fitting(middle[0], h), skip) if i == 0 and middle else (h, skip)

    return Patch(encoder=encoder, skip=skip)


def fitting(feature: Tensor, h: Tensor) -> Tensor:
    """The feature, if it can be added to h; InputError otherwise."""
    if feature.shape[1:] != h.shape[1:]:
        raise InputError(
            f"A feature {tuple(feature.shape[1:])} meets {tuple(h.shape[1:])} in the U-Net.",
            "The adapter belongs to another family, or its picture has another size than what is drawn.",
        )
    return feature


def halving(wanted: bool) -> nn.Module:
    """The mean of each four neighbours, or nothing."""
    return nn.AvgPool2d(2) if wanted else nn.Identity()


def _full_blocks(config: T2IAdapterConfig) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    channels = config.channels[0]
    for level, width in enumerate(config.channels):
        for number in range(config.num_res_blocks):
            halve = number == 0 and config.halves(level)
            blocks.append(AdapterResBlock(channels, width, 1, halve=halve))
            channels = width
    return blocks


def _light_levels(config: T2IAdapterConfig, entry: int) -> list[nn.Module]:
    inputs = (entry, *config.channels[:-1])
    return [
        LightExtractor(narrow, width, config.num_res_blocks, halve=config.halves(level))
        for level, (narrow, width) in enumerate(zip(inputs, config.channels, strict=True))
    ]
