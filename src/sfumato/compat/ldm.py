"""The names of the original code (CompVis latent-diffusion), for scripts and notebooks written for it.

`LatentDiffusion(sfumato.load(path))` is the model object of those scripts; docs/names.md leads every class
of the original to its place here.
"""

from __future__ import annotations

from sfumato.compat.configs import instantiate_from_config, load_model_from_config
from sfumato.compat.ddim import DDIMSampler, make_ddim_timesteps
from sfumato.compat.ddpm import DDPM
from sfumato.compat.diffusion import DiffusionWrapper, LatentDiffusion
from sfumato.compat.distributions import DiagonalGaussianDistribution
from sfumato.compat.encoders import BERTEmbedder, ClassEmbedder, FrozenCLIPEmbedder
from sfumato.compat.networks import (
    AutoencoderKL,
    Decoder,
    Encoder,
    IdentityFirstStage,
    UNetModel,
    VQModel,
    VQModelInterface,
)
from sfumato.compat.plms import PLMSSampler

__all__ = [
    "DDPM",
    "AutoencoderKL",
    "BERTEmbedder",
    "ClassEmbedder",
    "DDIMSampler",
    "Decoder",
    "DiagonalGaussianDistribution",
    "DiffusionWrapper",
    "Encoder",
    "FrozenCLIPEmbedder",
    "IdentityFirstStage",
    "LatentDiffusion",
    "PLMSSampler",
    "UNetModel",
    "VQModel",
    "VQModelInterface",
    "instantiate_from_config",
    "load_model_from_config",
    "make_ddim_timesteps",
]
