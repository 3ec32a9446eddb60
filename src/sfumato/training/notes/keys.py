"""The keys of the notes' configuration file, their defaults the file's own values, and a few of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, PositiveInt, StrictBool, ValidationError

from sfumato.errors import InputError, nearest
from sfumato.training.notes.ini import literal, path_text
from sfumato.training.section import Section

PATHS = ("save_path", "dataset_path")


def _numbers(value: Any) -> Any:
    """One number as a list of it, a set in order."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return sorted(value) if isinstance(value, set) else value


def _ordered(value: Any) -> Any:
    if isinstance(value, set):
        raise ValueError("a set has no order and holds no number twice; write a list or a tuple")
    return value


Factors = Annotated[tuple[PositiveInt, ...], BeforeValidator(_numbers)]
Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(_ordered)]
Pair = Annotated[tuple[FiniteFloat, FiniteFloat], BeforeValidator(_ordered)]
Heads = Annotated[int, Field(ge=-1)]


class NotesConfig(Section):
    """Every key of config_SD.ini; the defaults are what it says."""

    # Training.
    epochs: PositiveInt = 3
    batch_size: PositiveInt = 10
    learning_rate: float = Field(default=1e-4, gt=0)
    save_path: Path = Field(description="folder of the run: sheets of samples, states, the model")
    dataset_path: Path = Field(description="folder of pictures, searched recursively")
    input_height: PositiveInt = 32
    input_width: PositiveInt = 32
    # U-Net.
    channel: PositiveInt = Field(default=1, description="1 is grey, 3 colours, 4 with transparency")
    model_channels: PositiveInt = 64
    num_res_blocks: PositiveInt = 1
    attention_resolutions: Factors = Field(default=(1,), description="downsampling factors, not sizes")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    channel_mult: Widths = (1, 2, 4, 8)
    conv_resample: StrictBool = Field(default=True, description="not read where resblock_updown is True")
    dims: Literal[1, 2, 3] = 2
    num_classes: Annotated[int, Field(ge=0)] | None = Field(
        default=0, description="0 and None: no classes; else as many as dataset_path has sub-folders"
    )
    num_heads: Heads = 8
    num_head_channels: Heads = Field(default=-1, description="wins over num_heads; -1 is unset")
    use_scale_shift_norm: StrictBool = False
    resblock_updown: StrictBool = True
    transformer_depth: PositiveInt = 1
    context_dim: PositiveInt | None = None
    n_embed: PositiveInt = Field(default=1, description="channels of the last convolution: as `channel`")
    # Diffusion.
    timesteps: int = Field(default=200, ge=2, le=100_000)
    beta_range: Pair = (1e-4, 0.02)
    noise_info: Pair = Field(default=(0, 1), description="taken for mean and standard deviation of the noise")
    # Ours, which the notes' file does not have.
    beta_rule: Literal["plain", "scaled"] = Field(
        default="plain", description="scaled: beta_range is for 1000 timesteps, times 1000 / timesteps"
    )
    zero_terminal_snr: StrictBool = Field(default=False, description="rescale the last timestep to noise")
    objective: Literal["eps", "v", "x0"] | None = Field(
        default=None, description="what is predicted: eps, or v where zero_terminal_snr is True"
    )
    ema_images: int = Field(
        default=0, ge=0, description="half-life of averaged weights, which the sheets are drawn with; 0: none"
    )
    input_depth: PositiveInt | None = Field(default=None, description="slices where dims = 3; None: as files")
    samples: PositiveInt = Field(default=16, description="on each sheet")
    preview_steps: PositiveInt = Field(default=10, description="for the sheets of all epochs but the last")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on GPUs that have it"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"


def parse(values: Mapping[str, str], place: str) -> NotesConfig:
    """The configuration that key -> text means; `InputError` names key, value and the nearest right key."""
    names = list(NotesConfig.model_fields)
    for key in values:
        if key not in names:
            raise InputError(f"{place}: unknown key {key!r}", nearest(key, names))
    for key in PATHS:
        if not path_text(values.get(key, "")):
            raise InputError(f"{place}: key {key!r} is missing or empty", "Give the path of a folder.")
    read = {key: path_text(text) if key in PATHS else literal(key, text) for key, text in values.items()}
    try:
        config = NotesConfig.model_validate(read)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        said = first.get("ctx", {}).get("error", first["msg"])
        about = NotesConfig.model_fields[key].description
        raise InputError(f"{place}: {key} is {values[key].strip()[:80]}; {said}", about or "") from error
    _check(config, place)
    return config


def _check(config: NotesConfig, place: str) -> None:
    """What the keys say together."""
    if config.num_heads < 1 and config.num_head_channels < 1:
        raise InputError(
            f"{place}: num_heads and num_head_channels are both unset",
            "Set one of them; -1 leaves one unset.",
        )
    if config.n_embed != config.channel:
        raise InputError(
            f"{place}: n_embed is {config.n_embed}, channel {config.channel}; n_embed is the channels of the "
            "last convolution, and the noise it predicts has the picture's",
            f"Set n_embed = {config.channel}.",
        )
    if config.context_dim is not None:
        raise InputError(
            f"{place}: context_dim is {config.context_dim}, and this file has no key for what to attend to",
            "Set context_dim = None; text is for recipes with a [text] table, see configs/.",
        )
    if config.noise_info != (0, 1):
        raise InputError(
            f"{place}: noise_info is {list(config.noise_info)}; it is taken for mean and standard deviation "
            "of the noise, and x_t = sqrt(abar) x_0 + sqrt(1 - abar) z holds for [0, 1] alone",
            "Set noise_info = [0, 1].",
        )
    factor = 2 ** (len(config.channel_mult) - 1)
    sides = {"input_width": config.input_width}
    if config.dims > 1:
        sides["input_height"] = config.input_height
    wrong = {key: _nearest(side, factor) for key, side in sides.items() if side % factor}
    if wrong:
        given = ", ".join(f"{key} = {sides[key]}" for key in wrong)
        levels = len(config.channel_mult)
        while any(side % 2 ** (levels - 1) for side in sides.values()):
            levels -= 1
        raise InputError(
            f"{place}: {given}: {len(config.channel_mult)} levels of channel_mult halve a side "
            f"{len(config.channel_mult) - 1} times, and the halves have to meet again: multiples of {factor}",
            "The nearest: "
            + ", ".join(f"{key} = {' or '.join(map(str, near))}" for key, near in wrong.items())
            + f". Or with fewer levels: channel_mult = {list(config.channel_mult[:levels])}",
        )


def _nearest(side: int, factor: int) -> list[int]:
    """The multiples of `factor` that are nearest to `side`, from below and above."""
    low, high = side // factor * factor, math.ceil(side / factor) * factor
    return [near for near in (low, high) if near]
