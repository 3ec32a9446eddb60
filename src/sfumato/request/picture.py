"""What starts from a picture: image-to-image, inpainting, outpainting."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from sfumato.request.values import Fields, numbers, pictures

PICTURE: dict[str, JsonValue] = {"group": "Picture"}
MAX_PASSES = 100
MAX_MARGIN = 16_384  # pixels

Given = Annotated[Any, AfterValidator(pictures)]
"""A path, the bytes of a file, a PIL picture, or a list of one for each picture to draw."""


class PictureFields(Fields):
    """What starts from a picture: image-to-image, inpainting, outpainting."""

    init: Given | None = Field(
        default=None,
        description="Picture to start from; on the command line also a folder.",
        json_schema_extra=PICTURE,
    )
    strength: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="How far to go from it: 0 gives it back, 1 ignores it; 0.75, or 1 with models made for "
        "editing.",
        json_schema_extra=PICTURE,
    )
    steps_mode: Literal["strength", "exact"] = Field(
        default="strength",
        description="Steps taken: strength times steps, or exactly steps from that noise level.",
        json_schema_extra=PICTURE,
    )
    resize: Literal["stretch", "crop", "pad", "latent"] = Field(
        default="stretch",
        description="How the picture comes to the drawing's size; latent stretches its latents.",
        json_schema_extra=PICTURE,
    )
    match_colours: Literal["none", "covariance", "histogram"] = Field(
        default="none",
        description="Give the drawing the colours of the picture: their mean and covariance, or histogram.",
        json_schema_extra=PICTURE,
    )
    loopback: int = Field(
        default=1,
        ge=1,
        le=MAX_PASSES,
        description="Passes, each from the last one's drawing.",
        json_schema_extra=PICTURE,
    )
    loopback_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor on strength from pass to pass.",
        json_schema_extra=PICTURE,
    )
    mask: Given | None = Field(
        default=None,
        description="Grey picture: white is drawn anew, black stays as it is.",
        json_schema_extra=PICTURE,
    )
    mask_alpha: bool = Field(
        default=False, description="Draw where the picture is transparent.", json_schema_extra=PICTURE
    )
    mask_invert: bool = Field(
        default=False,
        description="Draw the mask's black.",
        json_schema_extra=PICTURE,
    )
    mask_blur: float = Field(
        default=0.0,
        ge=0,
        le=256,
        description="Radius in pixels of a blur of the mask, which widens it.",
        json_schema_extra=PICTURE,
    )
    mask_feather: int | None = Field(
        default=None,
        ge=0,
        le=256,
        description="Width in pixels of the seam inside the mask; that of a latent if not given.",
        json_schema_extra=PICTURE,
    )
    mask_content: Literal["original", "fill", "noise", "nothing"] = Field(
        default="original",
        description="What the masked part starts from: as it is, its surroundings blurred, noise, or zeros.",
        json_schema_extra=PICTURE,
    )
    soft_mask: bool = Field(
        default=False,
        description="Read the mask's grey as how far each part may change (differential diffusion).",
        json_schema_extra=PICTURE,
    )
    only_masked: bool = Field(
        default=False,
        description="Draw the mask's surroundings alone, at full size.",
        json_schema_extra=PICTURE,
    )
    only_masked_padding: int = Field(
        default=32,
        ge=0,
        le=MAX_MARGIN,
        description="Pixels around the mask that it sees then.",
        json_schema_extra=PICTURE,
    )
    region: Annotated[tuple[int, int, int, int] | None, BeforeValidator(numbers)] = Field(
        default=None,
        description="Part of the picture to draw, as 'left,top,width,height'; the rest stays.",
        json_schema_extra=PICTURE,
    )
    outpaint_left: int = Field(
        default=0,
        ge=0,
        le=MAX_MARGIN,
        description="Pixels to draw beyond this side.",
        json_schema_extra=PICTURE,
    )
    outpaint_right: int = Field(
        default=0,
        ge=0,
        le=MAX_MARGIN,
        description="Pixels to draw beyond this side.",
        json_schema_extra=PICTURE,
    )
    outpaint_top: int = Field(
        default=0,
        ge=0,
        le=MAX_MARGIN,
        description="Pixels to draw beyond this side.",
        json_schema_extra=PICTURE,
    )
    outpaint_bottom: int = Field(
        default=0,
        ge=0,
        le=MAX_MARGIN,
        description="Pixels to draw beyond this side.",
        json_schema_extra=PICTURE,
    )
    image_guidance: float | None = Field(
        default=None,
        ge=0,
        description="How closely models that edit by instructions keep to the picture; 1.5 is usual.",
        json_schema_extra=PICTURE,
    )
    noise_level: int | None = Field(
        default=None,
        ge=0,
        le=350,
        description="Noise in the picture that Stable Diffusion's upscaler enlarges; 20 if not given, more "
        "lets it invent more.",
        json_schema_extra=PICTURE,
    )
