"""What pictures are compared in beside pixels: LPIPS where its weights are given, else other features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.checkpoints.build import assign
from sfumato.checkpoints.controls.load import load_control
from sfumato.checkpoints.files import open_file, sha256
from sfumato.checkpoints.layouts.naming import weight_file
from sfumato.checkpoints.load import load_file, read_finite
from sfumato.checkpoints.open import locate
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.clip_vision import DEVIATION, MEAN, CLIPVisionEncoder
from sfumato.nn.lpips import LPIPS, VGG16, feature_distance
from sfumato.nn.ssim import multi_scale_ssim
from sfumato.nn.vq import VQModel
from sfumato.runtime import shapes_only
from sfumato.training.settings_autoencoder import AutoencoderTaskConfig
from sfumato.training.tasks.autoencoder.shapes import Smallest

SMALLEST_LPIPS = 16  # pixels that four halvings leave one of
LAYERS = 4  # of a CLIP image tower, spread over its depth

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches (b, c, h, w) in -1..1 -> (b,), 0 where they are equal."""


@dataclass(frozen=True)
class Perceptual:
    """A distance, the words for it, the digest of the files that were read, and LPIPS where it is a score."""

    distance: Distance | None
    described: str
    digest: str = ""
    lpips: LPIPS | None = None


def perceptual(
    config: AutoencoderTaskConfig,
    channels: int,
    trained: Smallest,
    scored: Smallest,
    device: torch.device,
    widths: tuple[int, ...] = VGG16,
) -> Perceptual:
    """The perceptual distance that a recipe asks for, and LPIPS to score with, their networks on `device`.

    channels, trained, scored: of the pictures, those trained on and those held out. Raises `InputError` where
    the recipe names no file, or its pictures do not fit; `CheckpointError` for files of other networks.
    """
    _check_keys(config)
    kind, model = config.perceptual, config.perceptual_model
    if channels != 3 and (kind == "clip" or config.vgg is not None):
        raise InputError(
            f"{'a CLIP image tower' if kind == 'clip' else 'LPIPS'} compares colour pictures; data.channels "
            f"is {channels}",
            'Take perceptual = "ssim", and leave out vgg and lpips.',
        )
    lpips, names, digest = None, "", ""
    if config.vgg is not None and config.lpips is not None:
        for shown in (scored, trained) if kind == "lpips" else (scored,):
            shown.check(SMALLEST_LPIPS, "LPIPS", ', or take perceptual = "ssim" without vgg and lpips')
        vgg, linear = _located(config.vgg), _located(config.lpips)
        digest = _digest(vgg) + _digest(linear)
        lpips = load_lpips(vgg, linear, widths).to(device)
        names = f"LPIPS with {config.vgg} and {config.lpips}"
    if kind == "lpips":
        return Perceptual(lpips, names, digest, lpips)
    distance, described = None, "no perceptual term"
    if model is not None:
        digest += _digest(model)
    if kind == "ssim":
        distance, described = _of_ssim, "1 - multi-scale SSIM, without weights"
    elif kind == "autoencoder" and model is not None:
        distance, described = _of_autoencoder(model, channels, device), f"features of {model}"
    elif kind == "clip" and model is not None:
        distance, described = _of_clip(model, device), f"features of the image tower {model}"
    return Perceptual(distance, f"{described}; scored: {names}" if names else described, digest, lpips)


def _check_keys(config: AutoencoderTaskConfig) -> None:
    """`InputError` where a file is missing for what the recipe asks, or given and not read."""
    given = {key: getattr(config, key) is not None for key in ("vgg", "lpips", "perceptual_model")}
    needed = {"lpips": ("vgg", "lpips"), "autoencoder": ("perceptual_model",), "clip": ("perceptual_model",)}
    wanted = needed.get(config.perceptual, ())
    missing = [key for key in wanted if not given[key]]
    if missing:
        raise InputError(
            f'autoencoder.perceptual = "{config.perceptual}" needs {" and ".join(missing)}',
            'Give the files, or take perceptual = "ssim", which needs none.',
        )
    if given["vgg"] != given["lpips"]:
        one, other = ("vgg", "lpips") if given["vgg"] else ("lpips", "vgg")
        raise InputError(
            f"autoencoder.{one} is given without {other}; LPIPS is made of both",
            f"Give {other}, too, or leave out {one}.",
        )
    if given["perceptual_model"] and "perceptual_model" not in wanted:
        raise InputError(
            f'autoencoder.perceptual_model is given, and perceptual = "{config.perceptual}" does not read it',
            "Leave it out, or change perceptual.",
        )


def _located(weights: str | Path) -> Path:
    """The file of weights at a path, or of a name on the hub; in a folder, the one that a component has."""
    path = locate(weights)
    if not path.is_dir():
        return path
    name = weight_file([each.name for each in path.iterdir()], None)
    if name is None or name.endswith(".json"):
        raise CheckpointError(f"{weights} is a folder without a model.safetensors", "Give one of its files.")
    return path / name


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


def _of_ssim(first: Tensor, second: Tensor) -> Tensor:
    return 1 - multi_scale_ssim(first, second)


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
