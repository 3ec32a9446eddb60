"""Files of classifiers of noised samples: one safetensors file that describes itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sfumato.checkpoints.build import assign, built
from sfumato.checkpoints.files import converted, open_file, write_tensors
from sfumato.checkpoints.load import read_finite
from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import CheckpointError, InputError, nearest
from sfumato.nn.classifier import Classifier, ClassifierConfig
from sfumato.presets import ScheduleTable, UNetTable, describe, described

CLASSIFIER_KEY = "sfumato.classifier"  # of the metadata, where a model file has "sfumato"


@dataclass(frozen=True)
class ClassifierDescription:
    """Everything about a classifier but its weights.

    encoder, pool, size: see `ClassifierConfig`. classes: their names, in the order of the logits. schedule:
    of the noise it knows. first_stage: sha256 of the model file whose autoencoder made the latents it was
    trained on, None for pictures in -1..1. image_size: (height, width) in pixels it was trained at. notices:
    credits and licences of what it learned from. Raises InputError where names and logits differ in number.
    """

    name: str
    classes: tuple[str, ...]
    encoder: UNetTable
    pool: Literal["mean", "attention"] = "mean"
    size: tuple[int, ...] | None = None
    schedule: ScheduleTable = field(default_factory=ScheduleConfig)
    first_stage: str | None = None
    image_size: tuple[int, ...] = (64, 64)
    notices: str = ""

    def __post_init__(self) -> None:
        if len(self.classes) != self.network.classes:
            raise InputError(
                f"out_channels is {self.network.classes}, and there are {len(self.classes)} classes",
                f"Set it to {len(self.classes)}.",
            )

    @property
    def network(self) -> ClassifierConfig:
        """The options of its network."""
        return ClassifierConfig(self.encoder, self.pool, self.size)

    def label(self, name: str) -> int:
        """The number of a class; `InputError` with the nearest name where there is none."""
        if name not in self.classes:
            raise InputError(f"{self.name!r} knows no class {name!r}", nearest(name, self.classes))
        return self.classes.index(name)


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier that can be asked: `network` in evaluation mode, its weights frozen."""

    description: ClassifierDescription
    network: Classifier


def save_classifier(path: Path, description: ClassifierDescription, state: Mapping[str, Tensor]) -> None:
    """Write a state dict of `Classifier` in half precision, and what describes it.

    Raises `NumericalError` before anything is written if a weight is not finite in float16.
    """
    tensors = converted(state, torch.float16)
    write_tensors(path, tensors, {CLASSIFIER_KEY: describe(description)})


def load_classifier(
    path: Path | str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> LoadedClassifier:
    """The classifier in a file of `save_classifier`; `CheckpointError` for another file or a damaged one."""
    source = open_file(Path(path))
    if CLASSIFIER_KEY not in source.metadata:
        raise CheckpointError(f"{path} holds no classifier", "Give the model file of a classifier run.")
    description = described(source.metadata[CLASSIFIER_KEY], ClassifierDescription, str(path))
    network = built("classifier", lambda: Classifier(description.network), len(source.infos))
    tensors = {name: read_finite(source, name, device, dtype) for name in source.infos}
    assign(network, tensors, str(path))
    return LoadedClassifier(description, network)
