"""Pictures beyond what a model was trained for: larger ones, panoramas, regions, tiles, a second pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from sfumato.request.drawing import MAX_SIDE
from sfumato.request.picture import Given
from sfumato.request.values import Fields, path_or_object, sampler_key, upscaler_key

LARGE: dict[str, JsonValue] = {"group": "Large pictures"}
HIRES: dict[str, JsonValue] = {"group": "Second pass"}
MASK = "mask"


@dataclass(frozen=True)
class RegionText:
    """A part of the picture and its prompt. box: left, top, width, height in pixels; None is a mask's."""

    box: tuple[int, int, int, int] | None
    prompt: str


def read_region(text: str) -> RegionText:
    """The region of a text "LEFT,TOP,WIDTH,HEIGHT: prompt" or "mask: prompt"; `ValueError` for another."""
    place, colon, prompt = text.partition(":")
    if colon and place.strip() == MASK:
        return RegionText(None, prompt.strip())
    numbers = place.split(",")
    try:
        left, top, width, height = (int(number) for number in numbers)
    except ValueError as error:
        raise ValueError(
            f"the region {text!r} cannot be read. Write it as '0,0,256,512: a tree', or 'mask: a tree'"
        ) from error
    if not colon or min(left, top) < 0 or not 0 < min(width, height) <= max(width, height) <= MAX_SIDE:
        raise ValueError(f"the region {text!r} is no box with a prompt. Write it as '0,0,256,512: a tree'")
    return RegionText((left, top, width, height), prompt.strip())


def region_texts(value: Any) -> Any:
    """Texts of regions, or one alone."""
    texts = (value,) if isinstance(value, str) else value
    for text in texts if isinstance(texts, list | tuple) else ():
        if isinstance(text, str):  # pydantic refuses what is none
            read_region(text)
    return texts


class LargeFields(Fields):
    """Larger pictures, panoramas, regions, tiles, a second pass."""

    tiled: Literal["none", "exact", "fast"] = Field(
        default="none",
        description="Run the autoencoder in parts, for less memory: exact, or fast with overlapping tiles.",
        json_schema_extra=LARGE,
    )
    seamless: Literal["none", "x", "y", "xy"] = Field(
        default="none",
        description="Sides whose edges meet, so that copies of the picture join.",
        json_schema_extra=LARGE,
    )
    window: int | None = Field(
        default=None,
        ge=8,
        le=MAX_SIDE,
        description="Side in pixels of overlapping windows that a larger picture is drawn in.",
        json_schema_extra=LARGE,
    )
    window_overlap: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SIDE,
        description="Pixels that they share; half of a window if not given.",
        json_schema_extra=LARGE,
    )
    window_weights: Literal["uniform", "gaussian"] = Field(
        default="gaussian",
        description="How windows mix: alike (MultiDiffusion) or the middle most (Mixture of Diffusers).",
        json_schema_extra=LARGE,
    )
    regions: Annotated[tuple[str, ...], BeforeValidator(region_texts)] = Field(
        default=(),
        description="A part of the picture with its own prompt, 'LEFT,TOP,WIDTH,HEIGHT: a tree' or "
        "'mask: a tree'; may be given several times.",
        json_schema_extra=LARGE | {"repeated": True},
    )
    region_masks: Given | None = Field(
        default=None,
        description="Grey pictures of the regions called mask, in their order.",
        json_schema_extra=LARGE,
    )
    region_feather: int = Field(
        default=0,
        ge=0,
        le=MAX_SIDE,
        description="Pixels over which a region's box fades outwards.",
        json_schema_extra=LARGE,
    )
    region_base: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="How much the prompt of the whole counts inside regions.",
        json_schema_extra=LARGE,
    )
    deep_shrink: float | None = Field(
        default=None,
        ge=1,
        le=8,
        description="Find the composition on a map this many times smaller; 2 is usual.",
        json_schema_extra=LARGE,
    )
    deep_shrink_end: float = Field(
        default=0.35, ge=0, le=1, description="Share of the steps that do.", json_schema_extra=LARGE
    )
    deep_shrink_block: int = Field(
        default=3,
        ge=1,
        le=100,
        description="Block of the U-Net after which it shrinks.",
        json_schema_extra=LARGE,
    )
    hires: float | None = Field(
        default=None,
        gt=1,
        le=16,
        description="Draw again this many times larger from the drawing, or from the picture to start from.",
        json_schema_extra=HIRES,
    )
    hires_upscaler: Annotated[str, AfterValidator(upscaler_key)] = Field(
        default="lanczos",
        description="How it is enlarged: lanczos, illustrations (the network that comes along), latent, "
        "latent-bicubic, latent-nearest-exact, ...",
        json_schema_extra=HIRES,
    )
    hires_network: Annotated[Any, AfterValidator(path_or_object)] | None = Field(
        default=None, description="Or by this ESRGAN's file.", json_schema_extra=HIRES
    )
    hires_strength: float = Field(
        default=0.5, ge=0, le=1, description="How far the second pass goes.", json_schema_extra=HIRES
    )
    hires_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Steps of the second pass that are taken; as in the first, by strength, if not given.",
        json_schema_extra=HIRES,
    )
    hires_sampler: Annotated[str, AfterValidator(sampler_key)] | None = Field(
        default=None, description="Its sampler.", json_schema_extra=HIRES
    )
    hires_prompt: str | None = Field(default=None, description="Its prompt.", json_schema_extra=HIRES)
    hires_negative_prompt: str | None = Field(
        default=None, description="Its negative prompt.", json_schema_extra=HIRES
    )
