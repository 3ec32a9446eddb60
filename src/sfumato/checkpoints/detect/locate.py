"""Where the parts of a model lie in a file, and in whose names they are written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sfumato.checkpoints.layouts.pair import Shape
from sfumato.checkpoints.source import TensorInfo

CONDITION = "cond_stage_model."
PREVIEW = "preview_decoder."  # in our own files alone
# In one file in LDM layout, in a diffusers folder ("unet/" and so on); a part alone has no place.
PLACES = (
    "model.diffusion_model.",
    "first_stage_model.",
    CONDITION,
    PREVIEW,
    "conditioner.embedders.0.",
    "conditioner.embedders.1.",
    "unet/",
    "vae/",
    "vqvae/",
    "text_encoder/",
    "text_encoder_2/",
    "bert/",
)
SECOND = ("conditioner.embedders.1.", "text_encoder_2/")
PLACE = re.compile("|".join(re.escape(place) for place in PLACES))
# What a part's names look like in a layout, after the place. The first that matches counts.
KINDS: Mapping[tuple[str, str], str] = {
    ("unet", "ldm"): r"(?:input_blocks|middle_block|output_blocks)\.\d",
    ("unet", "diffusers"): r"(?:down_blocks|mid_block|up_blocks)\.",
    ("autoencoder", "ldm"): r"(?:encoder\.(?:down|mid)|decoder\.(?:up|mid))\.",
    (
        "autoencoder",
        "diffusers",
    ): r"(?:encoder\.(?:down_blocks|mid_block)|decoder\.(?:up_blocks|mid_block))\.",
    ("text", "diffusers"): r"(?:transformer\.)?(?:text_model\.)?(?:encoder\.layers|embeddings)\.",
    ("text", "ldm"): r"(?:model\.)?transformer\.resblocks\.\d",
    ("bert", "ldm"): r"transformer\.attn_layers\.",
    ("bert", "diffusers"): r"model\.layers\.\d",
    ("classes", "ldm"): r"embedding\.weight$",
    ("preview", "ldm"): r"(?:conv_in|conv_out)\.weight$",
}
KIND = re.compile("|".join(f"({pattern})" for pattern in KINDS.values()))
ONLY_AT = {"classes": CONDITION, "preview": PREVIEW}  # places of parts whose names say too little
# What stands between a place and a text encoder's own names, in LDM's files and in ComfyUI's.
LEVELS = {("text", "diffusers"): "transformer.", ("text", "ldm"): "model."}
BIGG_WIDTH = 1280  # of SDXL's second text encoder, OpenCLIP's ViT-bigG


@dataclass(frozen=True)
class Found:
    """A part by where it lies and how it is written.

    layout: whose names they are; a text encoder in Hugging Face's is "diffusers" in an LDM file too. shapes:
    by names less the prefix.
    """

    part: str
    layout: str
    prefix: str
    shapes: Mapping[str, Shape]


def locate(infos: Mapping[str, TensorInfo]) -> dict[str, Found]:
    """The parts that the names of a file show, by part."""
    grouped: dict[str, list[str]] = {}
    for name in infos:
        match = PLACE.match(name)
        grouped.setdefault(match[0] if match else "", []).append(name)
    found: dict[str, Found] = {}
    for place, names in grouped.items():
        kind = _kind(names, place)
        if kind is None or ONLY_AT.get(kind[0], place) != place:
            continue
        if kind[0] == "autoencoder" and place == CONDITION:  # the first stage once more, see rules
            continue
        part, layout = kind
        prefix = place + _level(names, place, LEVELS.get(kind, ""))
        shapes = {name[len(prefix) :]: infos[name].shape for name in names if name.startswith(prefix)}
        if part == "text" and (place in SECOND or (not place and _is_bigg(shapes))):
            part = "text2"
        found.setdefault(part, Found(part, layout, prefix, shapes))
    return found


def _kind(names: Iterable[str], place: str) -> tuple[str, str] | None:
    """The (part, layout) whose names most of these are like."""
    counts = Counter(match.lastindex for name in names if (match := KIND.match(name, len(place))))
    for index, _ in counts.most_common(1):
        if index is not None:
            return list(KINDS)[index - 1]
    return None


def _level(names: Sequence[str], place: str, level: str) -> str:
    """`level`, where most names have it after the place."""
    return level if 2 * sum(name.startswith(level, len(place)) for name in names) > len(names) else ""


def _is_bigg(shapes: Mapping[str, Shape]) -> bool:
    ends = ("final_layer_norm.weight", "ln_final.weight")
    return any(shape == (BIGG_WIDTH,) and name.endswith(ends) for name, shape in shapes.items())
