"""How large pictures are, how many, and from which noise."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue

from sfumato.request.values import (
    Fields,
    path_or_values,
)

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact
MAX_SIDE = 16_384  # pixels
NOISE: dict[str, JsonValue] = {"group": "Noise"}


class DrawingFields(Fields):
    """How large pictures are, how many, and from which noise."""

    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the first picture; picture i has seed + i. Random if not given.",
    )
    width: int | None = Field(default=None, ge=1, le=MAX_SIDE, description="Width in pixels.")
    height: int | None = Field(default=None, ge=1, le=MAX_SIDE, description="Height in pixels.")
    original_width: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SIDE,
        description="Width of the picture this one was made from, as SDXL is told; small ones draw blur.",
    )
    original_height: int | None = Field(
        default=None, ge=1, le=MAX_SIDE, description="Height of the picture this one was made from."
    )
    crop_left: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SIDE,
        description="Pixels cut off at the left, as SDXL is told; 0 for none.",
    )
    crop_top: int | None = Field(
        default=None, ge=0, le=MAX_SIDE, description="Pixels cut off at the top, as SDXL is told; 0 for none."
    )
    num_images: int = Field(default=1, ge=1, le=10_000, description="Number of pictures, drawn as one batch.")
    deterministic: bool = Field(
        default=False,
        description="One picture and one condition per network call: equal bytes alone and in any batch.",
    )
    noise_source: Literal["cpu", "philox"] = Field(
        default="cpu",
        description="Generator of the noise: cpu, or philox for the values an NVIDIA GPU draws.",
        json_schema_extra=NOISE,
    )
    eta_seed_delta: int = Field(
        default=0,
        ge=0,
        le=MAX_SEED,
        description="Added to the seed for the noise of later steps (31337 in some tools).",
        json_schema_extra=NOISE,
    )
    variation_seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the noise to vary the start towards; picture i takes it + i.",
        json_schema_extra=NOISE,
    )
    variation_strength: float = Field(
        default=0, ge=0, le=1, description="How far: 0 not at all, 1 all the way.", json_schema_extra=NOISE
    )
    seed_resize_width: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SIDE,
        description="Width in pixels of the picture whose start noise is centred on this one's.",
        json_schema_extra=NOISE,
    )
    seed_resize_height: int | None = Field(
        default=None, ge=1, le=MAX_SIDE, description="And its height.", json_schema_extra=NOISE
    )
    start_noise: Annotated[Any, AfterValidator(path_or_values)] | None = Field(
        default=None,
        description="Start noise, a .npy or .safetensors file: one latent for all pictures, or one for each.",
    )
    shared_start: bool = Field(default=False, description="All pictures start from the noise of the first.")
