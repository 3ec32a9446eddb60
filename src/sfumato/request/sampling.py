"""How a picture is sampled: steps, sampler, spacing, guidance scale."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from sfumato.request.values import (
    Fields,
    Options,
    numbers,
    options,
    sampler_key,
    spacing_key,
)


class SamplingFields(Fields):
    """How a picture is sampled: steps, sampler, spacing, guidance scale."""

    steps: int | None = Field(default=None, ge=1, le=10_000, description="Number of sampling steps.")
    sampler: Annotated[str, AfterValidator(sampler_key)] | None = Field(
        default=None,
        description="Sampler, by its name here or in other tools, as euler_a or 'DPM++ 2M Karras'; "
        "`sfumato samplers` lists them.",
    )
    spacing: Annotated[str, AfterValidator(spacing_key)] = Field(
        default="auto",
        description="Spread of the steps, as karras or uniform; auto is the sampler's own.",
    )
    eta: float | None = Field(
        default=None, ge=0, le=1, description="Share of fresh noise in each step, for samplers that have it."
    )
    variance: Literal["large", "small"] | None = Field(
        default=None,
        description="Noise of ddpm's steps: large on all timesteps (its default there), small on fewer.",
    )
    sampler_options: Annotated[Options, BeforeValidator(options)] = Field(
        default={}, description="More of the sampler's options, as 's_churn=10 s_tmin=0.05'."
    )
    spacing_options: Annotated[Options, BeforeValidator(options)] = Field(
        default={}, description="The spacing's options, as 'rho=5 sigma_min=0.1'."
    )
    sigmas: Annotated[tuple[float, ...] | None, BeforeValidator(numbers)] = Field(
        default=None, description="Noise levels of one's own, descending, as '14.6,4,1,0'; sets steps too."
    )
    guidance: float | None = Field(
        default=None,
        ge=0,
        description="Guidance scale: 0 ignores the prompt, 1 follows it in one pass, more exaggerates it.",
    )
