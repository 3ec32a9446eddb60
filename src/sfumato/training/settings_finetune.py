"""What a recipe says of fine-tuning: which model, what of it is trained, and what it is written as."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from sfumato.training.objective import ObjectiveConfig
from sfumato.training.section import Section, Share

Word = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\s/\\:()\[\]<>]+$")]


class LoraConfig(Section):
    """Low-rank changes of layers (Hu et al. 2021)."""

    rank: PositiveInt = 16
    alpha: float | None = Field(
        default=None, gt=0, description="change = alpha / rank * up down; none = rank"
    )
    targets: Literal["attention", "transformer", "convolutions"] = Field(
        default="attention",
        description="transformer = attention, feed-forward and projections; convolutions = those and all of "
        "the residual and resampling blocks",
    )
    text: bool = Field(default=False, description="the text encoders too")
    dropout: Share = Field(default=0.0, description="share of a change's inputs that are left out in a step")


class InversionConfig(Section):
    """Vectors that stand for a new word (Gal et al. 2022)."""

    word: Word = Field(description="what prompts call it, and the name of its file")
    vectors: int = Field(default=1, ge=1, le=75)
    start: str = Field(default="", description="words whose vectors it starts from, in turn")
    templates: Literal["object", "style", "captions"] | tuple[str, ...] = Field(
        default="object", description='sentences with {} for the word; "captions" = those of the pictures'
    )


class ControlConfig(Section):
    """A network that is shown a second picture (Zhang et al. 2023)."""

    preprocessor: str | None = Field(
        default=None,
        description="makes that picture, see `sfumato preprocess`; none = data.conditions holds them",
    )
    options: dict[str, float] = Field(default_factory=dict, description="of the preprocessor")
    widths: tuple[PositiveInt, ...] | None = Field(
        default=None, description="of the layers before the first block; none = as released ones have"
    )
    start_from: str | None = Field(default=None, description="a ControlNet to go on from; none = the U-Net")


class PriorConfig(Section):
    """What a class of things looks like to the model, so that it stays so (Ruiz et al. 2023, section 3.2)."""

    prompt: str = Field(description="the class in words, as 'a photo of a dog'")
    path: Path | None = Field(
        default=None,
        description="folder of pictures of it; drawn by the model where it is empty or none. "
        "Not looked at where data.folders with prior = true hold some",
    )
    images: PositiveInt = Field(default=200, description="how many are drawn")
    weight: float = Field(default=1.0, gt=0, description="of their loss beside that of the pictures")


class FinetuneConfig(ObjectiveConfig):
    """Training of a model that there is. Its prediction and schedule are the model's own."""

    model: str | None = Field(
        default=None, description="a file, a folder, or a name on the hub; none = the embedded model"
    )
    method: Literal["full", "lora", "textual_inversion", "controlnet"] = "lora"
    text: bool = Field(default=False, description="full: the text encoders too; of a LoRA see lora.text")
    prompt: str | None = Field(
        default=None,
        description="caption of all pictures but the class's, as 'a photo of sks dog'; none = their own",
    )
    caption_dropout: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of captions replaced by none at all, in a textual inversion by the word alone",
    )
    prompts: tuple[str, ...] = Field(default=(), description="of the preview sheets")
    frozen_precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="what the networks that are not trained are kept in"
    )
    save_precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="auto = float32 for LoRA and words, the model's own for whole networks"
    )
    lora: LoraConfig = LoraConfig()
    inversion: InversionConfig | None = None
    control: ControlConfig | None = None
    prior: PriorConfig | None = None
