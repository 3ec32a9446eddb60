"""Super-resolution networks: ESRGAN's (Wang et al. 2018) and Real-ESRGAN's compact one (Wang et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import InputError

SLOPE = 0.2  # of the leaky rectifiers; ESRGAN's code
RESIDUAL_SCALE = 0.2  # Wang et al. 2018, section 3.1


@dataclass(frozen=True)
class RRDBConfig:
    """Shape of an `RRDBNet`; the defaults are RealESRGAN_x4plus's.

    in_channels, out_channels: of the pictures. num_features: width of the trunk; num_blocks: of its
    residual-in-residual blocks; num_growth: channels that each convolution of a dense block adds.
    num_upsamplings: doublings at the end. unshuffle: squares of so many pixels a side become channels at the
    start, as x2 and x1 models have it (2 and 4). Raises InputError for a number below 1 (doublings: 0).
    """

    in_channels: int = 3
    out_channels: int = 3
    num_features: int = 64
    num_blocks: int = 23
    num_growth: int = 32
    num_upsamplings: int = 2
    unshuffle: int = 1

    def __post_init__(self) -> None:
        _check_counts(self, at_least_0=("num_upsamplings",))
        if 2**self.num_upsamplings % self.unshuffle:
            raise InputError(
                f"{self.num_upsamplings} doublings after an unshuffle of {self.unshuffle} enlarge by no "
                "whole number.",
                "Choose a power of 2 that is no larger.",
            )

    @property
    def scale(self) -> int:
        """Side of the result over side of the picture."""
        return 2**self.num_upsamplings // self.unshuffle


class DenseBlock(nn.Module):
    """Five convolutions, each given all that came before; a fifth of the last is added to the input."""

    def __init__(self, num_features: int, num_growth: int) -> None:
        super().__init__()
        self.conv1 = _conv(num_features, num_growth)
        self.conv2 = _conv(num_features + num_growth, num_growth)
        self.conv3 = _conv(num_features + 2 * num_growth, num_growth)
        self.conv4 = _conv(num_features + 3 * num_growth, num_growth)
        self.conv5 = _conv(num_features + 4 * num_growth, num_features)

    def forward(self, x: Tensor) -> Tensor:
        """(b, num_features, h, w) -> the same shape."""
        known = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            known = torch.cat([known, F.leaky_relu(conv(known), SLOPE)], dim=1)
        return x + RESIDUAL_SCALE * self.conv5(known)


class RRDB(nn.Module):
    """Three dense blocks inside one more residual, also of a fifth."""

    def __init__(self, num_features: int, num_growth: int) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(num_features, num_growth)
        self.rdb2 = DenseBlock(num_features, num_growth)
        self.rdb3 = DenseBlock(num_features, num_growth)

    def forward(self, x: Tensor) -> Tensor:
        """(b, num_features, h, w) -> the same shape."""
        return x + RESIDUAL_SCALE * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """ESRGAN's network, under the state-dict names of Real-ESRGAN's releases."""

    def __init__(self, config: RRDBConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_features
        self.conv_first = _conv(config.in_channels * config.unshuffle**2, width)
        self.body = nn.ModuleList(RRDB(width, config.num_growth) for _ in range(config.num_blocks))
        self.conv_body = _conv(width, width)
        for index in range(config.num_upsamplings):
            self.add_module(f"conv_up{index + 1}", _conv(width, width))
        self.conv_hr = _conv(width, width)
        self.conv_last = _conv(width, config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (b, in_channels, h, w) in 0..1 -> (b, out_channels, scale * h, scale * w), not clamped.

        h and w are multiples of `unshuffle`.
        """
        first = self.conv_first(F.pixel_unshuffle(x, self.config.unshuffle))
        h = first
        for block in self.body:
            h = block(h)
        h = first + self.conv_body(h)
        for index in range(self.config.num_upsamplings):
            conv = self.get_submodule(f"conv_up{index + 1}")
            h = F.leaky_relu(conv(F.interpolate(h, scale_factor=2.0, mode="nearest")), SLOPE)
        return self.conv_last(F.leaky_relu(self.conv_hr(h), SLOPE))


@dataclass(frozen=True)
class CompactConfig:
    """Shape of a `CompactNet`; the defaults are those of Real-ESRGAN's general x4 model, v3.

    channels: of the pictures. num_features: width of all layers but the last; num_convs: layers between the
    first and the last. scale: side of the result over side of the picture. Raises InputError below 1.
    """

    channels: int = 3
    num_features: int = 64
    num_convs: int = 32
    scale: int = 4

    def __post_init__(self) -> None:
        _check_counts(self, at_least_0=("num_convs",))

    @property
    def unshuffle(self) -> int:
        """What sides must be multiples of: 1."""
        return 1


class CompactNet(nn.Module):
    """Real-ESRGAN's `SRVGGNetCompact`: plain convolutions, then pixels out of channels, plus the picture."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_features
        self.body = nn.ModuleList([_conv(config.channels, width), nn.PReLU(width)])
        for _ in range(config.num_convs):
            self.body.extend([_conv(width, width), nn.PReLU(width)])
        self.body.append(_conv(width, config.channels * config.scale**2))

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (b, channels, h, w) in 0..1 -> (b, channels, scale * h, scale * w), not clamped."""
        h = x
        for layer in self.body:
            h = layer(h)
        scale = self.config.scale
        return F.pixel_shuffle(h, scale) + F.interpolate(x, scale_factor=float(scale), mode="nearest")


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _check_counts(config: RRDBConfig | CompactConfig, at_least_0: tuple[str, ...]) -> None:
    for each in fields(config):
        value, least = getattr(config, each.name), 0 if each.name in at_least_0 else 1
        if value < least:
            raise InputError(f"{each.name} is {value}; it must be at least {least}.")
