"""The autoencoder with a codebook for latents (Esser et al. 2021; Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.nn.autoencoder import AutoencoderConfig, Decoder, Encoder

# Distances held at once: 4 MB fit a cache, where a 512 px picture of vq-f4 has 0.5 GB of them.
SCORES = 2**20


@dataclass(frozen=True)
class Latents:
    """Latents without a distribution, (b, c, h, w), where a `DiagonalGaussian` could stand."""

    mean: Tensor

    @property
    def std(self) -> Tensor:
        """Zeros: there is no spread around the latents."""
        return torch.zeros_like(self.mean)

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """The latents themselves; nothing is drawn of `generator`."""
        return self.mean

    def mode(self) -> Tensor:
        """The latents themselves."""
        return self.mean


@dataclass(frozen=True)
class Quantised:
    """Latents through a codebook, for training.

    straight: (b, c, h, w) entries, whose gradient goes to the latents as if there were no codebook. indices:
    (b, h, w). codebook: scalar that draws entries to latents; commitment: latents to entries.
    """

    straight: Tensor
    indices: Tensor
    codebook: Tensor
    commitment: Tensor


class VectorQuantizer(nn.Module):
    """A codebook: every position of a latent is replaced by the nearest entry (van den Oord et al. 2017)."""

    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)  # taming's VectorQuantizer2

    def indices(self, z: Tensor) -> Tensor:
        """(b, embed_dim, h, w) -> (b, h, w) long: the entry at the smallest Euclidean distance."""
        # In float32 at least, as neighbouring entries are close, and without |z|^2, which all entries share.
        dtype = torch.promote_types(z.dtype, torch.float32)
        codes = self.embedding.weight.to(dtype)
        norms = codes.square().sum(dim=1)
        places = z.to(dtype).movedim(1, -1).flatten(0, -2)  # (b * h * w, embed_dim)
        nearest = [
            torch.addmm(norms, some, codes.T, alpha=-2).argmin(dim=1)
            for some in places.split(max(1, SCORES // len(codes)))
        ]
        return torch.cat(nearest).unflatten(0, (z.shape[0], *z.shape[2:]))

    def lookup(self, indices: Tensor) -> Tensor:
        """(b, h, w) long -> (b, embed_dim, h, w)."""
        return self.embedding(indices).movedim(-1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """(b, embed_dim, h, w) -> the same shape, all of it from the codebook."""
        return self.lookup(self.indices(z))

    def train_step(self, z: Tensor) -> Quantised:
        """(b, embed_dim, h, w) -> what is decoded in training, and the losses that tie latents and entries.

        Van den Oord et al. 2017, eq. 3. Taming's first release had beta on the other of its two losses.
        """
        z = z.float()
        indices = self.indices(z.detach())
        chosen = self.lookup(indices)
        codebook = (chosen - z.detach()).square().mean()
        commitment = (z - chosen.detach()).square().mean()
        return Quantised(z + (chosen - z).detach(), indices, codebook, commitment)


class VQModel(nn.Module):
    """Pictures to latents and back through a codebook; state-dict names are LDM's.

    Diffusion sees the latents before the codebook, and `decode` quantises (LDM's `VQModelInterface`).
    Raises InputError for a config without n_embed.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        if config.n_embed is None:
            raise InputError(
                "VQModel needs n_embed, the number of its codebook's entries.", "AutoencoderKL has none."
            )
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config.n_embed, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def downsampling(self) -> int:
        """Side of the picture over side of the latent."""
        return self.config.downsampling

    def encode(self, x: Tensor) -> Latents:
        """(b, in_channels, H, W) in -1..1 -> latents (b, embed_dim, H / f, W / f), not quantised."""
        return Latents(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor, *, quantise: bool = True) -> Tensor:
        """(b, embed_dim, h, w) -> (b, out_ch, f * h, f * w), about -1..1 and not clamped.

        quantise: first replace every position by its nearest entry; False for latents that are entries.
        """
        return self.decoder(self.post_quant_conv(self.quantize(z) if quantise else z))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """(b, h, w) long, each below n_embed -> (b, out_ch, f * h, f * w)."""
        return self.decode(self.quantize.lookup(indices), quantise=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Latents]:
        """Encode and decode: the reconstruction, and the latents before the codebook."""
        latents = self.encode(x)
        return self.decode(latents.mode()), latents
