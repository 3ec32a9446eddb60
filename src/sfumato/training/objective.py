"""What a denoiser is trained for: the noise and timestep of every sample, the loss and its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.diffusion.prediction import paired
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import InputError
from sfumato.training.data import Position
from sfumato.training.settings_diffusion import ObjectiveConfig

BINS = 4  # ranges of timesteps scored apart
MOST_SIGNAL = 0.1  # of the amplitude of a picture at the last timestep; SD 1 keeps 0.068, DDPM 0.006


class Drawn(NamedTuple):
    """The chance in a sample (c, h, w) and its timestep (), or in a batch (b, c, h, w) and (b,) long.

    noise: what the network is asked for. shown: what it is shown, which input perturbation makes another.
    """

    noise: Tensor
    shown: Tensor
    t: Tensor

    def to(self, device: torch.device) -> Drawn:
        """The noise on a device; the timesteps stay where the schedule is, on the CPU."""
        noise = self.noise.to(device)
        return Drawn(noise, noise if self.shown is self.noise else self.shown.to(device), self.t)


def check(config: ObjectiveConfig, schedule: Schedule) -> None:
    """`InputError` for a prediction that the schedule cannot have, and for timesteps that it lacks."""
    paired(config.prediction, schedule)
    last = schedule.num_timesteps - 1
    if config.timestep_range is not None and not 0 <= config.timestep_range[0] <= config.timestep_range[1]:
        raise InputError(
            f"timestep_range is {list(config.timestep_range)}; its first is at least 0, its last not smaller",
            f"The timesteps are 0 to {last}.",
        )
    if config.timestep_range is not None and config.timestep_range[1] > last:
        raise InputError(
            f"timestep_range is {list(config.timestep_range)}; the schedule ends at {last}",
            "Make the last smaller.",
        )


def schedule_warning(schedule: Schedule) -> str | None:
    """What is wrong with a schedule that ends before the noise drowns the picture, and what helps.

    Drawing starts from noise alone, a state that such training never shows (Lin et al. 2024, section 3).
    """
    signal = math.sqrt(float(schedule.alphas_cumprod[-1]))
    if signal <= MOST_SIGNAL:
        return None
    config = schedule.config
    remedies = ["schedule.zero_terminal_snr = true with prediction v or x0"]
    scale = 1000 / config.num_timesteps  # guided-diffusion: betas are for 1000 steps
    if config.kind == "linear" and scale > 1 and config.beta_end * scale < 1:
        remedies.append(f"schedule.beta_end = {config.beta_end * scale:g}")
    if config.num_timesteps < 1000 and config.kind not in ("betas", "cosine"):
        remedies.append("schedule.num_timesteps = 1000")
    return (
        f"the last timestep keeps {signal:.0%} of a picture's amplitude, and drawing starts from none: what "
        f"is drawn will be pale and of middling brightness. One key helps: {', or '.join(remedies)}"
    )


def weighting_warning(config: ObjectiveConfig, schedule: Schedule) -> str | None:
    """What is wrong with a weighting beside a schedule that ends in noise alone, and what helps.

    Each vanishes with the SNR (see `weights`), so what zero_terminal_snr is for would not be learned.
    """
    last = schedule.num_timesteps - 1
    trained = config.timestep_range is None or config.timestep_range[1] == last
    if config.weighting == "none" or not schedule.config.zero_terminal_snr or not trained:
        return None
    return (
        f"diffusion.weighting is {config.weighting!r}, which gives the last timestep no weight: where drawing"
        " starts nothing is learned, so schedule.zero_terminal_snr does not make dark and light pictures. "
        'One key helps: diffusion.weighting = "none"'
    )


def warnings(config: ObjectiveConfig, schedule: Schedule) -> tuple[str, ...]:
    """What will go wrong with a recipe that is trained as asked."""
    found = (schedule_warning(schedule), weighting_warning(config, schedule))
    return tuple(text for text in found if text is not None)


def drawn(
    config: ObjectiveConfig,
    schedule: Schedule,
    position: Position,
    shape: Sequence[int],
    purpose: str = "diffusion",
) -> Drawn:
    """The noise (c, h, w) and timestep () of one sample, a function of its position alone."""
    generator = position.generator(purpose)
    noise = torch.randn(tuple(shape), generator=generator)
    t = _timestep(config, schedule, generator)
    if config.offset_noise:  # Guttenberg 2023
        each = torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator)
        noise = noise + config.offset_noise * each
    shown = noise
    if config.input_perturbation:
        shown = noise + config.input_perturbation * torch.randn(tuple(shape), generator=generator)
    return Drawn(noise, shown, t)


def drawn_batch(
    config: ObjectiveConfig, schedule: Schedule, positions: Sequence[Position], shape: Sequence[int]
) -> Drawn:
    """`drawn` of every position, stacked."""
    samples = [drawn(config, schedule, position, shape) for position in positions]
    noise = torch.stack([sample.noise for sample in samples])
    same = not config.input_perturbation
    shown = noise if same else torch.stack([sample.shown for sample in samples])
    return Drawn(noise, shown, torch.stack([sample.t for sample in samples]))


def noised(schedule: Schedule, clean: Tensor, chance: Drawn) -> Tensor:
    """What the network is shown of the clean samples (b, c, h, w)."""
    return schedule.add_noise(clean, chance.shown, chance.t)


def errors(config: ObjectiveConfig, schedule: Schedule, raw: Tensor, clean: Tensor, chance: Drawn) -> Tensor:
    """How far the network's answer `raw` (b, c, h, w) is from its target: (b,) float32, without weights."""
    alpha, sigma = schedule.alpha_sigma(chance.t, clean)
    target = paired(config.prediction, schedule).target(clean, chance.noise, alpha, sigma)
    difference = raw.float() - target
    if config.loss == "l1":
        error = difference.abs()
    elif config.loss == "l2":
        error = difference.square()
    else:
        delta = _deltas(config, schedule, chance.t).to(raw.device).reshape(-1, *[1] * (raw.ndim - 1))
        error = 2 * delta * ((difference.square() + delta.square()).sqrt() - delta)
    return error.flatten(1).mean(dim=1)


def held_out_scores(errors: Tensor, t: Tensor, schedule: Schedule) -> dict[str, float]:
    """The mean of held-out errors (n,) at timesteps (n,), over all of them and in ranges of them."""
    errors, part = errors.cpu(), t.cpu() * BINS // schedule.num_timesteps
    by_time = {f"held_out_loss_{each}": float(errors[part == each].mean()) for each in part.unique().tolist()}
    return {"held_out_loss": float(errors.mean()), **by_time}


def weights(config: ObjectiveConfig, schedule: Schedule, t: Tensor) -> Tensor:
    """The weight of each timestep's error, (b,) float32 on the CPU.

    Each weighting is one of the error of x0, of which the error of eps is SNR and that of v SNR + 1 times as
    large (Salimans and Ho 2022, section 4): so a weighting means the same whatever is predicted.
    """
    abar = schedule.alphas_cumprod[t.cpu()]
    snr = abar / (1 - abar)
    if config.weighting == "none":
        return torch.ones(len(t))
    if config.weighting == "min_snr":
        on_x0 = snr.clamp(max=config.min_snr_gamma)
    elif config.weighting == "p2":
        on_x0 = snr / (config.p2_k + snr) ** config.p2_gamma
    else:
        on_x0 = snr.sqrt()  # Yu et al. 2024: 1 / sqrt(SNR) of the error of eps
    scale = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[config.prediction]
    return (on_x0 / scale).float()


def losses(config: ObjectiveConfig, schedule: Schedule, raw: Tensor, clean: Tensor, chance: Drawn) -> Tensor:
    """The loss of every sample, (b,) float32: `errors` times `weights`."""
    weight = weights(config, schedule, chance.t)
    return errors(config, schedule, raw, clean, chance) * weight.to(raw.device)


def _timestep(config: ObjectiveConfig, schedule: Schedule, generator: torch.Generator) -> Tensor:
    first, last = config.timestep_range or (0, schedule.num_timesteps - 1)
    count = last - first + 1
    if config.timesteps == "uniform":
        return first + torch.randint(count, (), generator=generator)
    # Esser et al. 2024, eq. 19
    share = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn((), generator=generator))
    return first + (share * count).long().clamp(max=count - 1)


def _deltas(config: ObjectiveConfig, schedule: Schedule, t: Tensor) -> Tensor:
    """Huber's delta at each timestep, (b,) float32."""
    least, t = config.huber_delta, t.cpu()
    if config.huber_schedule == "constant":
        return torch.full(t.shape, least)
    if config.huber_schedule == "exponential":
        return (math.log(least) * t / schedule.num_timesteps).exp()
    return ((1 - least) / (1 + schedule.sigmas[t]) ** 2 + least).float()
