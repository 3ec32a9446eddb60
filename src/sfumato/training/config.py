"""What a training run is told: one TOML file, validated, with dotted overrides from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import InputError, nearest
from sfumato.presets import AutoencoderTable, ScheduleTable, TextTable, UNetTable
from sfumato.training.section import Section
from sfumato.training.settings_autoencoder import AutoencoderTaskConfig
from sfumato.training.settings_clip import CLIPTaskConfig
from sfumato.training.settings_data import DataConfig
from sfumato.training.settings_diffusion import DiffusionTaskConfig
from sfumato.training.settings_finetune import FinetuneConfig
from sfumato.training.settings_loop import LoopConfig, OptimizerConfig
from sfumato.training.settings_reproduction import ReproductionTaskConfig
from sfumato.training.settings_upscaler import UpscalerTaskConfig

RECIPES = "See configs/ for recipes that run."


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

    task: Literal["autoencoder", "diffusion", "classifier", "upscaler", "clip", "reproduction", "finetune"]
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
    upscaler: UpscalerTaskConfig | None = None
    clip: CLIPTaskConfig | None = None
    reproduction: ReproductionTaskConfig | None = None
    finetune: FinetuneConfig | None = None
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
        if isinstance(part, int):
            continue  # which one of several
        kind = model.model_fields[part].annotation
        model = next(iter(get_args(kind)), kind)  # the section of one that may be absent
    return list(model.model_fields)
