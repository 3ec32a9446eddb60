"""What is wrong with a model, found by asking its networks: prediction, schedule, scale, weights.

For data of unit variance the best predictions are linear on the average, so the regression of a network's
answer on its input tells what it predicts. With x = alpha x0 + sigma eps, E[eps | x] = sigma x,
E[x0 | x] = alpha x, and E[v | x] = 0: where noise is all there is, eps answers with its input, x0 with
nothing; where there is none, x0 answers with its input, eps with nothing; v answers with nothing at both.

A network is best at the schedule and the scale that it was trained with, so others are tried for both: in all
a few dozen evaluations of eight samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import PREDICTIONS
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError
from sfumato.model import StableDiffusion

Raw = Callable[[Tensor, Tensor], Tensor]
"""A network under a condition: x (b, c, ...) in variance-preserving coordinates, t (b,) -> its answer."""

# What is predicted -> the regression of the answer on the input at the last timestep, and at the first.
GAINS: Mapping[str, tuple[float, float]] = {
    "eps": (1, 0),
    "x0": (0, 1),
    "v": (0, 0),
    "flow (eps - x0)": (1, -1),
}
SCHEDULES: Mapping[str, ScheduleConfig] = {
    "Stable Diffusion's (linear in sqrt(beta), 0.00085 to 0.012)": ScheduleConfig(),
    "LDM's zoo (linear in sqrt(beta), 0.0015 to 0.0195)": ScheduleConfig(beta_start=0.0015, beta_end=0.0195),
    "DDPM's (linear in beta, 0.0001 to 0.02)": ScheduleConfig("linear", beta_start=1e-4, beta_end=0.02),
    "the squared cosine": ScheduleConfig("cosine"),
    "Stable Diffusion's with zero terminal SNR": ScheduleConfig(zero_terminal_snr=True),
}
LEFT = 0.1  # of the signal's amplitude at the last timestep, which sampling starts without
LEVELS = (0.3, 0.6, 1.2, 2.4, 4.8)  # noise levels at which schedules are told apart
# The error of another schedule or scale, as a share of the own one's, from which on it is named.
BETTER = 0.97
PLAIN = 0.9  # and that of another scale where the pictures may be unlike those that the model knows
DOUBT = 0.985  # and that from which on another scale is mentioned: own ones are 1 % better than any, or more
STEPS = (0.7, 1.4)  # of the scales that are tried, as long as they get better, to MOST of them each way
MOST = 3
DEVIATION = (0.5, 2.0)  # of scaled latents; that of drawings differs from photographs', so this is wide
PIXEL_DEVIATION = (0.2, 2.0)  # of pictures
SAMPLES = 8

CLEAR = 0.5  # of the second best guess's distance, below which the best is believed

Level = Literal["good", "note", "fault"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and what to do about it where something is wrong."""

    level: Level
    found: str
    remedy: str = ""


def examine(model: StableDiffusion, pictures: Tensor | None = None) -> Iterator[Finding]:
    """Everything that can be said of a model, computed as it is iterated: about forty small evaluations.

    pictures: (b, c, h, w) in -1..1 of its domain; without, simple drawings are taken. Raises `InputError` for
    models that draw no pictures.
    """
    if len(model.image_size) != 2:
        raise InputError(f"{model.name!r} draws no pictures", "Only models of pictures are examined.")
    yield from weights(
        {part: module for part in ("unet", "autoencoder", "text") if (module := model.part(part))}
    )
    yield from terminal(model.schedule, model.prediction)
    shown = drawings(model) if pictures is None else pictures
    latents = model.encode_image(shown).float()
    yield scale(latents, model.latent_scale, model.autoencoder is not None)
    raw = under(model, latents)
    found = predicted(raw, model.schedule, latents)
    yield prediction(found, model.prediction)
    if found.name in PREDICTIONS:  # asked by what it does, not by what is said of it
        told = timesteps(raw, model.schedule, latents, found.name)
        yield told
        # A wrong schedule looks like a wrong scale: both show the network noise that it takes for another.
        if told.level == "good" and model.autoencoder is not None:
            sure = pictures is not None
            yield suited(raw, model.schedule, latents, found.name, model.latent_scale, sure)


def under(model: StableDiffusion, latents: Tensor) -> Raw:
    """The network with nothing asked for, and nothing known where it reads a picture or a mask too."""
    unet = model.config.unet
    assert unet is not None
    cond = model.uncondition(1)
    if model.config.unet is not None and unet.num_classes is not None and cond.vector is None:
        cond = model.encode_label([0])
    more = unet.in_channels - unet.out_channels

    def raw(x: Tensor, t: Tensor) -> Tensor:
        rows = cond.repeat(len(x))
        if more:
            rows = Conditioning(rows.context, rows.vector, x.new_zeros(len(x), more, *x.shape[2:]))
        return model.network(x.to(model.dtype), t, rows).float()

    return raw


@torch.no_grad()
def gains(raw: Raw, schedule: Schedule, latents: Tensor) -> tuple[float, float]:
    """The regression of a network's answer on its input: on noise at the last timestep, on data at the first.

    latents: (b, c, ...), scaled.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    found = []
    for clean, index in ((latents, schedule.num_timesteps - 1), (latents, 0)):
        t = torch.full((len(clean),), index, device=clean.device)
        x = schedule.add_noise(clean, noise, t)
        out = raw(x, t.float())
        found.append(float((out * x).sum() / x.square().sum()))
    return found[0], found[1]


@dataclass(frozen=True)
class Predicted:
    """What a network predicts, a name in `GAINS` or "" where that is not clear, and its two regressions."""

    name: str
    high: float
    low: float


def predicted(raw: Raw, schedule: Schedule, latents: Tensor) -> Predicted:
    """What a network predicts, told by two evaluations; latents: (b, c, ...), scaled."""
    high, low = gains(raw, schedule, latents)
    distances = {name: math.dist((high, low), wanted) for name, wanted in GAINS.items()}
    found, other, *_ = sorted(distances, key=distances.__getitem__)
    return Predicted(found if distances[found] < CLEAR * distances[other] else "", high, low)


def prediction(found: Predicted, said: str) -> Finding:
    """Whether a network predicts what its model says."""
    told = f"the answer follows the input by {found.high:.2f} in noise and by {found.low:.2f} in pictures"
    if not found.name:
        remedy = "Is it trained? Try --prediction."
        return Finding("note", f"it is not clear what the network predicts: {told}", remedy)
    if found.name == said:
        return Finding("good", f"the network predicts {said}: {told}")
    usable = found.name in PREDICTIONS
    remedy = f"Use --prediction {found.name}." if usable else "Such models are not drawn with here."
    return Finding("fault", f"the network predicts {found.name}, not {said}: {told}", remedy)


def terminal(schedule: Schedule, said: str) -> Iterator[Finding]:
    """Whether the last timestep is noise, which sampling starts from."""
    abar = float(schedule.alphas_cumprod[-1])
    told = f"at the last of {schedule.num_timesteps} timesteps {math.sqrt(abar):.1%} of the signal is left"
    if math.sqrt(abar) > LEFT:
        remedy = "Train with zero_terminal_snr and prediction v, or with betas that end higher."
        yield Finding("fault", f"{told}: sampling starts from noise that training never saw", remedy)
    elif schedule.config.zero_terminal_snr and said == "eps":
        yield Finding("fault", f"{told}, of which eps cannot tell anything", "Use prediction v or x0.")
    else:
        yield Finding("good", f"{told} (signal to noise {abar / (1 - abar):.2g})")


def scale(latents: Tensor, factor: float, encoded: bool) -> Finding:
    """Whether what the network sees has about unit variance."""
    deviation = float(latents.std())
    channels = ", ".join(f"{value:.2f}" for value in latents.std(dim=(0, *range(2, latents.ndim))).tolist())
    told = f"{'latents' if encoded else 'pictures'} deviate by {deviation:.2f} (channels: {channels})"
    low, high = DEVIATION if encoded else PIXEL_DEVIATION
    if not low <= deviation <= high:
        remedy = f"latent_scale is {factor:g}; {factor / deviation:.4g} would make it 1." if encoded else ""
        return Finding("fault", f"{told}; the network was made for 1", remedy)
    return Finding("good", told)


@torch.no_grad()
def timesteps(raw: Raw, schedule: Schedule, latents: Tensor, name: str) -> Finding:
    """Whether a network answers best at the timesteps that its schedule says, or at another schedule's."""
    errors = {"": _error(raw, schedule, schedule, latents, name)}
    for known, config in SCHEDULES.items():
        if config.num_timesteps == schedule.num_timesteps and config != schedule.config:
            errors[known] = _error(raw, schedule, Schedule(config), latents, name)
    best = min(errors, key=errors.__getitem__)
    if errors[best] < BETTER * errors[""]:
        return Finding(
            "fault",
            f"the network answers better by the timesteps of another schedule: {best} "
            f"(mean error {errors[best]:.3f} against {errors['']:.3f})",
            "The schedule in the file may be another than that of training.",
        )
    return Finding("good", f"no known schedule suits the network better (mean error {errors['']:.3f})")


@torch.no_grad()
def suited(
    raw: Raw, schedule: Schedule, latents: Tensor, name: str, factor: float, sure: bool = True
) -> Finding:
    """Whether a network answers best about latents of the scale that they are given in, or of another.

    latents: (b, c, ...), scaled by `factor`. Each scale is shown with as much noise for its signal. sure:
    whether the pictures are of the model's domain; contrasts of others may suit it less than theirs.
    """
    errors = {1.0: _error(raw, schedule, schedule, latents, name)}
    for step in STEPS:
        for power in range(1, MOST + 1):
            errors[step**power] = _error(raw, schedule, schedule, latents, name, step**power)
            if errors[step**power] >= errors[step ** (power - 1)]:
                break
    best = min(errors, key=errors.__getitem__)
    if errors[best] < DOUBT * errors[1.0]:
        fault = BETTER if sure else PLAIN
        return Finding(
            "fault" if errors[best] < fault * errors[1.0] else "note",
            f"the network answers better about latents of {best:.2g} times the scale "
            f"(mean error {errors[best]:.4f} against {errors[1.0]:.4f})",
            f"latent_scale is {factor:g}; about {factor * best:.3g} suits the network better. "
            "Or the autoencoder is another than in training: try --vae.",
        )
    return Finding("good", f"no other scale of latents suits the network better ({factor:g})")


def _error(raw: Raw, own: Schedule, other: Schedule, latents: Tensor, name: str, scale: float = 1.0) -> float:
    """The mean squared error of x0, as a share of the noise, with `other`'s timesteps for noise levels.

    scale: latents are multiplied by it, and the noise with them.
    """
    latents = scale * latents
    total, levels = 0.0, [level for level in LEVELS if own.sigma_min < scale * level < own.sigma_max]
    for level in levels:
        generator = torch.Generator().manual_seed(round(1000 * level))
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        sigma = scale * level
        alpha = 1 / math.sqrt(1 + sigma**2)
        x = alpha * (latents + sigma * noise)
        t = torch.full((len(x),), other.timestep(sigma), device=x.device)
        found = PREDICTIONS[name].to_x0(raw(x, t), x, alpha, alpha * sigma)
        total += float((found - latents).square().mean()) / sigma**2
    return total / max(1, len(levels))


def weights(modules: Mapping[str, nn.Module]) -> Iterator[Finding]:
    """Whether weights are finite, and none that should have been trained are all zeros."""
    for part, module in modules.items():
        empty, broken = [], []
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            if not bool(torch.isfinite(value).all()):
                broken.append(name)
            elif value.ndim > 1 and not bool(value.any()):
                empty.append(name)
        if broken:
            yield Finding(
                "fault", f"{part}: {_some(broken)} hold values that are not finite", "Get the file again."
            )
        elif empty:
            yield Finding("note", f"{part}: {_some(empty)} are zero, as before training", "Is it trained?")
        else:
            yield Finding("good", f"{part}: all weights are finite, none are zero")


def drawings(model: StableDiffusion) -> Tensor:
    """Simple pictures (8, c, h, w) in -1..1 at the model's size: shapes on a ground that changes smoothly."""
    height, width = model.image_size[-2:]
    config = model.config.autoencoder
    unet = model.config.unet
    assert unet is not None
    channels = unet.out_channels if config is None else config.in_channels
    generator = torch.Generator().manual_seed(0)
    rows = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(-1, 1, width).expand(height, width)
    pictures = []
    for _ in range(SAMPLES):
        low, high, shape = (torch.rand(3, channels, generator=generator) * 2 - 1)[:, :, None, None]
        middle, radius = (
            torch.rand(2, generator=generator) - 0.5,
            0.3 + 0.4 * torch.rand(1, generator=generator),
        )
        inside = (rows - middle[0]).square() + (columns - middle[1]).square() < radius**2
        pictures.append(torch.where(inside, shape, low + (high - low) * (rows + 1) / 2))
    return torch.stack(pictures)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
