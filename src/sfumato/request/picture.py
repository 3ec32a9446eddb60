"""The fields of a request that start from a picture, each as a type with its range and help text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from sfumato.request.values import numbers, pictures

PICTURE: dict[str, JsonValue] = {"group": "Picture"}
MAX_PASSES = 100
MAX_MARGIN = 16_384  # pixels

Given = Annotated[Any, AfterValidator(pictures)]
"""A path, the bytes of a file, a PIL picture, or a list of one for each picture to draw."""

Init = Annotated[
    Given | None,
    Field(description="Picture to start from; on the command line also a folder.", json_schema_extra=PICTURE),
]
Strength = Annotated[
    float | None,
    Field(
        ge=0,
        le=1,
        description="How far to go from it: 0 gives it back, 1 ignores it; 0.75, or 1 with models made for "
        "editing.",
        json_schema_extra=PICTURE,
    ),
]
StepsMode = Annotated[
    Literal["strength", "exact"],
    Field(
        description="Steps taken: strength times steps, or exactly steps from that noise level.",
        json_schema_extra=PICTURE,
    ),
]
Resize = Annotated[
    Literal["stretch", "crop", "pad", "latent"],
    Field(
        description="How the picture comes to the drawing's size; latent stretches its latents.",
        json_schema_extra=PICTURE,
    ),
]
MatchColours = Annotated[
    Literal["none", "covariance", "histogram"],
    Field(
        description="Give the drawing the colours of the picture: their mean and covariance, or histogram.",
        json_schema_extra=PICTURE,
    ),
]
Loopback = Annotated[
    int,
    Field(
        ge=1,
        le=MAX_PASSES,
        description="Passes, each from the last one's drawing.",
        json_schema_extra=PICTURE,
    ),
]
LoopbackDecay = Annotated[
    float,
    Field(gt=0, le=1, description="Factor on strength from pass to pass.", json_schema_extra=PICTURE),
]
Mask = Annotated[
    Given | None,
    Field(description="Grey picture: white is drawn anew, black stays as it is.", json_schema_extra=PICTURE),
]
MaskAlpha = Annotated[
    bool, Field(description="Draw where the picture is transparent.", json_schema_extra=PICTURE)
]
MaskInvert = Annotated[bool, Field(description="Draw the mask's black.", json_schema_extra=PICTURE)]
MaskBlur = Annotated[
    float,
    Field(
        ge=0,
        le=256,
        description="Radius in pixels of a blur of the mask, which widens it.",
        json_schema_extra=PICTURE,
    ),
]
MaskFeather = Annotated[
    int | None,
    Field(
        ge=0,
        le=256,
        description="Width in pixels of the seam inside the mask; that of a latent if not given.",
        json_schema_extra=PICTURE,
    ),
]
MaskContent = Annotated[
    Literal["original", "fill", "noise", "nothing"],
    Field(
        description="What the masked part starts from: as it is, its surroundings blurred, noise, or zeros.",
        json_schema_extra=PICTURE,
    ),
]
SoftMask = Annotated[
    bool,
    Field(
        description="Read the mask's grey as how far each part may change (differential diffusion).",
        json_schema_extra=PICTURE,
    ),
]
OnlyMasked = Annotated[
    bool,
    Field(description="Draw the mask's surroundings alone, at full size.", json_schema_extra=PICTURE),
]
Padding = Annotated[
    int,
    Field(
        ge=0,
        le=MAX_MARGIN,
        description="Pixels around the mask that it sees then.",
        json_schema_extra=PICTURE,
    ),
]
Region = Annotated[
    tuple[int, int, int, int] | None,
    BeforeValidator(numbers),
    Field(
        description="Part of the picture to draw, as 'left,top,width,height'; the rest stays.",
        json_schema_extra=PICTURE,
    ),
]
Outpaint = Annotated[
    int,
    Field(ge=0, le=MAX_MARGIN, description="Pixels to draw beyond this side.", json_schema_extra=PICTURE),
]
ImageGuidance = Annotated[
    float | None,
    Field(
        ge=0,
        description="How closely models that edit by instructions keep to the picture; 1.5 is usual.",
        json_schema_extra=PICTURE,
    ),
]
