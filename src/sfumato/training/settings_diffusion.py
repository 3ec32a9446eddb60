"""The tables that train a denoiser: what it learns, from what, and what it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sfumato.diffusion.low_scale import MAX_NOISE_LEVEL
from sfumato.training.section import Section

Probability = Annotated[float, Field(ge=0, le=1)]


class ObjectiveConfig(Section):
    """The keys of every denoiser's loss; the defaults are DDPM's (Ho et al. 2020, eq. 14).

    Tables that train a denoiser are subclasses, so the keys stand in them: diffusion.weighting.
    """

    prediction: Literal["eps", "v", "x0"] = "eps"
    loss: Literal["l2", "l1", "huber"] = Field(
        default="l2", description="huber = 2 d (sqrt(error^2 + d^2) - d), of which outliers pull little"
    )
    huber_delta: float = Field(default=0.1, gt=0, le=1, description="d of huber, where it stops being square")
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        default="constant", description="d falls from 1 to huber_delta with the noise (Khrapov et al. 2024)"
    )
    weighting: Literal["none", "min_snr", "p2", "debiased"] = Field(
        default="none", description="of timesteps; their meaning is the same for every prediction"
    )
    min_snr_gamma: float = Field(default=5.0, gt=0, description="Hang et al. 2023")
    p2_k: float = Field(default=1.0, gt=0, description="Choi et al. 2022")
    p2_gamma: float = Field(default=1.0, ge=0, description="Choi et al. 2022: 0 weighs nothing, 1 is theirs")
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    timestep_range: tuple[int, int] | None = Field(
        default=None, description="first and last timestep that is trained; none = all"
    )
    logit_mean: float = Field(default=0.0, description="of logit_normal; above 0 is more noise")
    logit_std: float = Field(default=1.0, gt=0)
    offset_noise: float = Field(
        default=0.0, ge=0, description="noise that is one number per channel; 0.1 makes darker and lighter"
    )
    input_perturbation: float = Field(
        default=0.0, ge=0, description="noise the network is shown and not asked for (Ning et al. 2023: 0.1)"
    )


class DiffusionTaskConfig(ObjectiveConfig):
    """A denoiser from scratch or from another's weights, and its conditions (Rombach et al. 2022, eq. 3)."""

    caption_dropout: Probability = Field(
        default=0.1, description="share of captions replaced by the empty one"
    )
    nearest: bool = Field(
        default=True, description="compare the pictures of sheets with the training pictures, to find copies"
    )
    vocabulary: int | Literal["clip"] = Field(
        default=2048, description="tokens learned from the captions, or CLIP's own"
    )
    autoencoder: Path | None = Field(
        default=None, description="model.safetensors of an autoencoder run; none = pixel space"
    )
    start_from: Path | None = Field(
        default=None,
        description="model whose U-Net, text encoder and tokenizer, or classes, to begin with",
    )
    text_from: Path | None = Field(
        default=None, description="model whose text encoder and tokenizer to take, instead of start_from's"
    )
    text_trainable: bool = Field(default=True, description="false leaves the text encoder as it is")
    text_cache: bool = Field(
        default=False, description="keep what a text encoder that stays as it is makes of every caption"
    )
    classes: Literal["none", "context", "vector"] = Field(
        default="none",
        description="sub-folders are classes: a token of the context (Rombach et al. 2022), or added to the "
        "timestep's embedding (Dhariwal and Nichol 2021)",
    )
    label_dropout: Probability = Field(
        default=0.1, description='share of labels replaced by "no class", which guidance needs'
    )
    concat: Literal["none", "inpainting", "super_resolution"] = Field(
        default="none",
        description="what further input channels show: mask and known part, or a small picture",
    )
    concat_dropout: Probability = Field(
        default=0.1,
        description="share of small pictures that are not shown, in pixels; beside latents they always are",
    )
    mask_whole: Probability = Field(
        default=0.25, description="share of masks that hide everything (Stable Diffusion: a quarter)"
    )
    enlarge: int | None = Field(
        default=None,
        ge=2,
        le=64,
        description="pixels per pixel of the small picture, 4 if not given; in latents the autoencoder's own",
    )
    small_noise: float = Field(
        default=0.0, ge=0, le=1, description="most noise in the small picture, of deviation 0 to this"
    )
    noise_levels: int = Field(
        default=0,
        ge=0,
        le=MAX_NOISE_LEVEL + 1,
        description="levels of noise in the small picture that the network is told, in latents; 0 = none",
    )
    prompts: tuple[str, ...] = Field(default=(), description="prompts of the preview sheets")
    guidance: float = Field(default=3.0, ge=0, description="default guidance of the finished model")
    steps: int = Field(default=25, gt=0, description="default steps of the finished model")
    sampler: str = Field(default="dpmpp_2m", description="default sampler of the finished model")
