"""What lies in a file, a folder or a name on the hub, found out without reading a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.checkpoints.layouts.tables import Pair
from sfumato.checkpoints.source import Source, TensorInfo
from sfumato.errors import CheckpointError
from sfumato.presets import ModelConfig


@dataclass(frozen=True)
class Part:
    """One network of a model: its configuration, the file it lies in, how the file's names become ours."""

    config: Any
    mapping: tuple[Pair, ...]
    source: Source

    @property
    def names(self) -> list[str]:
        """The file's tensors that it is made of, each once."""
        return list(dict.fromkeys(name for pair in self.mapping for name in pair.foreign))

    def info(self, name: str) -> TensorInfo:
        """What the file says of one of them."""
        return self.source.infos[name]


@dataclass(frozen=True)
class Opened:
    """A model that was found but not loaded.

    place: what was opened, for messages. layout: "native", "ldm" or "diffusers". ignored: the file's tensors
    that no part uses, by the name of the rule that says so; unknown: those that no rule knows. evidence: why
    the prediction is taken for what it is; uncertain: running the network once would tell better. files:
    every file of weights. notes: what a reader should be told.
    """

    place: str
    family: str
    layout: str
    format: str
    config: ModelConfig
    parts: Mapping[str, Part]
    evidence: str
    files: tuple[Path, ...]
    uncertain: bool = False
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def with_autoencoder(self, other: Opened) -> Opened:
        """The same model with the autoencoder of `other`; `CheckpointError` where its latents differ."""
        if "autoencoder" not in other.parts:
            raise CheckpointError(
                f"{other.place} holds no autoencoder, only {', '.join(other.parts)}", "Give another --vae."
            )
        part, unet = other.parts["autoencoder"], self.config.unet
        mine = self.config.autoencoder
        if mine is not None and (mine.embed_dim, mine.n_embed is None, mine.downsampling) != (
            part.config.embed_dim, part.config.n_embed is None, part.config.downsampling,
        ):  # fmt: skip
            raise CheckpointError(
                f"{other.place} makes latents of {part.config.embed_dim} channels, side / "
                f"{part.config.downsampling}; the model's have {mine.embed_dim}, side / {mine.downsampling}",
                "Give an autoencoder of the same family.",
            )
        if unet is not None and unet.out_channels != part.config.embed_dim:
            raise CheckpointError(
                f"{other.place} makes latents of {part.config.embed_dim} channels, the U-Net's have "
                f"{unet.out_channels}",
                "Give an autoencoder of the same family.",
            )
        scale = self.config.latent_scale if mine is not None else other.config.latent_scale
        config = dataclasses.replace(self.config, autoencoder=part.config, latent_scale=scale)
        return dataclasses.replace(
            self,
            config=config,
            parts={**self.parts, "autoencoder": part},
            files=tuple(dict.fromkeys([*self.files, *other.files])),
            notes=(*self.notes, f"the autoencoder is that of {other.place}"),
        )
