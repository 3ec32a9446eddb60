"""Training a super-resolution network on pictures and what is left of them when they are made small.

Real-ESRGAN's networks (Wang et al. 2021), by a rounded L1 and an edge term. No adversary: nothing is made up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sfumato.checkpoints.load import load_file
from sfumato.checkpoints.upscaler import save_upscaler
from sfumato.errors import InputError
from sfumato.model import EMBEDDED
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.esrgan import CompactConfig, CompactNet, RRDBConfig, RRDBNet
from sfumato.runtime import channels_last
from sfumato.training.config import TrainingConfig
from sfumato.training.data import WHOLE, Dataset, Position, Share, batches, groups, to_tensor
from sfumato.training.loop import Loss
from sfumato.training.settings_upscaler import UpscalerTaskConfig
from sfumato.training.sheets import save_sheet
from sfumato.training.tasks import degradations

EVALUATED = 64  # held-out pictures that a score is the mean of
EVALUATION_SEED = 7  # of their round trips, which no training sample shares
RECTIFIER_SLOPE = 0.25  # of torch's PReLU before it has learned
LAST_DEVIATION = 1e-4  # of the last layer's first weights
FIRST_WIDTH, LAST_WIDTH = 0.05, 2e-3  # of the loss's bottom, where values span 1
SHOWN = 8  # held-out pictures on a sheet

Batch = tuple[list[Position], Tensor]


class UpscalerTask:
    """A network that enlarges; `dataset` holds the large pictures it learns from, `held_out` scores it.

    Raises `InputError` for a recipe whose parts do not fit together.
    """

    def __init__(
        self, config: TrainingConfig, dataset: Dataset, held_out: Dataset, device: torch.device
    ) -> None:
        self.config, self.dataset, self.held_out, self.device = config, dataset, held_out, device
        self.options = config.upscaler or UpscalerTaskConfig()
        options = self.options.network
        self.network = RRDBNet(options) if isinstance(options, RRDBConfig) else _compact(options)
        self.scale = options.scale
        self.digest = dataset.digest
        self.autoencoder: AutoencoderKL | None = None
        self.latent_scale = 1.0
        if (place := self.options.autoencoder) is not None:
            file = load_file(EMBEDDED if place == "embedded" else Path(place), torch.float32)
            autoencoder = file.module("autoencoder")
            if not isinstance(autoencoder, AutoencoderKL):
                raise InputError(f"the autoencoder of {place} has a codebook", "Give one without.")
            self.autoencoder = autoencoder.to(device).requires_grad_(False)
            self.latent_scale = file.config.latent_scale
            self.digest += file.identity
        _check(
            config, self.options, None if self.autoencoder is None else self.autoencoder.config.downsampling
        )
        self.network.to(device)
        if config.loop.channels_last:
            channels_last(self.network)
        self.modules: Mapping[str, nn.Module] = {"upscaler": self.network}
        self.forward: Callable[[Tensor], Tensor] = self.network
        if config.loop.compile:
            self.forward = torch.compile(self.forward)
        if config.loop.gradient_checkpointing:
            self.forward = partial(checkpoint, self.forward, use_reentrant=False)

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"upscaler": list(self.network.parameters())}

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Batch, None, None]:
        order = groups(self.dataset, self.config.seed, seen, size, share)
        return batches(self.dataset, order, self.config.data.workers)

    def losses(self, batch: Batch, seen: int) -> Iterator[Loss]:
        small, large = self.pairs(*batch)
        error = self.forward(small).float() - large
        width = self._width(seen)
        edges = charbonnier(error.diff(dim=-1), width) + charbonnier(error.diff(dim=-2), width)
        loss = charbonnier(error, width) + self.options.edge_weight * edges
        yield "upscaler", loss, {"loss": loss, "l1": error.detach().abs().mean()}

    @torch.no_grad()
    def pairs(self, order: list[Position], pictures: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is shown and what it should answer, in 0..1, of pictures in -1..1.

        To a decoded picture the answer is the large one in its tones, see `degradations.fitted`.

        (b, c, h, w) -> (b, c, h / scale, w / scale) and (b, c, h, w), or their crops.
        """
        large = (pictures.to(self.device) + 1) / 2
        ways = [degradations.drawn(self.options, position) for position in order]
        small = torch.cat(
            [
                degradations.smaller(each[None], self.scale, w.filter)
                for each, w in zip(large, ways, strict=True)
            ]
        )
        tripping = [place for place, way in enumerate(ways) if way.latent_noise is not None]
        if self.autoencoder is not None and tripping:
            noise = [ways[place].latent_noise or 0.0 for place in tripping]
            before = small[tripping]
            seen = degradations.decoded(
                before, self.autoencoder, self.latent_scale, noise, [order[place] for place in tripping]
            )
            small[tripping], large[tripping] = seen, degradations.fitted(large[tripping], before, seen)
        shown, wanted = [], []
        for position, way, before, after in zip(order, ways, small, large, strict=True):
            seen, answer = self._cropped(position, degradations.worn(before, way), after)
            shown.append(degradations.turned(degradations.eight_bits(seen), way.turn))
            wanted.append(degradations.turned(answer, way.turn))
        return torch.stack(shown), torch.stack(wanted)

    def evaluate(self) -> dict[str, float]:
        """Held-out peak signal-to-noise ratio in dB, of pictures made small and of their round trips."""
        scores = {}
        for name, small, large in self._held_out(EVALUATED):
            made = [self.network(each[None]).float().clamp(0, 1)[0] for each in small]
            errors = [(one - other).square().mean() for one, other in zip(made, large, strict=True)]
            ratios = [-10 * torch.log10(error.clamp_min(1e-10)) for error in errors]
            scores[f"held_out_{name}_psnr"] = float(torch.stack(ratios).mean())
        return scores

    def preview(self, path: Path) -> None:
        """Held-out pictures: made small, enlarged by the network, as they were; round trips below."""
        rows = []
        for _, small, large in self._held_out(SHOWN):
            nearest = F.interpolate(small, scale_factor=float(self.scale), mode="nearest")
            rows += [nearest, self.network(small).float(), large]
        save_sheet(path, torch.cat(rows) * 2 - 1, len(rows[0]))

    def finish(self, path: Path) -> None:
        save_upscaler(path, self.network, self.config.name, self.config.notices)

    def _width(self, seen: int) -> float:
        """Of the loss's rounded bottom at image `seen`: it narrows, by the same factor with each image."""
        done = min(1.0, seen / self.options.smooth_images) if self.options.smooth_images else 1.0
        return math.exp((1 - done) * math.log(FIRST_WIDTH) + done * math.log(LAST_WIDTH))

    def _held_out(self, count: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, small, large) of the same pictures each time, clean and through the autoencoder."""
        stride = max(1, len(self.held_out) // count)
        indices = list(range(0, len(self.held_out), stride)[:count])
        large = torch.stack([to_tensor(self.held_out.picture(index)) for index in indices])
        large = (large.to(self.device) + 1) / 2
        small = degradations.smaller(large, self.scale)
        yield "clean", degradations.eight_bits(small), large
        if self.autoencoder is not None:
            places = [Position(EVALUATION_SEED, 0, index, index) for index in indices]
            noise = [0.0] * len(places)
            seen = degradations.decoded(small, self.autoencoder, self.latent_scale, noise, places)
            yield "decoded", degradations.eight_bits(seen), degradations.fitted(large, small, seen)

    def _cropped(self, position: Position, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        side, scale = self.options.crop, self.scale
        if not side:
            return small, large
        height, width = small.shape[-2:]
        top, left = degradations.corner(position, height, width, side)
        large = large[:, top * scale : (top + side) * scale, left * scale : (left + side) * scale]
        return small[:, top : top + side, left : left + side], large


def charbonnier(error: Tensor, width: float) -> Tensor:
    """Mean of sqrt(error^2 + width^2) - width: L1 with a rounded bottom (Lai et al. 2017, eq. 2).

    Most of a drawing is flat, where repeated pixels are right already, so L1 alone stays there; with a wide
    bottom outlines count more than what little harm is done around them.
    """
    return ((error.square() + width**2).sqrt() - width).mean()


def _compact(config: CompactConfig) -> CompactNet:
    """A network whose first answers are nearly those of bilinear interpolation.

    The picture goes through the layers in channels of its own, which a rectifier leaves as they are; around
    that the weights are random, by He et al. 2015, eq. 15, and small.
    """
    network = CompactNet(config)
    convolutions = [layer for layer in network.body if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        weight, own = layer.weight.detach(), range(min(config.channels, config.num_features))
        nn.init.kaiming_normal_(weight, a=RECTIFIER_SLOPE)
        weight[own] = 0
        weight[own, own, 1, 1] = 1
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    last = nn.init.normal_(convolutions[-1].weight.detach(), std=LAST_DEVIATION)
    if config.num_features >= config.channels:
        step = _between(config.scale)
        between = torch.einsum("ik,jl->ijkl", step, step)  # (scale, scale, 3, 3): row, column, taps
        between[..., 1, 1] -= 1  # the network adds the nearest pixel
        for channel in range(config.channels):
            rows = slice(channel * config.scale**2, (channel + 1) * config.scale**2)
            last[rows, channel] += between.flatten(0, 1)
    return network


def _between(scale: int) -> Tensor:
    """(scale, 3): what the pixel before, at and after count in each new one, by linear interpolation."""
    offsets = (torch.arange(scale) + 0.5) / scale - 0.5
    before, after = (-offsets).clamp_min(0), offsets.clamp_min(0)
    return torch.stack([before, 1 - before - after, after], dim=1)


def _check(config: TrainingConfig, options: UpscalerTaskConfig, downsampling: int | None) -> None:
    """`InputError` where the network, the pictures and the autoencoder are of different shapes."""
    network, (height, width) = options.network, config.data.shape
    if options.rrdb is not None and options.compact is not None:
        raise InputError("[upscaler] describes a compact and an RRDB network", "Leave one of them out.")
    taken, given = (
        (network.in_channels, network.out_channels)
        if isinstance(network, RRDBConfig)
        else (network.channels, network.channels)
    )
    if not taken == given == config.data.channels:
        raise InputError(
            f"the network takes {taken} channels and gives {given}, data.channels is {config.data.channels}",
            "Make them equal.",
        )
    multiple = network.scale * math.lcm(network.unshuffle, downsampling or 1)
    if height % multiple or width % multiple:
        raise InputError(
            f"data.size is {config.data.shape}, of the large pictures; it must be multiples of {multiple}",
            "Change data.size.",
        )
    smallest = min(height, width) // network.scale
    if options.crop > smallest or options.crop % network.unshuffle:
        raise InputError(
            f"upscaler.crop is {options.crop}; a small picture has {smallest} pixels a side, and the network "
            f"takes multiples of {network.unshuffle}",
            "Take a smaller crop, or 0 for the whole picture.",
        )
    if height != width and not options.crop:
        raise InputError(
            f"data.size is {config.data.shape}; pictures that are no squares cannot be turned",
            "Set upscaler.crop, or make them squares.",
        )
