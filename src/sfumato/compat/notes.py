"""The class names of the study notes' own small Stable Diffusion (Unet.py, Attention.py, DiffusionModel.py).

The layers have the original's constructors, `UNetModel` the keys of the notes' configuration file, and
`Diffusion` and `Sampling` are algorithms 1 and 2 of Ho et al. 2020 with T = 200 and a plain linear schedule.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.compat import networks
from sfumato.compat.blocks import (
    BasicTransformerBlock,
    CrossAttention,
    Downsample,
    ResBlock,
    SpatialTransformer,
    TimestepBlock,
    Upsample,
)
from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import Predictor
from sfumato.diffusion.samplers import Step, sampler
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import trailing
from sfumato.errors import InputError

__all__ = [
    "BasicTransformerBlock",
    "CrossAttention",
    "Diffusion",
    "Diffusion_init",
    "Downsample",
    "ResBlock",
    "Sampling",
    "SpatialTransformer",
    "TimestepBlock",
    "UNetModel",
    "Upsample",
]

LEFT_OVER = 0.1  # of the picture's amplitude at the last timestep; Stable Diffusion 1 leaves 0.068


class UNetModel(networks.UNetModel):
    """The U-Net by the keys of the notes' configuration: residual blocks with spatial transformers.

    channel: of the input. n_embed: channels of the output (in the original a codebook's size); it equals
    channel where noise is predicted. context_dim None makes the transformers self-attention. num_classes
    0 or None is unconditional. attention_resolutions: downsampling factors. Errors as `UNetConfig`.
    """

    def __init__(
        self,
        channel: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        n_embed: int = 1,
        num_groups: int = 32,
    ) -> None:
        super().__init__(
            image_size=None,
            in_channels=channel,
            model_channels=model_channels,
            out_channels=n_embed,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            channel_mult=channel_mult,
            conv_resample=conv_resample,
            dims=dims,
            num_classes=num_classes,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_spatial_transformer=True,
            transformer_depth=transformer_depth,
            context_dim=context_dim,
            num_groups=num_groups,
        )


class Diffusion_init:
    """A network that predicts noise, model(x_t, t, context), and a schedule linear in beta.

    betas, alphas, alphas_bar, sqrt_alphas_bar, sqrt_one_minus_alphas_bar: (timesteps,) float32; t counts
    from 0. noise_info: mean and standard deviation of the noise; the formulas hold for (0, 1), and
    `InputError` says so for others. Errors as `Schedule`.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        timesteps: int = 200,
        beta_range: Sequence[float] = (1e-4, 0.02),
        noise_info: Sequence[float] = (0, 1),
    ) -> None:
        if tuple(noise_info) != (0, 1):
            raise InputError(
                f"noise_info is {list(noise_info)}; x_t = sqrt(abar) x_0 + sqrt(1 - abar) z needs [0, 1]",
                "Leave it: mean 0 and standard deviation 1.",
            )
        start, end = beta_range
        self.model = model
        self.schedule = Schedule(
            ScheduleConfig(kind="linear", num_timesteps=timesteps, beta_start=start, beta_end=end)
        )
        self.timesteps = timesteps
        abar = self.schedule.alphas_cumprod
        self.betas, self.alphas = self.schedule.betas.float(), self.schedule.alphas.float()
        self.alphas_bar, self.sqrt_alphas_bar = abar.float(), abar.sqrt().float()
        self.sqrt_one_minus_alphas_bar = (1 - abar).sqrt().float()


class Diffusion(Diffusion_init):
    """Algorithm 1: the loss of one training step."""

    def add_noise(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; t: (b,) long in 0 ... timesteps - 1."""
        return self.schedule.add_noise(x_0, noise, t)

    def __call__(
        self, x_0: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared error of the predicted noise, at timesteps and noise drawn by `generator`.

        x_0: (b, ...). Timestep 0 is trained as well, which sampling visits.
        """
        device = x_0.device if generator is None else generator.device
        t = torch.randint(0, self.timesteps, (len(x_0),), generator=generator, device=device)
        noise = torch.randn(x_0.shape, generator=generator, device=device).to(x_0)
        t = t.to(x_0.device)
        return F.mse_loss(self.model(self.add_noise(x_0, t, noise), t, context), noise)


class Sampling(Diffusion_init):
    """Algorithm 2: from noise to samples, in `timesteps` steps.

    Warns where the schedule leaves more than a tenth of the picture in the last timestep, as T = 200 with
    betas up to 0.02 does (36 %): samples then drift to a mean brightness.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        timesteps: int = 200,
        beta_range: Sequence[float] = (1e-4, 0.02),
        noise_info: Sequence[float] = (0, 1),
    ) -> None:
        super().__init__(model, timesteps, beta_range, noise_info)
        left = float(self.sqrt_alphas_bar[-1])
        if left > LEFT_OVER:
            warnings.warn(
                f"training's last timestep still shows {left:.0%} of the picture, sampling starts from noise "
                f"alone; scale beta_range by {1000 / timesteps:g}, or use more timesteps",
                stacklevel=2,
            )

    def __call__(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Samples of `shape` (b, ...), from noise that `generator` draws."""
        *_, last = self.steps(shape, context, generator, device)
        return last.x

    def steps(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[Step]:
        """The same, step by step; `Step.x` is x_t / sqrt(abar_t)."""
        source = torch.device(device) if generator is None else generator.device

        def draw(*_: float) -> Tensor:
            return torch.randn(tuple(shape), generator=generator, device=source).to(device)

        def network(x: Tensor, t: Tensor, _: Conditioning) -> Tensor:
            return self.model(x, t.round().long(), context)

        predict = Predictor(network, self.schedule, "eps")
        plan = trailing(self.schedule, self.timesteps)
        start = draw() * plan.start_scale

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return predict(x, sigma, Conditioning())

        return sampler("ddpm")(denoise, start, plan.sigmas, draw, variance="large")
