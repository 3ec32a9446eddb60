"""Model configurations: what describes a whole latent diffusion model, as a value and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from sfumato.diffusion.prediction import PREDICTIONS
from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import CheckpointError, InputError, nearest
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.clip import CLIPTextConfig
from sfumato.nn.unet import UNetConfig

FORMAT_VERSION = 1
MAX_NUMBER = 1_000_000  # in a file's description; no width, count or size of a real model comes near
DEFAULTS = ("steps", "sampler", "spacing", "guidance", "eta", "variance", "width", "height")


def known_keys(kind: type) -> BeforeValidator:
    """Refuse keys that the dataclass `kind` lacks; pydantic ignores them in plain dataclasses."""

    def check(value: Any) -> Any:
        names = [field.name for field in dataclasses.fields(kind)]
        for key in value if isinstance(value, Mapping) else ():
            if key not in names:
                raise ValueError(f"unknown key {key!r}. {nearest(str(key), names)}")
        return value

    return BeforeValidator(check)


# The configurations as they are read from JSON and TOML.
UNetTable = Annotated[UNetConfig, known_keys(UNetConfig)]
AutoencoderTable = Annotated[AutoencoderConfig, known_keys(AutoencoderConfig)]
TextTable = Annotated[CLIPTextConfig, known_keys(CLIPTextConfig)]
ScheduleTable = Annotated[ScheduleConfig, known_keys(ScheduleConfig)]


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its weights; a part that it lacks is None.

    `tokenizer` is the tokenizer's own JSON; `image_size` the (height, width) in pixels it was trained at;
    `defaults` are request fields it draws best with, `notices` credits and licences of what it learned from.
    Raises InputError for an unknown prediction, a scale or size that is not positive, other request fields.
    """

    name: str
    unet: UNetTable | None = None
    autoencoder: AutoencoderTable | None = None
    text: TextTable | None = None
    tokenizer: str | None = None
    schedule: ScheduleTable = field(default_factory=ScheduleConfig)
    prediction: str = "eps"
    latent_scale: float = 1.0
    image_size: tuple[int, ...] = (64, 64)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notices: str = ""

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise InputError(
                f"there is no prediction {self.prediction!r}", nearest(self.prediction, PREDICTIONS)
            )
        if not 0 < self.latent_scale < math.inf:
            raise InputError(f"latent_scale is {self.latent_scale}; it must be positive")
        if not 1 <= len(self.image_size) <= 3 or min(self.image_size) < 1:
            raise InputError(f"image_size is {self.image_size}; it needs one to three positive sides")
        for key in self.defaults:
            if key not in DEFAULTS:
                raise InputError(f"a model has no default {key!r}", nearest(key, DEFAULTS))

    def to_json(self) -> str:
        """JSON text for a model file's metadata."""
        values = {"version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "the model file") -> ModelConfig:
        """Inverse of `to_json`; `CheckpointError` for another version and for what describes no model."""
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError("it is no table")
            version = values.pop("version", None)
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{source} has format {version!r}, this program reads {FORMAT_VERSION}", "Update sfumato."
                )
            for number in _numbers(values):
                if not abs(number) <= MAX_NUMBER:
                    raise ValueError(f"it holds the number {number:g}")
            return _adapter().validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise _damaged(source, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
            raise _damaged(source, str(error)) from error


@cache
def _adapter() -> TypeAdapter[ModelConfig]:
    return TypeAdapter(Annotated[ModelConfig, known_keys(ModelConfig)])


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def _damaged(source: str, reason: str) -> CheckpointError:
    return CheckpointError(f"the description in {source} is damaged: {reason}", "Get the file again.")
