"""What a training run is told: one TOML file, validated, with dotted overrides from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveInt, ValidationError

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import InputError, nearest
from sfumato.presets import AutoencoderTable, ScheduleTable, TextTable, UNetTable
from sfumato.training.section import Section, Share

RECIPES = "See configs/ for recipes that run."


class DataConfig(Section):
    """The pictures."""

    path: Path = Field(description="folder of pictures with .txt captions, or a built illustration set")
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        default=64, description="pixels, side or (height, width)"
    )
    channels: Literal[1, 3] = 3
    repeats: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict,
        description='how often an epoch shows each "kind" or "kind/style" of an illustration set; else 1',
    )
    workers: int = Field(default=2, ge=0, le=64, description="threads that decode pictures ahead")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class OptimizerConfig(Section):
    """AdamW and its learning rate over the images seen."""

    learning_rate: float = Field(default=1e-4, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.99)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_images: int = Field(default=10_000, ge=0)
    decay: Literal["constant", "cosine", "trapezoid"] = Field(
        default="cosine", description="trapezoid = constant, then straight to zero over the last fifth"
    )
    clip_norm: float = Field(default=1.0, gt=0)


class LoopConfig(Section):
    """How long, how large a batch, how often things are written; the clock counts images."""

    images: int = Field(default=200_000, gt=0, description="images to train on in all")
    batch: int = Field(default=64, gt=0, description="images in one network call")
    accumulate: int = Field(default=1, gt=0, description="network calls in one optimizer step")
    ema_images: int = Field(default=20_000, ge=0, description="half-life of the averaged weights; 0 = none")
    log_images: int = Field(default=2_000, gt=0)
    save_images: int = Field(default=20_000, gt=0)
    preview_images: int = Field(default=20_000, gt=0)
    keep: int = Field(default=2, ge=1, description="saved states kept")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto = bfloat16 on a GPU that has it, else float32"
    )
    compile: bool = False
    gradient_checkpointing: bool = False
    channels_last: bool = True


class AutoencoderTaskConfig(Section):
    """L1 + KL, and a weight-free edge term (L1 of finite differences)."""

    kl_weight: float = Field(default=1e-6, ge=0)
    edge_weight: float = Field(default=0.0, ge=0)
    start_from: Path | None = Field(
        default=None, description="model.safetensors whose autoencoder to begin with"
    )
    freeze_encoder: bool = Field(
        default=False,
        description="train the decoder alone: latents, and so U-Nets trained on them, keep their meaning",
    )


class DiffusionTaskConfig(Section):
    """Mean squared error of the prediction (Ho et al. 2020, eq. 14; Rombach et al. 2022, eq. 2)."""

    prediction: Literal["eps", "v", "x0"] = "eps"
    caption_dropout: float = Field(
        default=0.1, ge=0, le=1, description="share of captions replaced by the empty one"
    )
    vocabulary: int | Literal["clip"] = Field(
        default=2048, description="tokens learned from the captions, or CLIP's own"
    )
    autoencoder: Path | None = Field(
        default=None, description="model.safetensors of an autoencoder run; none = pixel space"
    )
    start_from: Path | None = Field(
        default=None, description="model.safetensors whose U-Net, text encoder and tokenizer to begin with"
    )
    prompts: tuple[str, ...] = Field(default=(), description="prompts of the preview sheets")
    guidance: float = Field(default=3.0, ge=0, description="default guidance of the finished model")
    steps: int = Field(default=25, gt=0, description="default steps of the finished model")
    sampler: str = Field(default="dpmpp_2m", description="default sampler of the finished model")


class ClassifierTaskConfig(Section):
    """Cross-entropy of a classifier of noised samples (Dhariwal and Nichol 2021, section 4)."""

    classes: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="words of which a caption names one; none = every caption is a class"
    )
    pool: Literal["mean", "attention"] = Field(
        default="attention",
        description="attention sees small things and samples of one size, mean takes any size",
    )
    autoencoder: Path | None = Field(
        default=None, description="model.safetensors whose latents to learn on; none = pixel space"
    )


class TrainingConfig(Section):
    """A whole run. The same file run again resumes from `out`."""

    task: Literal["autoencoder", "diffusion", "classifier"]
    out: Path = Field(description="folder of the run")
    name: str = "model"
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    notices: str = Field(default="", description="credits for the model file; else data.path/NOTICE")
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()
    autoencoder: AutoencoderTaskConfig = AutoencoderTaskConfig()
    diffusion: DiffusionTaskConfig = DiffusionTaskConfig()
    classifier: ClassifierTaskConfig | None = None
    first_stage: AutoencoderTable | None = None
    unet: UNetTable | None = None
    text: TextTable | None = None
    schedule: ScheduleTable = ScheduleConfig()


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a TOML recipe; each override is `dotted.key=value` with a TOML value (bare words are strings).

    Raises `InputError` that names the key, what was given and the nearest right key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the recipe {path}: {error.strerror}", "Give the path of a .toml file."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not valid TOML: {error}", RECIPES) from error
    for override in overrides:
        _override(values, override)
    try:
        return TrainingConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}", RECIPES) from error
    except ArithmeticError as error:  # a zero that a network's options divide by
        raise InputError(f"{path}: {error}", RECIPES) from error


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, raw = text.removeprefix("--").partition("=")
    if not equals:
        raise InputError(f"override {text!r} has no value", "Write it as --loop.images=50000")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise InputError(f"{key!r}: {table!r} is not a table", "Check the dots of the key.")
    values[last] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {place!r}. {nearest(str(item['loc'][-1]), _keys(item['loc'][:-1]))}")
        elif item["type"] == "missing":
            lines.append(f"key {place!r} is missing")
        elif item["type"] == "value_error":
            lines.append(f"{place}: {item.get('ctx', {}).get('error')}".replace("\n", " "))
        else:
            lines.append(f"{place}: {item['msg']} (given: {item['input']!r})")
    return "; ".join(lines)


def _keys(place: Sequence[int | str]) -> list[str]:
    """The keys of the section at `place`; only sections know extra keys, so every step leads to one."""
    model: Any = TrainingConfig
    for part in place:
        kind = model.model_fields[part].annotation
        model = next(iter(get_args(kind)), kind)  # the section of one that may be absent
    return list(model.model_fields)
