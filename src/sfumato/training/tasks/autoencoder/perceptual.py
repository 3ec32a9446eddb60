"""What pictures are compared in beside pixels: LPIPS where its weights are given, else other features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.checkpoints.build import assign
from sfumato.checkpoints.controls.load import load_control
from sfumato.checkpoints.files import open_file, sha256
from sfumato.checkpoints.load import load_file, read_finite
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.clip_vision import DEVIATION, MEAN, CLIPVisionEncoder
from sfumato.nn.lpips import LPIPS, VGG16, feature_distance
from sfumato.nn.ssim import multi_scale_ssim
from sfumato.nn.vq import VQModel
from sfumato.runtime import shapes_only
from sfumato.training.settings_autoencoder import AutoencoderTaskConfig

SMALLEST_LPIPS = 16  # pixels that four halvings leave one of
LAYERS = 4  # of a CLIP image tower, spread over its depth

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches (b, c, h, w) in -1..1 -> (b,), 0 where they are equal."""


@dataclass(frozen=True)
class Perceptual:
    """A distance, the words for it, and the digest of the files it was made of."""

    distance: Distance | None
    described: str
    digest: str = ""


def perceptual(
    config: AutoencoderTaskConfig,
    channels: int,
    side: int,
    device: torch.device,
    widths: tuple[int, ...] = VGG16,
) -> Perceptual:
    """The perceptual distance that a recipe asks for, its networks frozen on `device`.

    channels and side: of the pictures, the shorter side. Raises `InputError` where the recipe names no file,
    or its pictures do not fit; `CheckpointError` for files of other networks.
    """
    given = {"vgg": config.vgg, "lpips": config.lpips, "perceptual_model": config.perceptual_model}
    needed = {"lpips": ("vgg", "lpips"), "autoencoder": ("perceptual_model",), "clip": ("perceptual_model",)}
    wanted = needed.get(config.perceptual, ())
    missing = [key for key in wanted if given[key] is None]
    spare = [key for key, path in given.items() if path is not None and key not in wanted]
    if missing:
        raise InputError(
            f'autoencoder.perceptual = "{config.perceptual}" needs {" and ".join(missing)}',
            'Give the files, or take perceptual = "ssim", which needs none.',
        )
    if spare:
        raise InputError(
            f'autoencoder.{spare[0]} is given, and perceptual = "{config.perceptual}" does not read it',
            "Leave it out, or change perceptual.",
        )
    if config.perceptual in ("lpips", "clip") and channels != 3:
        raise InputError(
            f'perceptual = "{config.perceptual}" compares colour pictures; data.channels is {channels}',
            'Take perceptual = "ssim".',
        )
    files = [path for key in wanted if (path := given[key]) is not None]
    digest = "".join(_digest(path) for path in files)
    if config.perceptual == "none":
        return Perceptual(None, "no perceptual term")
    if config.perceptual == "ssim":
        return Perceptual(lambda a, b: 1 - multi_scale_ssim(a, b), "1 - multi-scale SSIM, without weights")
    if config.perceptual == "lpips":
        if side < SMALLEST_LPIPS:
            raise InputError(
                f"LPIPS takes pictures of {SMALLEST_LPIPS} pixels or more, these have {side}", ""
            )
        network = load_lpips(files[0], files[1], widths).to(device)
        return Perceptual(network, f"LPIPS with {files[0]} and {files[1]}", digest)
    if config.perceptual == "autoencoder":
        return Perceptual(_of_autoencoder(files[0], channels, device), f"features of {files[0]}", digest)
    return Perceptual(_of_clip(files[0], device), f"features of the image tower {files[0]}", digest)


def load_lpips(vgg: Path, linear: Path, widths: tuple[int, ...] = VGG16) -> LPIPS:
    """LPIPS, frozen, of torchvision's VGG-16 (its classifier is not read) and of LPIPS' linear weights.

    Raises `CheckpointError` naming the tensors that are missing or of other shapes.
    """
    with shapes_only():
        network = LPIPS(widths)
    tensors = {}
    for path, start in ((vgg, "features."), (linear, "lin")):
        source = open_file(path)
        for name in source.infos:
            if name.startswith(start):
                tensors[name] = read_finite(source, name)
    assign(network, tensors, f"{vgg} with {linear}")
    return network


def _digest(path: Path) -> str:
    """Of a file, or of the files right in a folder."""
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}", "Check the path; relative ones start here.")
        return sha256(path)
    return "".join(sha256(each) for each in sorted(path.iterdir()) if each.is_file())


def _of_autoencoder(path: Path, channels: int, device: torch.device) -> Distance:
    network = load_file(path, torch.float32).module("autoencoder")
    assert isinstance(network, AutoencoderKL | VQModel)
    if network.config.in_channels != channels:
        raise InputError(
            f"the autoencoder in {path} takes {network.config.in_channels} channels, data.channels is "
            f"{channels}",
            "Give another perceptual_model.",
        )
    encoder = network.encoder.to(device)

    def features(pictures: Tensor) -> list[Tensor]:
        h, found = encoder.conv_in(pictures), []
        for level in encoder.down:
            h = level(h)
            found.append(h)
        return found

    return lambda first, second: feature_distance(features(first), features(second))


def _of_clip(path: Path, device: torch.device) -> Distance:
    network = load_control(path, dtype=torch.float32, device=device)
    if not isinstance(network, CLIPVisionEncoder):
        raise CheckpointError(f"{path} holds no CLIP image tower", "Give one as perceptual_model.")
    side, depth = network.config.image_size, network.config.num_hidden_layers
    layers = sorted({-(-depth * part // LAYERS) for part in range(1, LAYERS + 1)})
    mean, deviation = (torch.tensor(each, device=device).view(3, 1, 1) for each in (MEAN, DEVIATION))

    def features(pictures: Tensor) -> list[Tensor]:
        size = (side, side)
        resized = F.interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False)
        states = network((resized / 2 + 0.5 - mean) / deviation).hidden_states
        return [states[layer].mT for layer in layers]  # each (b, width, tokens)

    return lambda first, second: feature_distance(features(first), features(second))


def networks_of(distance: Distance | None) -> nn.Module | None:
    """LPIPS, where that is the distance: the only one that is a score too."""
    return distance if isinstance(distance, LPIPS) else None
