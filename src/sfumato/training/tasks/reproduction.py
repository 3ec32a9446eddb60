"""Training the study notes' DDPM (Ho et al. 2020, algorithms 1 and 2) on rows, pictures or volumes."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.checkpoints.save import save_file
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import InputError
from sfumato.generation import generate
from sfumato.images import save_array
from sfumato.model import StableDiffusion
from sfumato.nn.unet import UNet
from sfumato.nn.unet_config import UNetConfig
from sfumato.presets import ModelConfig
from sfumato.request import Request
from sfumato.runtime import channels_last, training_attention
from sfumato.training import objective
from sfumato.training.config import TrainingConfig
from sfumato.training.data import WHOLE, Position, Share, groups
from sfumato.training.loop import Loss, Report
from sfumato.training.notes.samples import Samples, open_samples, sheet_rows
from sfumato.training.settings_reproduction import ReproductionTaskConfig
from sfumato.training.sheets import save_classes, save_sheet

EVALUATED = 64  # samples that the loss with fixed noise is the mean of
COLUMNS = 8
MANY_TOKENS = 256  # with which torch's fused attention is the faster in training on a CPU too: 4.2 s for 10 s

Batch = tuple[list[Position], Tensor]


class ReproductionTask:
    """A U-Net that predicts the noise of noised samples, in their own space, maybe told their class.

    Every preview is a sheet of samples, written a second time as epoch-0001.png, ... into the run's folder;
    the last is drawn by DDPM's own steps, all of them. Raises `InputError` for a recipe whose parts do not
    fit together.
    """

    def __init__(self, config: TrainingConfig, samples: Samples, device: torch.device) -> None:
        self.config, self.samples, self.device = config, samples, device
        self.options = config.reproduction or ReproductionTaskConfig()
        self.schedule = Schedule(config.schedule)
        objective.check(self.options, self.schedule)
        unet_config = _checked(config, samples)
        self.unet = UNet(unet_config).to(device)
        if config.loop.channels_last and unet_config.dims == 2:
            channels_last(self.unet)
        self.unet.gradient_checkpointing = config.loop.gradient_checkpointing
        self.forward = torch.compile(self.unet) if config.loop.compile else self.unet
        self.modules: Mapping[str, nn.Module] = {"unet": self.unet}
        self.digest = samples.digest
        self.model = StableDiffusion(self._described(unet_config), dict(self.modules))
        few = _most_tokens(unet_config, samples) <= MANY_TOKENS
        self.attention = partial(training_attention, device) if few else nullcontext

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"denoiser": list(self.unet.parameters())}

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Batch, None, None]:
        return self.samples.batches(groups(self.samples, self.config.seed, seen, size, share))

    def losses(self, batch: Batch, seen: int) -> Iterator[Loss]:
        order, clean = batch
        with self.attention():  # in the backward pass too
            loss = self._losses(order, clean).mean()
            yield "denoiser", loss, {"loss": loss}

    def evaluate(self) -> dict[str, float]:
        """The loss on samples of the set itself, always with the same noise: less noisy than a batch's."""
        stride = max(1, len(self.samples) // EVALUATED)
        indices = list(self.samples.order)[::stride][:EVALUATED]
        order = [Position(self.config.seed, -1, index, index) for index in indices]
        clean = torch.stack([self.samples.sample(index) for index in indices])
        return {"fixed_noise_loss": float(self._losses(order, clean).mean())}

    def preview(self, path: Path) -> None:
        """A sheet of samples; of rows and volumes also the numbers, as .npy beside the epoch's sheet."""
        images, whole = self.config.loop.images, self.schedule.num_timesteps
        seen = int(path.stem) if path.stem.isdecimal() else images  # as the loop names its sheets
        drawn = self._drawn(whole if seen >= images else min(self.options.preview_steps, whole))
        save_sheet(path, sheet_rows(drawn), COLUMNS)
        if path.parent != self.config.out / "previews":  # of a process that does not write
            return
        epoch = self.config.out / f"epoch-{max(1, min(seen, images) // len(self.samples)):04}"
        save_sheet(epoch.with_suffix(".png"), sheet_rows(drawn), COLUMNS)
        if self.samples.layout.dims != 2:
            save_array(drawn, epoch.with_suffix(".npy"))

    def finish(self, path: Path) -> None:
        save_file(path, self.model.config, {"unet": self.unet.state_dict()}, torch.float16)
        if self.samples.classes:
            save_classes(path.with_name("classes.tsv"), self.samples.classes)

    def _losses(self, order: list[Position], clean: Tensor) -> Tensor:
        """(b,) float32 on the device."""
        chance = objective.drawn_batch(self.options, self.schedule, order, clean.shape[1:]).to(self.device)
        labels = None
        if self.samples.classes:
            labels = self.samples.labels([position.index for position in order]).to(self.device)
        clean = clean.to(self.device)
        shown = objective.noised(self.schedule, clean, chance)
        raw = self.forward(shown, chance.t.float().to(self.device), vector=labels)
        return objective.losses(self.options, self.schedule, raw, clean, chance)

    def _drawn(self, steps: int) -> Tensor:
        """Samples (n, c, ...) at fixed seeds, as many of each class."""
        full = steps == self.schedule.num_timesteps
        request = Request(steps=steps, sampler="ddpm" if full else "dpmpp_2m")
        labels = range(len(self.samples.classes)) or [None]
        each = -(-self.options.samples // len(labels))
        drawn = []
        for label in labels:
            asked = {"label": label, "num_images": each, "seed": (label or 0) * each}
            drawn.append(generate(self.model, request.model_copy(update=asked)).samples)
        return torch.cat(drawn)

    def _described(self, unet: UNetConfig) -> ModelConfig:
        """What is trained, as a model that draws with as many steps of DDPM as it has timesteps."""
        return ModelConfig(
            name=self.config.name,
            unet=unet,
            schedule=self.config.schedule,
            prediction=self.options.prediction,
            image_size=self.samples.layout.shape[1:],
            defaults={"guidance": 1.0, "steps": self.schedule.num_timesteps, "sampler": "ddpm"},
            notices=self.config.notices,
        )


def samples_of(config: TrainingConfig, report: Report = lambda _: None) -> Samples:
    """The samples of a recipe, without those in its `out` folder; what is left out is reported."""
    unet, options = _network(config), config.reproduction or ReproductionTaskConfig()
    sides = config.data.shape[-1:] if unet.dims == 1 else config.data.shape
    classes = unet.num_classes if isinstance(unet.num_classes, int) else None
    samples = open_samples(
        config.data.path,
        unet.in_channels,
        unet.dims,
        sides,
        depth=options.depth,
        classes=classes,
        left_out=config.out,
    )
    for warning in samples.warnings:
        report({"warning": warning})
    if samples.classes:
        report({"classes": ", ".join(f"{number} {name}" for number, name in enumerate(samples.classes))})
    return samples


def _network(config: TrainingConfig) -> UNetConfig:
    if config.unet is None:
        raise InputError("a reproduction run needs a [unet] table", "See examples/reproduction.")
    return config.unet


def _most_tokens(unet: UNetConfig, samples: Samples) -> int:
    """Tokens of the largest map that attention is on."""
    resolutions = [factor for factor in unet.attention_resolutions if factor <= unet.downsampling]
    factor = min(resolutions, default=unet.downsampling)
    sides = samples.layout.sides
    return (samples.layout.depth or 1) * math.prod(sides) // factor ** len(sides)


def _checked(config: TrainingConfig, samples: Samples) -> UNetConfig:
    """The U-Net of a recipe that can be trained on these samples."""
    unet, layout = _network(config), samples.layout
    wanted = (layout.dims, layout.channels, layout.channels, None)
    if (unet.dims, unet.in_channels, unet.out_channels, unet.context_dim) != wanted:
        raise InputError(
            f"unet.dims is {unet.dims}, in_channels {unet.in_channels}, out_channels {unet.out_channels} and "
            f"context_dim {unet.context_dim}; the samples need {', '.join(map(str, wanted))}",
            "Set them to that.",
        )
    if (unet.num_classes or 0) != len(samples.classes):
        raise InputError(
            f"unet.num_classes is {unet.num_classes}; the samples have {len(samples.classes)} classes",
            "Set it to that.",
        )
    return unet
