"""Training the first stage of latent diffusion, Gaussian (KL) or with a codebook (VQ)."""

from sfumato.training.tasks.autoencoder.task import AutoencoderTask

__all__ = ["AutoencoderTask"]
