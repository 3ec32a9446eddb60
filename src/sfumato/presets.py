"""Model configurations: what describes a whole latent diffusion model, as a value and as JSON, and named ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import CheckpointError
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.clip import CLIPTextConfig
from sfumato.nn.unet import UNetConfig

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its weights; a part that it lacks is None.

    `image_size` is (height, width) in pixels it was trained at; `defaults` are request fields it draws best with;
    `tokenizer` is the tokenizer's own JSON, or "clip"; `notices` are credits and licences of what it learned from.
    """

    name: str
    unet: UNetConfig | None = None
    autoencoder: AutoencoderConfig | None = None
    text: CLIPTextConfig | None = None
    tokenizer: str | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    prediction: str = "eps"
    latent_scale: float = 1.0
    image_size: tuple[int, ...] = (64, 64)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notices: str = ""

    def to_json(self) -> str:
        """JSON text for a model file's metadata."""
        return json.dumps({"version": FORMAT_VERSION, **dataclasses.asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Inverse of `to_json`; `CheckpointError` on unknown keys, missing keys or a newer version."""
        try:
            values = json.loads(text)
            version = values.pop("version")
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"the model file has format {version}, this program reads {FORMAT_VERSION}",
                    "Update sfumato.",
                )
            for key, kind in _PARTS.items():
                if values.get(key) is not None:
                    values[key] = kind(**{name: _tuples(value) for name, value in values[key].items()})
            return cls(
                **{key: _tuples(value) if key == "image_size" else value for key, value in values.items()}
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"the model file's description is damaged: {error}", "Get the file again."
            ) from error


_PARTS = {
    "unet": UNetConfig,
    "autoencoder": AutoencoderConfig,
    "text": CLIPTextConfig,
    "schedule": ScheduleConfig,
}


def _tuples(value: Any) -> Any:
    """JSON has no tuples; configurations have no lists."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
