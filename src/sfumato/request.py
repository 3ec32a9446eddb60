"""What someone asks for: the single source of names, ranges, defaults and help texts; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sfumato.errors import InputError, nearest

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact
MAX_SIDE = 16_384  # pixels


def _known(kind: str, name: str, allowed: Iterable[str]) -> str:
    names = list(allowed)
    if name not in names:
        raise ValueError(f"there is no {kind} {name!r}. {nearest(name, names)}")
    return name


def _known_sampler(name: str) -> str:
    from sfumato.diffusion.samplers import SAMPLERS  # imports torch, which help texts do without

    return _known("sampler", name, SAMPLERS)


def _known_spacing(name: str) -> str:
    from sfumato.diffusion.spacing import SPACINGS

    return _known("spacing", name, ["auto", *SPACINGS])


def _path_or_values(value: Any) -> Any:
    """A path to a .npy or .safetensors file, or anything with a shape (a tensor, an array)."""
    if isinstance(value, str | Path):
        return Path(value)
    if not hasattr(value, "shape"):
        raise ValueError(f"{type(value).__name__} is neither a path nor a tensor")
    return value


class Request(BaseModel):
    """One request for pictures. A field left at None takes the model's own value; a seed is drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    prompt: str | None = Field(
        default=None,
        description="What to draw. Nothing given draws without a condition; an empty text is a prompt too.",
    )
    negative_prompt: str = Field(
        default="", description="What to steer away from; works where guidance is not 1."
    )
    label: int | None = Field(
        default=None, ge=0, description="Class to draw, for a model trained on numbered classes."
    )
    clip_skip: int | None = Field(
        default=None,
        ge=1,
        description="Layer of the text encoder to read, from the end: 1 is the last, 2 the one before.",
    )
    zeros_for_empty: bool | None = Field(
        default=None,
        description="Take all zeros for an absent negative prompt, not the empty text's features.",
    )
    steps: int | None = Field(default=None, ge=1, le=10_000, description="Number of sampling steps.")
    sampler: Annotated[str, AfterValidator(_known_sampler)] | None = Field(
        default=None, description="Sampler: ddpm, ddim, euler, euler_a, heun or dpmpp_2m."
    )
    spacing: Annotated[str, AfterValidator(_known_spacing)] = Field(
        default="auto",
        description="Spread of the steps: uniform, leading, trailing or karras; auto is the sampler's own.",
    )
    eta: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of fresh noise in each step, for samplers that have it (ddim).",
    )
    variance: Literal["large", "small"] | None = Field(
        default=None,
        description="Noise of ddpm's steps: large on all timesteps (its default there), small on fewer.",
    )
    guidance: float | None = Field(
        default=None,
        ge=0,
        description="Guidance scale: 0 ignores the prompt, 1 follows it in one pass, more exaggerates it.",
    )
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
    start_noise: Annotated[Any, AfterValidator(_path_or_values)] | None = Field(
        default=None,
        description="Start noise, a .npy or .safetensors file: one latent for all pictures, or one for each.",
    )
    shared_start: bool = Field(default=False, description="All pictures start from the noise of the first.")


def input_error(error: ValidationError) -> InputError:
    """The first problem that pydantic found, in the words of this package."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(
        str(part) for part in problem["loc"] if isinstance(part, str) and part in Request.model_fields
    )
    if problem["type"] == "extra_forbidden":
        given = str(problem["loc"][-1])
        return InputError(f"there is no option {given!r}", nearest(given, Request.model_fields))
    if problem["type"] == "value_error":
        message, _, hint = str(problem.get("ctx", {}).get("error")).partition(". ")
        return InputError(message, hint)
    reason = problem["msg"].removeprefix("Input should be ")
    return InputError(f"{name} is {problem['input']}; it should be {reason}")
