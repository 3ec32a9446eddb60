"""The original's `PLMSSampler` (Liu et al. 2022) around this package's sampler."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.compat.ddim import DDIMSampler, Drawn
from sfumato.compat.diffusion import Condition, join
from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import Predictor
from sfumato.diffusion.samplers import sampler
from sfumato.errors import InputError


class PLMSSampler(DDIMSampler):
    """PLMS over a `LatentDiffusion`, on DDIM's timesteps; samples are in the network's coordinates."""

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
        """As `DDIMSampler.sample`; `InputError` for a mask, and for an eta other than 0 as there."""
        if eta != 0:
            raise InputError(f"ddim_eta is {eta}; PLMS has no noise of its own", "Use DDIMSampler.")
        if mask is not None:
            raise InputError("PLMS keeps no part of a picture here", "Use DDIMSampler with a mask.")
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        device, schedule = self.model.device, self.model.schedule
        x = torch.randn((batch_size, *shape), device=device) if x_T is None else x_T.to(device)
        sigmas = [schedule.sigma(int(t)) for t in self.ddim_timesteps[::-1]] + [schedule.sigma_min]
        predict = self._predictor(conditioning, unconditional_guidance_scale, unconditional_conditioning)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            denoised = predict(x, sigma, Conditioning())
            return self.model.quantize_first_stage(denoised) if quantize_x0 else denoised

        def no_noise(sigma: float, target: float) -> Tensor:
            raise AssertionError("PLMS draws no noise")

        drawn: Drawn = {"x_inter": [x], "pred_x0": [x]}
        total = len(self.ddim_timesteps)
        start = x * math.sqrt(1 + sigmas[0] ** 2)  # to the samplers' coordinates, and back below
        for step in sampler("plms")(denoise, start, sigmas, no_noise):
            x = step.x / math.sqrt(1 + step.target**2)
            if callback is not None:
                callback(step.index)
            if img_callback is not None:
                img_callback(step.denoised, step.index)
            left = total - 1 - step.index
            if left % log_every_t == 0 or step.index == 0:
                drawn["x_inter"].append(x)
                drawn["pred_x0"].append(step.denoised)
        return x, drawn

    def _predictor(self, c: Condition, scale: float, uncond: Condition) -> Predictor:
        def network(x: Tensor, t: Tensor, _: Conditioning) -> Tensor:
            t = t.round().long()
            if uncond is None or scale == 1.0:
                return self.model.apply_model(x, t, c)
            both = self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), join(uncond, c))
            without, given = both.chunk(2)
            return without + scale * (given - without)

        return Predictor(network, self.model.schedule, self.model.parameterization)
