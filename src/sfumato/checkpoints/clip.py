"""Files of CLIP's two towers (Radford et al. 2021): one safetensors file that describes itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.checkpoints.build import assign, built
from sfumato.checkpoints.files import converted, open_file, write_tensors
from sfumato.checkpoints.load import ModelFile, identity, open_model, read_finite
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.nn.clip_vision import DEVIATION, MEAN, CLIPVisionConfig, CLIPVisionEncoder
from sfumato.presets import TextTable, describe, described, known_keys

CLIP_KEY = "sfumato.clip"  # of the metadata, where a model file has "sfumato"
SCALE = "logit_scale"  # as Hugging Face calls it: the logarithm of what cosines are multiplied by

VisionTable = Annotated[CLIPVisionConfig, known_keys(CLIPVisionConfig)]


@dataclass(frozen=True)
class CLIPDescription:
    """Everything about a pair of towers but their weights.

    tokenizer: the text tower's, as its own JSON. notices: credits and licences of what they learned from.
    Raises InputError where the towers do not end in vectors of one width.
    """

    name: str
    text: TextTable
    vision: VisionTable
    tokenizer: str
    notices: str = ""

    def __post_init__(self) -> None:
        widths = (self.text.projection_dim, self.vision.projection_dim)
        if widths[0] is None or widths[0] != widths[1]:
            raise InputError(f"the towers' projection_dim are {widths[0]} and {widths[1]}", "Make them one.")


@dataclass(frozen=True)
class LoadedCLIP:
    """Both towers in evaluation mode, frozen; logit_scale multiplies the cosines of their vectors."""

    description: CLIPDescription
    text: CLIPTextEncoder
    vision: CLIPVisionEncoder
    logit_scale: float


@dataclass(frozen=True)
class TextTower:
    """A text encoder without its projection, to condition a denoiser on.

    tokenizer: JSON of the one that it reads, None for CLIP's. layer: the one to read, from the end, 1 the
    last; normed: through the final norm.
    """

    name: str
    config: CLIPTextConfig
    tokenizer: str | None
    encoder: CLIPTextEncoder
    files: Sequence[Path]
    layer: int = 1
    normed: bool = True

    @cached_property
    def identity(self) -> str:
        """Hex sha256 of its file, or of the sums of its files."""
        return identity(self.files)


@dataclass(frozen=True)
class ImageTower:
    """An image encoder that takes pictures as the rest of the program has them; frozen."""

    network: CLIPVisionEncoder

    def features(self, pictures: Tensor) -> list[Tensor]:
        """What each layer makes of pictures (b, 1 or 3, h, w) in -1..1: maps (b, width, side, side).

        side: of the tower's grid of patches. Gradients reach the pictures.
        """
        states = self.network.vision_model(self._seen(pictures))[1:]
        side = self.network.config.image_size // self.network.config.patch_size
        return [state[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for state in states]

    def embed(self, pictures: Tensor) -> Tensor:
        """The vectors (b, projection_dim), not of unit length, of pictures (b, 1 or 3, h, w) in -1..1."""
        return self.network(self._seen(pictures)).embeds

    def _seen(self, pictures: Tensor) -> Tensor:
        side = self.network.config.image_size
        return normalized(resized(pictures, side))


def resized(pictures: Tensor, side: int) -> Tensor:
    """Pictures (b, c, h, w) as (b, c, side, side)."""
    if pictures.shape[2:] == (side, side):
        return pictures
    return F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)


def normalized(pictures: Tensor) -> Tensor:
    """Pictures (b, 1 or 3, h, w) in -1..1 as CLIP sees them, (b, 3, h, w)."""
    mean, deviation = (pictures.new_tensor(values).reshape(3, 1, 1) for values in (MEAN, DEVIATION))
    return ((pictures + 1) / 2 - mean) / deviation


def save_clip(
    path: Path,
    description: CLIPDescription,
    text: Mapping[str, Tensor],
    vision: Mapping[str, Tensor],
    logit_scale: float,
) -> None:
    """Write the towers' state dicts in half precision, the scale's logarithm, and what describes them.

    Raises `NumericalError` before anything is written if a weight is not finite in float16.
    """
    scale = converted({SCALE: torch.tensor(logit_scale).log()}, torch.float32)
    tensors = converted({**text, **vision}, torch.float16) | scale
    write_tensors(path, tensors, {CLIP_KEY: describe(description)})


def load_clip(
    path: Path | str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> LoadedCLIP:
    """The towers in a file of `save_clip`; `CheckpointError` for another file or a damaged one."""
    source = open_file(Path(path))
    if CLIP_KEY not in source.metadata:
        raise CheckpointError(f"{path} holds no pair of CLIP's towers", "Give the model file of a clip run.")
    description = described(source.metadata[CLIP_KEY], CLIPDescription, str(path))
    towers = built("towers", lambda: _empty(description), len(source.infos))
    tensors = {name: read_finite(source, name, device, dtype) for name in source.infos}
    scale = tensors.pop(SCALE, None)
    if scale is None or scale.shape != ():
        raise CheckpointError(f"{path}: {SCALE} is missing or no number", "Get the file again.")
    for tower in towers:
        own = {name for name in tensors if name.startswith(tuple(f"{part}." for part in _parts(tower)))}
        assign(tower, {name: tensors.pop(name) for name in sorted(own)}, str(path))
    if tensors:
        raise CheckpointError(f"{path}: no tower has {', '.join(sorted(tensors)[:5])}", "Get the file again.")
    return LoadedCLIP(description, *towers, float(scale.float().exp()))


def load_text_tower(path: Path | str) -> TextTower:
    """The text encoder, in float32, in a file of `save_clip`, or in anything that `open_model` opens.

    Raises `CheckpointError` where there is none.
    """
    if not is_clip(Path(path)):
        return text_tower(open_model(str(path), dtype=torch.float32))
    loaded = load_clip(path)
    told = loaded.description
    return TextTower(told.name, _unprojected(loaded.text), told.tokenizer, loaded.text, [Path(path)])


def text_tower(file: ModelFile) -> TextTower:
    """A model's text encoder, which loses its projection; `CheckpointError` for a model without one."""
    encoder, config = cast(CLIPTextEncoder, file.module("text")), file.config
    own = _unprojected(encoder)
    files = file.opened.files
    return TextTower(config.name, own, config.tokenizer, encoder, files, config.clip_skip, config.text_normed)


def _unprojected(encoder: CLIPTextEncoder) -> CLIPTextConfig:
    encoder.text_projection = nn.Identity()
    encoder.config = dataclasses.replace(encoder.config, projection_dim=None)
    return encoder.config


def load_image_tower(path: Path | str, device: torch.device | None = None) -> ImageTower:
    """The image encoder of a file of `save_clip`, in float32; `CheckpointError` for another file."""
    return ImageTower(load_clip(path, device).vision)


def is_clip(path: Path) -> bool:
    """Whether a path is a file of `save_clip`; False for what is no file, or none of tensors."""
    return path.suffix == ".safetensors" and path.is_file() and CLIP_KEY in open_file(path).metadata


def _parts(tower: nn.Module) -> list[str]:
    return [name for name, _ in tower.named_children()]


def _empty(description: CLIPDescription) -> tuple[CLIPTextEncoder, CLIPVisionEncoder]:
    return CLIPTextEncoder(description.text), CLIPVisionEncoder(description.vision)
