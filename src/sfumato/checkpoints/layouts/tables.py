"""Tables of names between our networks and other programs' files, generated from the configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.layouts.autoencoder import autoencoder_pairs
from sfumato.checkpoints.layouts.pair import SAME, Pair, Shape, Transform, convolution, same
from sfumato.checkpoints.layouts.text import bert_pairs, hugging_face_pairs, is_open_clip, open_clip_pairs
from sfumato.checkpoints.layouts.unet import unet_pairs
from sfumato.errors import InputError, nearest
from sfumato.nn.preview import PreviewConfig
from sfumato.nn.unet import UNetConfig
from sfumato.presets import PARTS, ModelConfig

__all__ = [
    "FOLDERS",
    "LAYOUTS",
    "PARTS",
    "SAME",
    "Pair",
    "Shape",
    "Transform",
    "generate",
    "pairs",
    "prefix",
    "to_foreign",
    "to_native",
]

LAYOUTS = ("ldm", "diffusers")
FOLDERS = {  # where a diffusers folder keeps each part; diffusers has no class embedder
    "unet": "unet",
    "autoencoder": "vae",
    "text": "text_encoder",
    "text2": "text_encoder_2",
    "bert": "bert",
}
ENTRY = {"unet": "model.diffusion_model.", "autoencoder": "first_stage_model.", "preview": "preview_decoder."}
CONDITION = "cond_stage_model."
EMBEDDERS = ("conditioner.embedders.0.", "conditioner.embedders.1.")  # SDXL's two


def pairs(part: str, config: Any, layout: str, variant: str = "") -> tuple[Pair, ...]:
    """Every tensor of a part, once, with its name in the layout, less the part's prefix.

    part: one of PARTS, with its configuration. variant: other names that files of the layout were written
    with, for reading: "old" (diffusers before 0.17: query, key, value, proj_attn) and "bare" (Hugging Face's
    text transformer without its `text_model.`). Raises InputError where the layout cannot hold the part.
    """
    return tuple(generate(part, config, layout, variant))


def generate(part: str, config: Any, layout: str, variant: str = "") -> Iterator[Pair]:
    """As `pairs`, one by one: a hostile description may ask for more of them than any memory holds."""
    if layout not in LAYOUTS:
        raise InputError(f"there is no layout {layout!r}", nearest(layout, LAYOUTS))
    if part not in PARTS:
        raise InputError(f"there is no part {part!r}", nearest(part, PARTS))
    return TABLES[part](config, layout, variant)


def prefix(part: str, layout: str, config: ModelConfig) -> str:
    """What a part's names begin with in LDM layout; "" in diffusers', which has a file for each part."""
    if layout == "diffusers":
        return ""
    if part in ENTRY:
        return ENTRY[part]
    stage = CONDITION if config.text2 is None else EMBEDDERS[part == "text2"]
    tower = config.text2 if part == "text2" else config.text
    if part in ("bert", "classes") or tower is None:
        return stage
    return stage + ("model." if is_open_clip(tower) else "transformer.")


def to_native(table: Iterable[Pair], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The tensors of a module, by its own names; `read` gives a foreign one by name."""
    return {pair.native: pair.transform.to_native([read(name) for name in pair.foreign]) for pair in table}


def to_foreign(table: Iterable[Pair], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: the layout's tensors out of a module's state dict."""
    tensors: dict[str, Tensor] = {}
    slices: dict[str, dict[int, Tensor]] = {}
    for pair in table:
        given = zip(pair.foreign, pair.transform.to_foreign(own[pair.native]), strict=True)
        index, count = pair.transform.piece
        for name, tensor in given:
            if count == 1:
                tensors[name] = tensor
                continue
            found = slices.setdefault(name, {})
            found[index] = tensor
            if len(found) == count:
                tensors[name] = torch.cat([found[i] for i in range(count)])
    return tensors


def _own_names(table: Iterable[Pair]) -> Iterator[Pair]:
    return (Pair(pair.native, (pair.native,), SAME, pair.shape) for pair in table)


def _unet(config: UNetConfig, layout: str, variant: str) -> Iterator[Pair]:
    table = unet_pairs(config, "old" if variant == "old" else "")
    return _own_names(table) if layout == "ldm" else table


def _autoencoder(config: Any, layout: str, variant: str) -> Iterator[Pair]:
    table = autoencoder_pairs(config, "old" if variant == "old" else "")
    return _own_names(table) if layout == "ldm" else table


def _text(config: Any, layout: str, variant: str) -> Iterator[Pair]:
    if layout == "ldm" and is_open_clip(config):
        return open_clip_pairs(config)
    return hugging_face_pairs(config, "" if variant == "bare" else "text_model.")


def _bert(config: Any, layout: str, variant: str) -> Iterator[Pair]:
    return _own_names(bert_pairs(config)) if layout == "ldm" else bert_pairs(config)


def _classes(config: Any, layout: str, variant: str) -> Iterator[Pair]:
    if layout == "diffusers":
        raise InputError("diffusers has no class embedder of this kind.", "Use the ldm layout.")
    return iter([same("embedding.weight", "embedding.weight", (config.n_classes, config.embed_dim))])


def _preview(config: PreviewConfig, layout: str, variant: str) -> Iterator[Pair]:
    if layout == "diffusers":
        raise InputError("diffusers has no preview decoder of this kind.", "Use the ldm layout.")
    width, name = config.width, "conv_in"
    yield from convolution(name, name, config.z_channels, width)
    for block in range(max(1, config.levels)):
        for name in (f"blocks.{block}.conv1", f"blocks.{block}.conv2"):
            yield from convolution(name, name, width, width)
    for level in range(config.levels):
        yield from convolution(f"ups.{level}", f"ups.{level}", width, width)
    yield from convolution("conv_out", "conv_out", width, config.out_channels)


TABLES: dict[str, Callable[[Any, str, str], Iterator[Pair]]] = {
    "unet": _unet,
    "autoencoder": _autoencoder,
    "text": _text,
    "text2": _text,
    "bert": _bert,
    "classes": _classes,
    "preview": _preview,
}
