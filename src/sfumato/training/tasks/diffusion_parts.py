"""What a diffusion run is put together from: network, conditions and samples that fit each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from sfumato.checkpoints.clip import load_text_tower, text_tower
from sfumato.checkpoints.load import ModelFile, copy_into
from sfumato.errors import InputError
from sfumato.model import StableDiffusion
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.training.config import TrainingConfig
from sfumato.training.data import Dataset, Part, Placed, Position, Size, ahead, load, load_parts
from sfumato.training.latents import CachedLatents, Pixels, Progress, Source
from sfumato.training.masks import refuse_masks
from sfumato.training.settings_diffusion import DiffusionTaskConfig
from sfumato.training.tasks.conditions import Captions, Condition, Labels
from sfumato.training.tasks.shown import Inpainting, SmallPicture, StretchedPicture

MASKED: tuple[Part, ...] = ("picture", "mask")
FIRST = "input_blocks.0.0.weight"  # (width, in_channels, 3, 3)

Batch = tuple[list[Position], Tensor, Tensor | None]
"""Places, samples (b, c, h, w), and their pictures in -1..1 where conditions are made of them.

Where those conditions show masks of the pictures' own, these are one channel more of the pictures.
"""


def told(
    config: TrainingConfig,
    data: tuple[Dataset, Dataset],
    start: ModelFile | None,
    device: torch.device,
) -> list[Condition]:
    """Captions or classes, as the recipe has them, or neither.

    start: the model that the denoiser begins with.
    """
    options = config.diffusion
    concat_kind(options)  # whose errors come before those of the pictures
    if options.concat != "inpainting":
        refuse_masks(config.data)
    text = config.text is not None or options.text_from is not None
    if text and options.classes == "context":
        raise InputError(
            "both captions and classes would make the context",
            'Leave out [text] and diffusion.text_from, or set diffusion.classes = "vector" or "none".',
        )
    found: list[Condition] = []
    if text:
        tower = load_text_tower(options.text_from) if options.text_from else start and text_tower(start)
        found.append(Captions(config, data, tower, device))
    if options.classes != "none":
        found.append(Labels(config, data, device))
    return found


def network_config(config: TrainingConfig, conditions: list[Condition]) -> UNetConfig:
    """The U-Net of the recipe, with a label for each class and one for none."""
    unet = config.unet
    if unet is None:
        raise InputError("a diffusion run needs a [unet] table", "See configs/ for one.")
    labels = next((each for each in conditions if isinstance(each, Labels) and each.network is None), None)
    count = (labels and labels.count) or config.diffusion.noise_levels or None
    if unet.dims != 2 or unet.num_classes not in (None, count):
        raise InputError(
            f"unet.dims is {unet.dims} and num_classes {unet.num_classes}; this recipe needs 2 and {count}",
            'Leave both out; diffusion.classes = "vector" and diffusion.noise_levels set the number.',
        )
    widths = [(each.network.config.hidden_size, "text.hidden_size") for each in conditions
              if isinstance(each, Captions)]  # fmt: skip
    widths += [(unet.context_dim, "") for each in conditions if isinstance(each, Labels) and each.network]
    width, name = widths[0] if widths else (None, "text.hidden_size")
    if unet.context_dim != width:
        raise InputError(
            f"unet.context_dim is {unet.context_dim}, {name} {width}",
            "Make them equal, or leave out both context_dim and the [text] table.",
        )
    if any(config.diffusion.prompts) and not any(isinstance(each, Captions) for each in conditions):
        raise InputError(
            "diffusion.prompts are given, but the recipe has no [text] table", "Add it, or leave them out."
        )
    return dataclasses.replace(unet, num_classes=count)


def check_channels(config: TrainingConfig, unet: UNetConfig, first_stage: ModelFile | None) -> None:
    """`InputError` where pictures, first stage, U-Net and what it is shown differ in channels."""
    pictures = config.data.channels
    autoencoder = first_stage and first_stage.config.autoencoder
    if autoencoder is not None and autoencoder.in_channels != pictures:
        raise InputError(
            f"data.channels is {pictures}, the autoencoder's pictures have {autoencoder.in_channels}",
            "Set data.channels to that number.",
        )
    samples = pictures if autoencoder is None else autoencoder.embed_dim
    more = {"none": 0, "inpainting": 1 + samples, "super_resolution": pictures}[config.diffusion.concat]
    if (unet.in_channels, unet.out_channels) != (samples + more, samples):
        beside = f", and {more} more show it what {config.diffusion.concat} needs" if more else ""
        raise InputError(
            f"unet.in_channels is {unet.in_channels} and out_channels {unet.out_channels}, "
            f"but the samples have {samples} channels{beside}",
            f"Set in_channels to {samples + more} and out_channels to {samples}.",
        )
    factor = autoencoder.downsampling if autoencoder else None
    if config.diffusion.enlarge is not None and factor not in (None, config.diffusion.enlarge):
        raise InputError(
            f"diffusion.enlarge is {config.diffusion.enlarge}; the autoencoder has {factor} per latent",
            "Leave it out.",
        )


def start_unet(network: UNet, start: ModelFile, source: str) -> None:
    """Give the network the weights of another; input channels that the other lacks begin at zero.

    So at first it draws as the other does, whatever they show (as Stable Diffusion's inpainting model began).
    """
    weights = dict(start.module("unet").state_dict())
    given, wanted = weights.get(FIRST), network.state_dict()[FIRST]
    if given is not None and given.shape[1] < wanted.shape[1]:
        wider = torch.zeros_like(wanted, device=given.device, dtype=given.dtype)
        wider[:, : given.shape[1]] = given
        weights[FIRST] = wider
    copy_into(network, weights, f"{source} does not fit [unet]")


def shown(config: TrainingConfig, model: StableDiffusion, data: tuple[Dataset, Dataset]) -> list[Condition]:
    """What the network is shown of pictures, as the recipe has it, or nothing."""
    options = config.diffusion
    if options.concat == "inpainting":
        return [Inpainting(options, model.encode_image, config.seed, data)]
    if options.concat == "super_resolution":
        return [SmallPicture(options, model.downsampling) if model.autoencoder else StretchedPicture(options)]
    return []


def concat_kind(options: DiffusionTaskConfig) -> str | None:
    """What the further channels show, as a model file says it; `InputError` for options that contradict."""
    latents = options.autoencoder is not None
    small = options.concat == "super_resolution"
    if "concat_dropout" in options.model_fields_set and (latents or not small):
        raise InputError(
            f"diffusion.concat_dropout is {options.concat_dropout:g}, and only small pictures in pixels are "
            "left out; beside latents the small picture is always shown",
            'Leave it out, or set diffusion.concat = "super_resolution" without diffusion.autoencoder.',
        )
    if options.noise_levels and not (small and latents):
        raise InputError(
            f"diffusion.noise_levels is {options.noise_levels}, and no small picture is shown beside latents",
            'Leave it out, or set diffusion.concat = "super_resolution" and diffusion.autoencoder.',
        )
    if small and latents and options.classes == "vector":
        raise InputError(
            'diffusion.classes is "vector", and the labels of a network that enlarges are levels of noise',
            'Set diffusion.classes = "context".',
        )
    if options.concat == "none":
        return None
    return ("enlarges" if latents else "edits") if small else "inpaints"


def samples(
    config: TrainingConfig,
    model: StableDiffusion,
    data: tuple[Dataset, Dataset],
    first_stage: ModelFile | None,
    progress: Progress,
) -> tuple[Source, Source]:
    """The clean samples of the training and of the held-out pictures."""
    if first_stage is None or model.autoencoder is None:
        return Pixels(data[0], config.data.workers), Pixels(data[1], config.data.workers)
    shape = model.latent_shape(*config.data.shape)
    train, test = (
        CachedLatents(
            dataset,
            model.autoencoder,
            model.latent_scale,
            shape,
            config.out / f"latents-{name}.safetensors",
            first_stage.identity,
            progress,
            workers=config.data.workers,
        )
        for dataset, name in zip(data, ("train", "test"), strict=True)
    )
    return train, test


def alike(dataset: Dataset, indices: Sequence[int], most: int) -> Iterator[list[int]]:
    """The indices in batches of pictures of one size, of `most` or fewer each."""
    by_size: dict[Size, list[int]] = {}
    bucketed = isinstance(dataset, Placed) and dataset.bucketed
    for index in indices:
        size = dataset.size(index) if isinstance(dataset, Placed) and bucketed else (0, 0)
        by_size.setdefault(size, []).append(index)
    for found in by_size.values():
        yield from (found[start : start + most] for start in range(0, len(found), most))


def with_pictures(
    source: Source, dataset: Dataset, workers: int, order: Iterator[list[Position]], masked: bool = False
) -> Generator[Batch, None, None]:
    """The samples of `groups` and the pictures that they are of, if `masked` with their masks behind them."""

    def seen(group: list[Position]) -> tuple[list[Position], Tensor]:
        if not (masked and isinstance(dataset, Placed)):
            return load(dataset, group)
        places, parts = load_parts(dataset, group, MASKED)
        return places, torch.cat(parts, dim=1)

    with closing(ahead(order, seen, workers)) as found:
        for group, pictures in found:
            clean = pictures[:, :-1] if masked else pictures
            if not isinstance(source, Pixels):
                # Of the pictures that were found: one whose file or mask cannot be read has been replaced.
                ((again, clean),) = source.batches(iter([group]))
                assert group == again, "samples and pictures of other places"
            yield group, clean, pictures


def without_pictures(source: Source, order: Iterator[list[Position]]) -> Generator[Batch, None, None]:
    """The samples of `groups`."""
    with closing(source.batches(order)) as found:
        yield from ((group, sample, None) for group, sample in found)
