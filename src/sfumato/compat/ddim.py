"""The original's `DDIMSampler` (Song et al. 2021) around this package's sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.compat.diffusion import Condition, LatentDiffusion, join
from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import Predictor
from sfumato.diffusion.samplers import sampler
from sfumato.errors import InputError, nearest

Drawn = dict[str, list[Tensor]]


def make_ddim_timesteps(method: str, steps: int, num_timesteps: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Timesteps of the original's DDIM, ascending; "uniform" has more than `steps` where they do not divide.

    A timestep past the schedule is left out; with it the original ends in an IndexError (36 steps of 1000).
    `InputError` for another method and for steps outside 1 ... num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise InputError(f"steps is {steps}; allowed is 1 to {num_timesteps}")
    if method == "uniform":
        found = np.arange(0, num_timesteps, num_timesteps // steps)
    elif method == "quad":
        found = (np.linspace(0, math.sqrt(num_timesteps * 0.8), steps) ** 2).astype(np.int64)
    else:
        raise InputError(f"there is no discretization {method!r}", nearest(method, ("uniform", "quad")))
    return np.unique(found[found + 1 < num_timesteps] + 1)


class DDIMSampler:
    """DDIM over a `LatentDiffusion`; samples are in the network's coordinates, as the original's.

    Noise is drawn from torch's global generator, as many values as the original draws, so that
    `torch.manual_seed` gives the original's pictures.
    """

    def __init__(self, model: LatentDiffusion, schedule: str = "linear") -> None:
        self.model = model
        self.schedule = schedule
        self.ddpm_num_timesteps = model.num_timesteps

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Choose the timesteps; `verbose` is taken and ignored, this package does not print."""
        self.ddim_timesteps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, self.ddpm_num_timesteps)
        self.ddim_eta = ddim_eta
        abar = self.model.schedule.alphas_cumprod
        here = torch.from_numpy(self.ddim_timesteps)
        alphas, previous = abar[here], abar[torch.cat([here.new_zeros(1), here[:-1]])]
        sigmas = ddim_eta * ((1 - previous) / (1 - alphas) * (1 - alphas / previous)).sqrt()
        device = self.model.device
        self.ddim_alphas = alphas.float().to(device)
        self.ddim_alphas_prev = previous.float().to(device)
        self.ddim_sqrt_one_minus_alphas = (1 - alphas).sqrt().float().to(device)
        self.ddim_sigmas = sigmas.float().to(device)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: tuple[int, ...] | list[int],
        conditioning: Condition = None,
        callback: Callable[[int], object] | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
    ) -> tuple[Tensor, Drawn]:
        """`batch_size` samples of `shape` (c, h, w) in S steps, and what it looked like on the way.

        conditioning: what `apply_model` takes. mask and x0: where mask is 1, x0 is kept. x_T: start noise
        (batch_size, *shape). The other result holds "x_inter" and "pred_x0" at every `log_every_t`-th step.
        Errors as `make_ddim_timesteps` and `apply_model`.
        """
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        device = self.model.device
        x = torch.randn((batch_size, *shape), device=device) if x_T is None else x_T.to(device)
        drawn: Drawn = {"x_inter": [x], "pred_x0": [x]}
        total = len(self.ddim_timesteps)
        for count, index in enumerate(reversed(range(total))):
            t = self._timesteps(index, batch_size, use_original_steps=False)
            if mask is not None:
                if x0 is None:
                    raise InputError("a mask was given without x0", "Give the latents to keep as x0.")
                x = self.model.q_sample(x0, t) * mask + (1.0 - mask) * x
            x, denoised = self.p_sample_ddim(
                x,
                conditioning,
                t,
                index,
                quantize_denoised=quantize_x0,
                temperature=temperature,
                noise_dropout=noise_dropout,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
            if callback is not None:
                callback(count)
            if img_callback is not None:
                img_callback(denoised, count)
            if index % log_every_t == 0 or index == total - 1:
                drawn["x_inter"].append(x)
                drawn["pred_x0"].append(denoised)
        return x, drawn

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
    ) -> tuple[Tensor, Tensor]:
        """One step from timestep t, (b,) long, number `index` from the end of the run: x and x0, like x."""
        sigma, target = self._levels(index, use_original_steps)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # Drawn without eta too, as the original does: later pictures of one seed depend on it.
        noise = torch.randn((1, *x.shape[1:]) if repeat_noise else x.shape, device=x.device)
        noise = F.dropout(noise.expand(x.shape).to(x.dtype) * temperature, p=noise_dropout)
        scale, uncond = unconditional_guidance_scale, unconditional_conditioning

        def network(x: Tensor, _: Tensor, __: Conditioning) -> Tensor:
            if uncond is None or scale == 1.0:
                return self.model.apply_model(x, t, c)
            both = self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), join(uncond, c))
            without, given = both.chunk(2)
            return without + scale * (given - without)

        predict = Predictor(network, self.model.schedule, self.model.parameterization)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            denoised = predict(x, sigma, Conditioning())
            return self.model.quantize_first_stage(denoised) if quantize_denoised else denoised

        start = x * math.sqrt(1 + sigma**2)  # to the samplers' coordinates, and back below
        (step,) = sampler("ddim")(denoise, start, (sigma, target), lambda *_: noise, eta=self.ddim_eta)
        return step.x / math.sqrt(1 + target**2), step.denoised

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x0 noised to step t, (b,) long, of the run, counted from its end; `InputError` past its start.

        use_original_steps: t counts the schedule's timesteps instead.
        """
        total = self.ddpm_num_timesteps if use_original_steps else len(self.ddim_timesteps)
        if int(t.max()) >= total:
            raise InputError(f"step {int(t.max())} was asked for; the run has steps 0 to {total - 1}")
        steps = t if use_original_steps else torch.from_numpy(self.ddim_timesteps).to(t.device)[t]
        return self.model.q_sample(x0, steps, noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Condition,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        use_original_steps: bool = False,
    ) -> Tensor:
        """The last `t_start` steps of the run, from x_latent as `stochastic_encode` gives it."""
        total = self.ddpm_num_timesteps if use_original_steps else len(self.ddim_timesteps)
        x = x_latent
        for index in reversed(range(min(t_start, total))):
            x, _ = self.p_sample_ddim(
                x,
                cond,
                self._timesteps(index, x.shape[0], use_original_steps),
                index,
                use_original_steps=use_original_steps,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
        return x

    def _timesteps(self, index: int, batch_size: int, use_original_steps: bool) -> Tensor:
        t = index if use_original_steps else int(self.ddim_timesteps[index])
        return torch.full((batch_size,), t, device=self.model.device, dtype=torch.long)

    def _levels(self, index: int, use_original_steps: bool) -> tuple[float, float]:
        """Noise levels of a step and of the next: a run ends at timestep 0, the original steps at none."""
        schedule = self.model.schedule
        if use_original_steps:
            return schedule.sigma(index), schedule.sigma(index - 1) if index > 0 else 0.0
        previous = int(self.ddim_timesteps[index - 1]) if index > 0 else 0
        return schedule.sigma(int(self.ddim_timesteps[index])), schedule.sigma(previous)
