"""Training a classifier of noised samples, to guide a denoiser with (Dhariwal and Nichol 2021, section 4)."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.checkpoints.classifier import ClassifierDescription, save_classifier
from sfumato.checkpoints.load import ModelFile, load_file
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import DataError, InputError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.classifier import Classifier
from sfumato.nn.vq import VQModel
from sfumato.runtime import channels_last, training_attention
from sfumato.training.config import ClassifierTaskConfig, TrainingConfig
from sfumato.training.data import WHOLE, Dataset, Placed, Position, Share, groups, to_tensor
from sfumato.training.latents import Batch, CachedLatents, Pixels, Progress, Source
from sfumato.training.loop import Loss
from sfumato.training.sheets import save_sheet

EVALUATED = 512  # held-out samples that a score is the mean of
BINS = 4  # ranges of timesteps scored apart
ROWS, COLUMNS = 16, 12  # classes, and pictures of each, on a sheet


class ClassifierTask:
    """A classifier of noised pictures, or of noised latents of a finished autoencoder.

    Each picture's class is in its caption, see `labelled`, or it is the sub-folder, where there are no
    captions; those without one are left out. progress: is told (encoded, of) while the pictures are encoded.
    Raises `InputError` for a recipe whose parts do not fit together, `DataError` where a class has no
    picture.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dataset: Dataset,
        held_out: Dataset,
        device: torch.device,
        progress: Progress = lambda done, of: None,
    ) -> None:
        self.config, self.dataset, self.device = config, dataset, device
        options = config.classifier or ClassifierTaskConfig()
        by_folder = not options.classes and _by_folder(dataset)
        classes = options.classes or by_folder or _captions(dataset)
        label = _labels if by_folder else labelled
        self.labels = label(dataset, classes)
        if isinstance(dataset, Placed):
            dataset.only(self.labels)
        missing = [name for label, name in enumerate(classes) if label not in self.labels.values()]
        if missing:
            raise DataError(
                f"no picture in {config.data.path} is of the class {missing[0]!r} alone",
                "Captions have to name one of classifier.classes each.",
            )
        self.held_out_labels = label(held_out, classes)
        self.held_out = held_out if self.held_out_labels else dataset  # as with a handful of pictures
        self.held_out_labels = self.held_out_labels or self.labels

        first_stage = None if options.autoencoder is None else load_file(options.autoencoder, torch.float32)
        self.description = _described(config, options.pool, classes, first_stage)
        self.schedule = Schedule(config.schedule)
        self.network = Classifier(self.description.network).to(device)
        if config.loop.channels_last:
            channels_last(self.network)
        self.modules: Mapping[str, nn.Module] = {"classifier": self.network}
        self.forward = torch.compile(self.network) if config.loop.compile else self.network
        self.digest = dataset.digest + (first_stage.identity if first_stage else "")
        self.source = self._source(dataset, first_stage, "train", progress)
        self.held_out_source = self._source(self.held_out, first_stage, "test", progress)

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"classifier": list(self.network.parameters())}

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Batch, None, None]:
        order = [index for index in self.dataset.order if index in self.labels]
        return self.source.batches(groups(self.dataset, self.config.seed, seen, size, share, order))

    def losses(self, batch: Batch, seen: int) -> Iterator[Loss]:
        order, clean = batch
        noise, times = [], []
        for place in order:
            generator = place.generator("classifier")
            noise.append(torch.randn(clean.shape[1:], generator=generator))
            times.append(torch.randint(self.schedule.num_timesteps, (), generator=generator))
        labels = torch.tensor([self.labels[place.index] for place in order], device=self.device)
        with training_attention(self.device):
            logits = self._logits(clean, torch.stack(noise), torch.stack(times))
            loss = F.cross_entropy(logits, labels)
            accuracy = (logits.argmax(dim=1) == labels).float().mean()
            yield "classifier", loss, {"loss": loss, "accuracy": accuracy}

    def evaluate(self) -> dict[str, float]:
        """Held-out cross-entropy and accuracy, the latter in ranges of timesteps too, with fixed noise.

        Every picture is seen in each range, for there may be few.
        """
        indices = self._shown(EVALUATED)
        losses, hits = [], []  # of (BINS, b) each
        for start in range(0, len(indices), 64):
            group = indices[start : start + 64]
            clean = self.held_out_source.fixed(group)
            labels = torch.tensor([self.held_out_labels[index] for index in group])
            generators = [Position(self.config.seed, -1, index).generator("held out") for index in group]
            within = torch.tensor([float(torch.rand((), generator=each)) for each in generators])
            noise = torch.stack([torch.randn(clean.shape[1:], generator=each) for each in generators])
            times = [((part + within) / BINS * self.schedule.num_timesteps).long() for part in range(BINS)]
            logits = torch.stack([self._logits(clean, noise, t).cpu() for t in times])
            hits.append((logits.argmax(dim=2) == labels).float())
            losses.append(-logits.log_softmax(dim=2)[:, torch.arange(len(group)), labels])
        hit, loss = torch.cat(hits, dim=1), torch.cat(losses, dim=1)
        scores = {"held_out_loss": float(loss.mean()), "held_out_accuracy": float(hit.mean())}
        return scores | {f"held_out_accuracy_{part}": float(hit[part].mean()) for part in range(BINS)}

    def preview(self, path: Path) -> None:
        """A row for each class, the first 16: held-out pictures that it takes for it when without noise."""
        indices = self._shown(ROWS * COLUMNS)
        clean = self.held_out_source.fixed(indices)
        t = torch.zeros(len(indices), dtype=torch.long)
        chosen = self._logits(clean, torch.zeros_like(clean), t).argmax(dim=1).tolist()
        pictures = []
        for label in range(min(len(self.description.classes), ROWS)):
            found = [index for index, taken in zip(indices, chosen, strict=True) if taken == label][:COLUMNS]
            row = [to_tensor(self.held_out.picture(index)) for index in found]
            blank = torch.ones(self.config.data.channels, *self.config.data.shape)
            pictures += row + [blank] * (COLUMNS - len(row))
        save_sheet(path, torch.stack(pictures), COLUMNS)

    def finish(self, path: Path) -> None:
        save_classifier(path, self.description, self.network.state_dict())

    def _logits(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(b, classes) float32 of samples noised by the schedule to the timesteps t (b,)."""
        clean, noise, t = clean.to(self.device), noise.to(self.device), t.to(self.device)
        return self.forward(self.schedule.add_noise(clean, noise, t), t.float()).float()

    def _shown(self, count: int) -> list[int]:
        """Up to `count` labelled held-out pictures, spread over the data set."""
        indices = list(self.held_out_labels)
        return indices[:: max(1, len(indices) // count)][:count]

    def _source(
        self, dataset: Dataset, first_stage: ModelFile | None, name: str, progress: Progress
    ) -> Source:
        if first_stage is None:
            return Pixels(dataset, self.config.data.workers)
        autoencoder = first_stage.module("autoencoder").to(self.device)
        assert isinstance(autoencoder, AutoencoderKL | VQModel)
        return CachedLatents(
            dataset,
            autoencoder,
            first_stage.config.latent_scale,
            _sample_shape(self.config, first_stage),
            self.config.out / f"latents-{name}.safetensors",
            first_stage.identity,
            progress,
            workers=self.config.data.workers,
        )


def labelled(dataset: Dataset, classes: Sequence[str]) -> dict[int, int]:
    """Index of a picture -> number of its class, for those whose first caption names one class and no other.

    A caption names a class where it holds its words whole, in small letters or capitals; one that is a
    class's name and nothing else is of that class, whatever other name that holds.
    """
    patterns = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE) for name in classes]
    numbers = {name: label for label, name in enumerate(classes)}
    found: dict[int, int] = {}
    for index in range(len(dataset)):
        caption = (dataset.captions(index) or [""])[0]
        named = [label for label, pattern in enumerate(patterns) if pattern.search(caption)]
        if caption in numbers:
            found[index] = numbers[caption]
        elif len(named) == 1:
            found[index] = named[0]
    return found


def _by_folder(dataset: Dataset) -> tuple[str, ...]:
    """The classes of a data set that has them as sub-folders or the like, and no captions."""
    if not isinstance(dataset, Placed) or any(dataset.captions(index) for index in range(len(dataset))):
        return ()
    return dataset.classes


def _labels(dataset: Dataset, classes: Sequence[str]) -> dict[int, int]:
    """Index of a picture -> number of its class, as the data set has it."""
    assert isinstance(dataset, Placed)
    found = {index: dataset.label(index) for index in range(len(dataset))}
    return {index: label for index, label in found.items() if label is not None}


def _captions(dataset: Dataset) -> tuple[str, ...]:
    """Every first caption of the data set, as the names of classes."""
    names = {caption for index in range(len(dataset)) for caption in dataset.captions(index)[:1]}
    return tuple(sorted(names - {""}))


def _sample_shape(config: TrainingConfig, first_stage: ModelFile | None) -> tuple[int, ...]:
    """(channels, h, w) of what is classified."""
    data = config.data
    if first_stage is None:
        return (data.channels, *data.shape)
    autoencoder = first_stage.config.autoencoder
    if autoencoder is None or autoencoder.in_channels != data.channels:
        raise InputError(
            f"classifier.autoencoder has no autoencoder of pictures with {data.channels} channels",
            "Give the model file of an autoencoder run, or set data.channels.",
        )
    if any(side % autoencoder.downsampling for side in data.shape):
        raise InputError(
            f"data.size is {data.shape}; this autoencoder takes multiples of {autoencoder.downsampling}",
            "Change data.size.",
        )
    return (autoencoder.embed_dim, *(side // autoencoder.downsampling for side in data.shape))


def _described(
    config: TrainingConfig, pool: str, classes: Sequence[str], first_stage: ModelFile | None
) -> ClassifierDescription:
    """The classifier of a recipe; `InputError` where it does not fit its samples."""
    unet, shape = config.unet, _sample_shape(config, first_stage)
    if unet is None:
        raise InputError("a classifier run needs a [unet] table, of its encoder", "See configs/ for one.")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise InputError(f"the classes are {', '.join(classes)}", "There are at least two, each once.")
    if unet.dims != 2 or unet.in_channels != shape[0]:
        raise InputError(
            f"unet.dims is {unet.dims} and in_channels {unet.in_channels}; the samples need 2 and {shape[0]}",
            "Set them to that.",
        )
    if any(side % unet.downsampling for side in shape[1:]):
        raise InputError(
            f"the samples have size {shape[1:]}; this network takes multiples of {unet.downsampling}",
            "Change data.size, or the number of levels in unet.channel_mult.",
        )
    if config.loop.gradient_checkpointing:
        raise InputError(
            "a classifier run has no gradient_checkpointing", "Leave it out; it is half a U-Net."
        )
    return ClassifierDescription(
        name=config.name,
        classes=tuple(classes),
        encoder=unet,
        pool="attention" if pool == "attention" else "mean",
        size=shape[1:] if pool == "attention" else None,
        schedule=config.schedule,
        first_stage=first_stage and first_stage.identity,
        image_size=config.data.shape,
        notices=config.notices,
    )
