"""The table that trains a first stage: what pictures are compared by, and what ties its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sfumato.training.section import Section


class AutoencoderTaskConfig(Section):
    """L1, and on request edges, perceptual distance and a discriminator (Rombach et al. 2022, appendix G).

    All terms are means over pixels, the KL divergence the sum over latents divided by the pixels, so that its
    1e-6 is LDM's, which sums everything.
    """

    kl_weight: float = Field(default=1e-6, ge=0, description="pull of the latents to N(0, I); not with VQ")
    edge_weight: float = Field(default=0.0, ge=0, description="of the L1 of finite differences, weight-free")
    learn_logvar: bool = Field(
        default=False, description="learn the log-variance that weighs the reconstruction, as LDM's loss does"
    )
    start_from: Path | None = Field(
        default=None, description="model.safetensors whose autoencoder to begin with"
    )
    freeze_encoder: bool = Field(
        default=False,
        description="train the decoder alone: latents, and so U-Nets trained on them, keep their meaning",
    )
    preview_images: int = Field(
        default=6_000,
        ge=0,
        description="images the preview decoder learns from at the end, never more than the run; 0 = none",
    )

    perceptual: Literal["none", "ssim", "autoencoder", "clip", "lpips"] = Field(
        default="none",
        description="features that reconstructions are compared in: multi-scale SSIM has no weights; the "
        "encoder of an earlier run and a CLIP image tower are perceptual_model; lpips needs vgg and lpips, "
        "which make LPIPS a score with any of them",
    )
    perceptual_weight: float = Field(default=1.0, ge=0, description="beside the L1; LDM's is 1")
    perceptual_model: Path | None = Field(
        default=None, description="file of the autoencoder, or file or folder of the CLIP image tower"
    )
    vgg: str | Path | None = Field(
        default=None, description="torchvision's vgg16, .pth or .safetensors: a file, or a name on the hub"
    )
    lpips: str | Path | None = Field(
        default=None, description="LPIPS' linear weights for it (vgg.pth, v0.1): a file, or a name on the hub"
    )

    adversarial: Literal["none", "hinge", "vanilla"] = Field(
        default="none", description="loss of the PatchGAN discriminator, a second network; LDM's is hinge"
    )
    disc_start: int = Field(default=0, ge=0, description="images seen before the discriminator joins in")
    disc_weight: float = Field(default=0.5, ge=0, description="of its pull on the autoencoder")
    disc_factor: float = Field(default=1.0, ge=0, description="of both adversarial losses")
    disc_adaptive: bool = Field(
        default=True, description="balance gradients at the decoder's last layer (Esser et al. 2021, eq. 7)"
    )
    disc_layers: int = Field(default=3, ge=1, le=6, description="halvings; 3 see 70 pixels, 2 see 34")
    disc_width: int = Field(default=64, ge=1, description="channels of its first layer")
    disc_norm: Literal["batch", "group"] = Field(
        default="batch", description="batch as released; with group a picture is judged by itself alone"
    )

    codebook: Literal["gradient", "ema"] = Field(
        default="gradient", description="VQ: what moves the entries, their loss or moving averages of latents"
    )
    codebook_weight: float = Field(default=1.0, ge=0, description="VQ: of the losses at the codebook")
    beta: float = Field(default=0.25, ge=0, description="VQ: of the commitment among them")
    codebook_images: int = Field(
        default=500, gt=0, description="VQ: half-life of the averages of entries and of their use"
    )
    revive_below: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="VQ: entries chosen less than this share of evenly are drawn anew of latents; 0 = never",
    )
