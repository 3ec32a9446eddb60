"""What someone asks for: the single source of names, ranges, defaults and help texts; imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from sfumato.errors import InputError, nearest
from sfumato.request import picture
from sfumato.request.values import (
    folder,
    numbers,
    options,
    path_or_object,
    path_or_values,
    sampler_key,
    spacing_key,
    told,
    words,
)

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact
MAX_SIDE = 16_384  # pixels

Options = dict[str, float | str]


PROMPT: dict[str, JsonValue] = {"group": "Prompt"}
GUIDANCE: dict[str, JsonValue] = {"group": "Guidance"}  # where the command line lists a field
NOISE: dict[str, JsonValue] = {"group": "Noise"}


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
    emphasis: Literal["a1111", "comfyui", "plain"] = Field(
        default="a1111",
        description="How prompts are read: with the weights of either tool, or plain, brackets and all.",
        json_schema_extra=PROMPT,
    )
    wildcards: Annotated[str | None, BeforeValidator(folder)] = Field(
        default=None,
        description="Folder of the text files that __name__ draws lines from.",
        json_schema_extra=PROMPT,
    )
    styles: Annotated[tuple[str, ...], BeforeValidator(words)] = Field(
        default=(),
        description="Names of styles to add to the prompts, with commas.",
        json_schema_extra=PROMPT,
    )
    styles_file: Annotated[str | None, BeforeValidator(folder)] = Field(
        default=None, description="CSV file of the styles.", json_schema_extra=PROMPT
    )
    lora: Annotated[tuple[str, ...], BeforeValidator(words)] = Field(
        default=(),
        description="LoRA to apply: files or names, each with its weight, as 'ink:0.8,film:1:0.5'.",
        json_schema_extra=PROMPT,
    )
    lora_dir: Annotated[str | None, BeforeValidator(folder)] = Field(
        default=None,
        description="Folder of the LoRA that <lora:name:0.8> in a prompt names.",
        json_schema_extra=PROMPT,
    )
    embedding_dir: Annotated[str | None, BeforeValidator(folder)] = Field(
        default=None,
        description="Folder of textual inversions, which prompts call by name.",
        json_schema_extra=PROMPT,
    )
    zeros_for_empty: bool | None = Field(
        default=None,
        description="Take all zeros for an absent negative prompt, not the empty text's features.",
    )
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
    init: picture.Init = None
    strength: picture.Strength = None
    steps_mode: picture.StepsMode = "strength"
    resize: picture.Resize = "stretch"
    match_colours: picture.MatchColours = "none"
    loopback: picture.Loopback = 1
    loopback_decay: picture.LoopbackDecay = 1.0
    mask: picture.Mask = None
    mask_alpha: picture.MaskAlpha = False
    mask_invert: picture.MaskInvert = False
    mask_blur: picture.MaskBlur = 0.0
    mask_feather: picture.MaskFeather = None
    mask_content: picture.MaskContent = "original"
    soft_mask: picture.SoftMask = False
    only_masked: picture.OnlyMasked = False
    only_masked_padding: picture.Padding = 32
    region: picture.Region = None
    outpaint_left: picture.Outpaint = 0
    outpaint_right: picture.Outpaint = 0
    outpaint_top: picture.Outpaint = 0
    outpaint_bottom: picture.Outpaint = 0
    image_guidance: picture.ImageGuidance = None

    @model_validator(mode="before")
    @classmethod
    def _read_sampler(cls, values: Any) -> Any:
        """A sampler's name may say its spacing and options too, as "DPM++ 2M Karras" does."""
        if not isinstance(values, dict) or not isinstance(values.get("sampler"), str):
            return values
        from sfumato.diffusion.names import implied, resolve

        name = values["sampler"]
        key, spacing = told(resolve, name)
        more = implied(name)
        values = {**values, "sampler": key}
        if spacing is not None and values.get("spacing", "auto") == "auto":
            values["spacing"] = spacing
        for option in [option for option in more if option in cls.model_fields]:
            values.setdefault(option, more.pop(option))
        if more:
            values["sampler_options"] = more | options(values.get("sampler_options", {}))
        return values


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
