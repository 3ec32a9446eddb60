"""The convolutional autoencoder with a KL-regularised latent space (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import InputError, nearest
from sfumato.nn.layers import pointwise, to_picture, to_tokens

AttentionType = Literal["vanilla", "linear", "none"]
ATTENTION_TYPES = ("vanilla", "linear", "none")
COUNTS = (
    "z_channels",
    "resolution",
    "in_channels",
    "out_ch",
    "ch",
    "num_res_blocks",
    "embed_dim",
    "num_groups",
)
LOGVAR_RANGE = (-30.0, 20.0)  # the released models were trained with this clamp


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder, in the option names of LDM's `ddconfig`; the defaults are Stable Diffusion's.

    resolution: side in pixels that attn_resolutions counts from; any other size runs as well. ch *
    ch_mult[i]: channels of level i, each level but the last halving the sides. attn_resolutions: sides at
    which attention follows every residual block; the middle always has one. resamp_with_conv: learned
    resampling instead of pooling. double_z: the encoder yields mean and log-variance. give_pre_end: the
    decoder stops before its last norm and convolution. embed_dim: channels of the latent. num_groups: groups
    of every normalisation (32 in all released models). n_embed: entries of a codebook that latents are
    replaced by (`nn.vq.VQModel`, double_z False); None for a Gaussian over latents (`AutoencoderKL`).
    Raises InputError for values that do not fit together.
    """

    z_channels: int = 4
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    double_z: bool = True
    resamp_with_conv: bool = True
    attn_type: AttentionType = "vanilla"
    tanh_out: bool = False
    give_pre_end: bool = False
    embed_dim: int = 4
    num_groups: int = 32
    n_embed: int | None = None

    def __post_init__(self) -> None:
        # Lists, as JSON and TOML give them, would make equal configs unequal and unhashable.
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        object.__setattr__(self, "attn_resolutions", tuple(self.attn_resolutions))
        if self.attn_type not in ATTENTION_TYPES:
            raise InputError(f"attn_type is {self.attn_type!r}.", nearest(self.attn_type, ATTENTION_TYPES))
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.n_embed is not None and (self.n_embed < 1 or self.double_z):
            raise InputError(
                f"n_embed is {self.n_embed} with double_z = {self.double_z}.",
                "A codebook has at least one entry and goes with double_z = False; or leave n_embed out.",
            )
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise InputError(f"ch_mult is {self.ch_mult}; it needs one factor >= 1 for every level.")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout is {self.dropout}; it must be in [0, 1).")
        for width in (self.ch, *(self.ch * factor for factor in self.ch_mult)):
            if width % self.num_groups:
                raise InputError(
                    f"A level has {width} channels, which num_groups = {self.num_groups} does not divide.",
                    "Choose ch as a multiple of num_groups, or a smaller num_groups.",
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, from the picture's resolution down."""
        return tuple(self.ch * factor for factor in self.ch_mult)

    @property
    def downsampling(self) -> int:
        """Side of the picture over side of the latent."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class DiagonalGaussian:
    """A Gaussian with independent components: mean and logvar, both (b, c, h, w)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Split (b, 2c, h, w) into mean and log-variance, the latter clamped to -30..20."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    @property
    def std(self) -> Tensor:
        """Standard deviation, (b, c, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """One draw, (b, c, h, w), of `generator` (on its own device) or, with None, of torch's global one."""
        device = self.mean.device if generator is None else generator.device
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=dtype)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The most likely value, (b, c, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence KL(self || N(0, I)) in nats, (b,): summed over c, h and w, in float32 at least."""
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def normalization(channels: int, num_groups: int) -> nn.GroupNorm:
    """The group normalisation of LDM's autoencoders, whose epsilon is not torch's default."""
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


class Downsample(nn.Module):
    """Halve both sides: a strided convolution padded at right and bottom only, or the mean of 2x2 pixels."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if with_conv else nn.Identity()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h // 2, w // 2)."""
        return self.conv(self.pad(x))


class Upsample(nn.Module):
    """Double both sides by repeating pixels, then smooth with a convolution where one is wanted."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut (Ho et al. 2020, without the time embedding)."""

    def __init__(self, in_channels: int, out_channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.norm1 = normalization(in_channels, config.num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalization(out_channels, config.num_groups)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, out_channels, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all pixels, added to its input (Wang et al. 2018)."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = normalization(channels, num_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        tokens = to_tokens(self.norm(x))
        q, k, v = (pointwise(layer, tokens).unsqueeze(1) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (b, h * w, c)
        return x + to_picture(pointwise(self.proj_out, attended), x)


class LinearAttention(nn.Module):
    """Attention linear in the number of pixels (Shen et al. 2018), in LDM's form: no norm and no shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        q, k, v = self.to_qkv(x).flatten(2).chunk(3, dim=1)  # each (b, c, h * w)
        context = k.softmax(dim=-1) @ v.mT  # (b, c of k, c of v)
        return self.to_out((context.mT @ q).unflatten(2, x.shape[2:]))


def attention(channels: int, config: AutoencoderConfig) -> nn.Module:
    """The attention layer of the kind that the config names."""
    if config.attn_type == "vanilla":
        return Attention(channels, config.num_groups)
    return LinearAttention(channels) if config.attn_type == "linear" else nn.Identity()


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by its attention; LDM's `down.i` and `up.i`."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attend: bool, config: AutoencoderConfig
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(width, out_channels, config) for width in inputs)
        self.attn = nn.ModuleList(
            attention(out_channels, config) if attend else nn.Identity() for _ in range(num_blocks)
        )

    def forward(self, h: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, out_channels, h, w)."""
        for block, attn in zip(self.block, self.attn, strict=True):
            h = attn(block(h))
        return h


class DownLevel(Level):
    """A level of the encoder; all but the last end by halving the sides."""

    def __init__(
        self, in_channels: int, out_channels: int, attend: bool, last: bool, config: AutoencoderConfig
    ) -> None:
        super().__init__(in_channels, out_channels, config.num_res_blocks, attend, config)
        self.downsample = nn.Identity() if last else Downsample(out_channels, config.resamp_with_conv)

    def forward(self, h: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, out_channels, h // 2, w // 2), or the same sides for the last one."""
        return self.downsample(super().forward(h))


class UpLevel(Level):
    """A level of the decoder, a block more than the encoder's; all but the last end by doubling the sides."""

    def __init__(
        self, in_channels: int, out_channels: int, attend: bool, last: bool, config: AutoencoderConfig
    ) -> None:
        super().__init__(in_channels, out_channels, config.num_res_blocks + 1, attend, config)
        self.upsample = nn.Identity() if last else Upsample(out_channels, config.resamp_with_conv)

    def forward(self, h: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, out_channels, 2h, 2w), or the same sides for the last one."""
        return self.upsample(super().forward(h))


class Middle(nn.Module):
    """The lowest resolution: block, attention, block; LDM's `mid`."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config)
        self.attn_1 = attention(channels, config)
        self.block_2 = ResnetBlock(channels, channels, config)

    def forward(self, h: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Picture to moments of the latent, before `quant_conv`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        resolution = config.resolution
        for index, (in_channels, width) in enumerate(pairwise((config.ch, *widths))):
            attend, last = resolution in config.attn_resolutions, index == len(widths) - 1
            self.down.append(DownLevel(in_channels, width, attend, last, config))
            resolution //= 2
        self.mid = Middle(widths[-1], config)
        self.norm_out = normalization(widths[-1], config.num_groups)
        self.conv_out = nn.Conv2d(widths[-1], (2 if config.double_z else 1) * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, H, W) -> (b, 2 * z_channels, H / f, W / f); z_channels without double_z."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent, after `post_quant_conv`, to picture."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        levels: list[nn.Module] = []
        # Counted up from the lowest, which differs from the encoder's where f does not divide the resolution.
        resolution = config.resolution // config.downsampling
        in_channels = widths[-1]
        for index, width in reversed(list(enumerate(widths))):
            attend = resolution in config.attn_resolutions
            levels.append(UpLevel(in_channels, width, attend, index == 0, config))
            in_channels, resolution = width, resolution * 2
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the picture's resolution
        self.norm_out = normalization(widths[0], config.num_groups)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)
        self.activation = nn.Tanh() if config.tanh_out else nn.Identity()
        self.give_pre_end = config.give_pre_end

    def forward(self, z: Tensor) -> Tensor:
        """(b, z_channels, h, w) -> (b, out_ch, f * h, f * w); ch * ch_mult[0] channels with give_pre_end."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        if self.give_pre_end:
            return h
        return self.activation(self.conv_out(F.silu(self.norm_out(h))))


class AutoencoderKL(nn.Module):
    """Pictures to a Gaussian over latents, and latents to pictures; state-dict names are LDM's.

    Latents are as the network makes them; the factor that scales them to unit variance is the model's, not
    its. Raises InputError for a config without double_z, which leaves no log-variance.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        if not config.double_z:
            raise InputError("AutoencoderKL needs double_z = True: its encoder yields mean and log-variance.")
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def downsampling(self) -> int:
        """Side of the picture over side of the latent."""
        return self.config.downsampling

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """(b, in_channels, H, W) in -1..1 -> a Gaussian over (b, embed_dim, H / f, W / f)."""
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """(b, embed_dim, h, w) -> (b, out_ch, f * h, f * w), about -1..1 and not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Encode, draw one latent and decode it: the reconstruction and the posterior it was drawn from."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator)), posterior
