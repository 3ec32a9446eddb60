"""The loop and its optimizers: how long, how large a batch, at which learning rate, over which processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sfumato.training.section import Section, Share


class OptimizerConfig(Section):
    """Who steps the weights, and the learning rate over the images seen."""

    name: Literal["adamw", "adam8bit", "adafactor", "lion", "sgd"] = Field(
        default="adamw",
        description="bytes of state a weight: adamw 8, lion and sgd 4, adam8bit 2, adafactor near 0",
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="other rates by the name of a network or of an optimizer: {text = 1e-5}",
    )
    betas: tuple[Share, Share] = Field(
        default=(0.9, 0.99), description="sgd takes the first as its momentum, adafactor neither"
    )
    eps: float = Field(default=1e-8, gt=0, description="of adamw and adam8bit")
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_images: int = Field(default=10_000, ge=0)
    decay: Literal["constant", "cosine", "linear", "trapezoid"] = Field(
        default="cosine", description="trapezoid = constant, then straight to zero over the last fifth"
    )
    clip_norm: float = Field(default=1.0, gt=0)


EmaImages = Annotated[int, Field(ge=0)]


class LoopConfig(Section):
    """How long, how large a batch, how often things are written; the clock counts images."""

    images: int = Field(default=200_000, gt=0, description="images to train on in all")
    batch: int = Field(default=64, gt=0, description="images in one network call, of all processes together")
    accumulate: int = Field(default=1, gt=0, description="network calls in one optimizer step")
    ema_images: EmaImages | Annotated[tuple[EmaImages, ...], Field(min_length=1)] = Field(
        default=20_000,
        description="half-life of the averaged weights; 0 = none. Of several, the first is previewed and "
        "becomes the model, the others become model-ema-<images> beside it",
    )
    score_raw: bool = Field(default=False, description="score the weights themselves beside their average")
    log_images: int = Field(default=2_000, gt=0)
    save_images: int = Field(default=20_000, gt=0)
    preview_images: int = Field(default=20_000, gt=0)
    keep: int = Field(default=2, ge=1, description="saved states kept")
    write_retries: int = Field(
        default=3, ge=0, description="times to try again to save a state that could not be written"
    )
    bad_steps: int = Field(
        default=5, ge=1, description="steps in a row without finite gradients that end the run; 1 = the first"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto = bfloat16 on a GPU that has it, else float32"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="of several processes each has all weights (ddp), or its part (fsdp)"
    )
    tensorboard: bool = Field(default=False, description="write metrics for TensorBoard too")
    compile: bool = False
    gradient_checkpointing: bool = False
    channels_last: bool = True

    @property
    def half_lives(self) -> tuple[int, ...]:
        """The lengths of the averages in images, the first of which is the model's."""
        given = self.ema_images
        return (given,) if isinstance(given, int) else tuple(dict.fromkeys(given))
