"""How sampling is guided beside the scale."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from sfumato.request.values import (
    Fields,
    Options,
    numbers,
    options,
    path_or_object,
    words,
)

GUIDANCE: dict[str, JsonValue] = {"group": "Guidance"}


class GuidanceFields(Fields):
    """How sampling is guided beside the scale."""

    guidance_start: float = Field(
        default=0,
        ge=0,
        le=1,
        description="Share of the steps after which guidance begins.",
        json_schema_extra=GUIDANCE,
    )
    guidance_stop: float = Field(
        default=1,
        ge=0,
        le=1,
        description="Share of the steps after which guidance ends.",
        json_schema_extra=GUIDANCE,
    )
    guidance_low: float = Field(
        default=0,
        ge=0,
        description="Noise level down to which there is guidance.",
        json_schema_extra=GUIDANCE,
    )
    guidance_high: float | None = Field(
        default=None,
        gt=0,
        description="Noise level from which on there is guidance.",
        json_schema_extra=GUIDANCE,
    )
    rescale: float = Field(
        default=0,
        ge=0,
        le=1,
        description="How far guidance keeps the contrast of the unguided prediction; 0.7 is usual.",
        json_schema_extra=GUIDANCE,
    )
    dynamic_threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Percentile of each step's values at which they are clipped, as 0.995.",
        json_schema_extra=GUIDANCE,
    )
    threshold_limit: float = Field(
        default=1,
        gt=0,
        description="Largest value of the clipped: 1 for pixels, about 3 for latents.",
        json_schema_extra=GUIDANCE,
    )
    mimic: float | None = Field(
        default=None,
        ge=0,
        description="Guidance scale whose range of values a higher one is held to, as 7.",
        json_schema_extra=GUIDANCE,
    )
    apg: bool = Field(
        default=False,
        description="Adaptive projected guidance: strong guidance without oversaturation.",
        json_schema_extra=GUIDANCE,
    )
    apg_options: Annotated[Options, BeforeValidator(options)] = Field(
        default={},
        description="Its options: 'eta=0 norm_threshold=15 momentum=-0.5'.",
        json_schema_extra=GUIDANCE,
    )
    perp_neg: float | None = Field(
        default=None,
        ge=0,
        description="Weight of the negative prompt where only what is perpendicular to the prompt counts.",
        json_schema_extra=GUIDANCE,
    )
    pag: float = Field(
        default=0,
        ge=0,
        description="Scale of perturbed-attention guidance; 3 is usual.",
        json_schema_extra=GUIDANCE,
    )
    seg: float = Field(
        default=0,
        ge=0,
        description="Scale of smoothed-energy guidance; 3 is usual.",
        json_schema_extra=GUIDANCE,
    )
    attention_layers: Annotated[tuple[str, ...], BeforeValidator(words)] = Field(
        default=("middle_block",),
        description="Where pag and seg disturb self-attention: names of the U-Net's blocks, with commas.",
        json_schema_extra=GUIDANCE,
    )
    sag: float = Field(
        default=0,
        ge=0,
        description="Scale of self-attention guidance; 0.75 is usual.",
        json_schema_extra=GUIDANCE,
    )
    freeu: Annotated[tuple[float, float, float, float] | None, BeforeValidator(numbers)] = Field(
        default=None, description="FreeU's b1,b2,s1,s2, as '1.5,1.6,0.9,0.2'.", json_schema_extra=GUIDANCE
    )
    weak_model: Annotated[Any, AfterValidator(path_or_object)] | None = Field(
        default=None,
        description="A weaker version of the model to lead away from (autoguidance).",
        json_schema_extra=GUIDANCE,
    )
    weak_guidance: float = Field(
        default=2, ge=0, description="Scale of that guidance; 1 is off.", json_schema_extra=GUIDANCE
    )
    classifier: Annotated[Any, AfterValidator(path_or_object)] | None = Field(
        default=None,
        description="A classifier of noised samples that steers towards a class.",
        json_schema_extra=GUIDANCE,
    )
    classifier_label: str = Field(
        default="0", description="The class it steers to, by name or number.", json_schema_extra=GUIDANCE
    )
    classifier_scale: float = Field(
        default=1, ge=0, description="How strongly it steers.", json_schema_extra=GUIDANCE
    )
    classifier_form: Literal["eps", "mean"] = Field(
        default="eps",
        description="What it changes: eps, for any sampler, or the mean of ddpm's steps of small variance.",
        json_schema_extra=GUIDANCE,
    )
