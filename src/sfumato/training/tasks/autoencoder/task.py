"""Training the first stage: pictures to latents and back, by a Gaussian or a codebook (LDM, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing
from functools import partial, reduce
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.checkpoints.load import copy_into, load_file
from sfumato.checkpoints.save import save_file
from sfumato.errors import InputError
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian
from sfumato.nn.codebook import CodebookState
from sfumato.nn.discriminator import DiscriminatorConfig, NLayerDiscriminator
from sfumato.nn.vq import Latents, VQModel
from sfumato.presets import ModelConfig
from sfumato.runtime import channels_last
from sfumato.training.config import LoopConfig, TrainingConfig
from sfumato.training.data import WHOLE, Dataset, Position, Share, batches, groups, to_tensor
from sfumato.training.loop import Loss, Report
from sfumato.training.tasks.autoencoder.bottleneck import Codebook, gaussian
from sfumato.training.tasks.autoencoder.finish import distil, measured, scaled
from sfumato.training.tasks.autoencoder.loss import LogVariance, losses
from sfumato.training.tasks.autoencoder.perceptual import perceptual
from sfumato.training.tasks.autoencoder.scores import round_trip_sheet, scores
from sfumato.training.tasks.autoencoder.shapes import Smallest, smallest

EVALUATED = 256  # held-out pictures that a score is the mean of
MEASURED = 4096  # training pictures that the latent scale is measured on: within 1 %
SHOWN, COLUMNS = 32, 16  # held-out pictures on a sheet
DISTILLED = 16  # pictures in a batch of the preview decoder
START_LOGVAR = -6.0  # of the posterior before training: unit noise would drown the first latents

Batch = tuple[list[Position], Tensor]
T = TypeVar("T")


class AutoencoderTask:
    """AutoencoderKL, or VQModel, on single pictures; `dataset` is trained on, `held_out` scored.

    report: is told what the perceptual term is. Raises `InputError` for a recipe whose parts do not fit
    together, `CheckpointError` for files of other networks.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dataset: Dataset,
        held_out: Dataset,
        device: torch.device,
        report: Report = lambda values: None,
    ) -> None:
        self.config, self.dataset, self.held_out, self.device = config, dataset, held_out, device
        self.options = config.autoencoder
        self.network_config = _checked(config)
        self.network = _network(self.network_config)
        self.latent_scale, self.written_as = self._start()
        self.network.to(device)
        if config.loop.channels_last:
            channels_last(self.network)

        # What the loss needs beside it. The order in which networks are made is that of their first weights.
        shown = smallest(config.data, dataset, self.network_config.downsampling)
        self.discriminator, self.logvar, self.codebook = _discriminator(config, shown), None, None
        modules: dict[str, nn.Module] = {"autoencoder": self.network}
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        if self.options.learn_logvar:
            self.logvar = modules["loss"] = LogVariance()
        if isinstance(self.network, VQModel):
            state = CodebookState(
                self.network.quantize.embedding.num_embeddings, self.network_config.embed_dim
            )
            modules["codebook"] = state
            self.codebook = Codebook(self.network, state, self.options)
        for module in modules.values():
            module.to(device)
        self.modules: Mapping[str, nn.Module] = modules
        scored = Smallest(config.data.shape)  # held-out pictures are in no buckets
        compared = perceptual(self.options, config.data.channels, shown, scored, device)
        report({"perceptual": compared.described})
        self.distance, self.lpips = compared.distance, compared.lpips
        self.digest = dataset.digest + compared.digest

        decode = self.network.decode
        if isinstance(self.network, VQModel):
            decode = partial(self.network.decode, quantise=False)
        self.encode: Callable[[Tensor], DiagonalGaussian | Latents] = _as_asked(
            self.network.encode, config.loop
        )
        self.decode: Callable[[Tensor], Tensor] = _as_asked(decode, config.loop)

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        parts: list[nn.Module] = [self.network.decoder, self.network.post_quant_conv]
        if not self.options.freeze_encoder:
            parts += [self.network.encoder, self.network.quant_conv]
            if isinstance(self.network, VQModel) and self.options.codebook == "gradient":
                parts.append(self.network.quantize)
        if self.logvar is not None:
            parts.append(self.logvar)
        found = {"autoencoder": [parameter for part in parts for parameter in part.parameters()]}
        if self.discriminator is not None:
            found["discriminator"] = list(self.discriminator.parameters())
        return found

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Batch, None, None]:
        order = groups(self.dataset, self.config.seed, seen, size, share)
        return batches(self.dataset, order, self.config.data.workers)

    def losses(self, batch: Batch, seen: int) -> Iterator[Loss]:
        order, pictures = batch
        pictures = pictures.to(self.device)
        if self.options.freeze_encoder:
            self.network.encoder.eval()  # whatever mode the loop puts it in: dropout would move its latents
        with torch.set_grad_enabled(not self.options.freeze_encoder):
            encoded = self.encode(pictures)
        if isinstance(encoded, DiagonalGaussian):
            squeezed = gaussian(encoded, order, pictures[0].numel(), self.options)
        else:
            assert self.codebook is not None
            squeezed = self.codebook(encoded, order)
        decoded = self.decode(squeezed.latents).float()
        judge = self.discriminator if seen >= self.options.disc_start else None
        last = self.network.decoder.conv_out.weight
        yield from losses(pictures, decoded, squeezed, self.options, self.distance, self.logvar, judge, last)
        squeezed.done()

    def evaluate(self) -> dict[str, float]:
        """Held-out means of the likeliest latents' round trips; see `scores`."""
        return scores(self.network, self._pictures(self.held_out, EVALUATED), self.lpips)

    def preview(self, path: Path) -> None:
        """Held-out pictures in odd rows, their round trips below; at the end the worst tiles of 256."""
        round_trip_sheet(self.network, self._pictures(self.held_out, EVALUATED), path, SHOWN, COLUMNS)

    def finish(self, path: Path) -> None:
        spread, matrix = measured(self.network, self._pictures(self.dataset, MEASURED))
        scale = spread.scale if self.latent_scale is None else self.latent_scale
        parts: dict[str, Mapping[str, Tensor]] = {"autoencoder": self.network.state_dict()}
        preview = None
        if images := min(self.options.preview_images, self.config.loop.images):
            with closing(self.batches(0, DISTILLED)) as shown:
                pictures = (each.to(self.device) for _, each in shown)
                steps = -(-images // DISTILLED)
                student = distil(self.network, pictures, steps, scale, self.config.seed)
            parts["preview"], preview = student.state_dict(), student.config
        config = ModelConfig(
            name=self.config.name,
            autoencoder=self.network_config,
            latent_scale=scale,
            image_size=self.config.data.shape,
            notices=self.config.notices,
            latent_rgb=scaled(matrix, scale),
            latent_spread=(spread.mean, spread.std),
            preview=preview,
        )
        save_file(path, config, parts, self.written_as)

    def _start(self) -> tuple[float | None, torch.dtype]:
        """Begin with another run's weights where the recipe says so.

        Returns what stays with an encoder that does: the scale of its latents, and the number format of its
        file, without which the written encoder would not be the same to the bit.
        """
        path = self.options.start_from
        if path is None:
            return None, torch.float16
        start = load_file(path, torch.float32)
        copy_into(
            self.network, start.module("autoencoder").state_dict(), f"{path} does not fit [first_stage]"
        )
        if not self.options.freeze_encoder:
            return None, torch.float16
        part = start.opened.parts["autoencoder"]
        return start.config.latent_scale, _format({part.info(name).dtype for name in part.names})

    def _pictures(self, dataset: Dataset, count: int) -> Iterator[Tensor]:
        """The same `count` pictures spread over the whole data set each time, in batches."""
        count = min(count, len(dataset))
        indices = (place * len(dataset) // count for place in range(count))
        while group := list(islice(indices, 64)):
            yield torch.stack([to_tensor(dataset.picture(index)) for index in group]).to(self.device)


def _network(config: AutoencoderConfig) -> AutoencoderKL | VQModel:
    if config.n_embed is not None:
        return VQModel(config)
    network = AutoencoderKL(config)
    bias = network.quant_conv.bias
    assert bias is not None
    nn.init.constant_(bias[config.embed_dim :], START_LOGVAR)
    return network


def _format(found: Collection[torch.dtype]) -> torch.dtype:
    """What holds weights of these formats to the bit; no wider than training, no narrower than float16."""
    wide = [dtype for dtype in found if dtype.itemsize > 1]
    together = reduce(torch.promote_types, wide, wide[0]) if wide else torch.float16
    return torch.float32 if together == torch.float64 else together


def _discriminator(config: TrainingConfig, shown: Smallest) -> NLayerDiscriminator | None:
    """The second network of a recipe that asks for one; `InputError` where the pictures have no patch."""
    options = config.autoencoder
    if options.adversarial == "none":
        return None
    network = DiscriminatorConfig(
        config.data.channels, options.disc_width, options.disc_layers, options.disc_norm
    )
    what = f"a discriminator with autoencoder.disc_layers = {options.disc_layers}"
    shown.check(network.smallest, what, ", or lower disc_layers")
    return NLayerDiscriminator(network)


def _checked(config: TrainingConfig) -> AutoencoderConfig:
    """The network of a recipe that can be trained on its pictures."""
    network, channels, shape = config.first_stage, config.data.channels, config.data.shape
    if network is None:
        raise InputError("an autoencoder run needs a [first_stage] table", "See configs/ for one.")
    if (network.in_channels, network.out_ch) != (channels, channels) or network.give_pre_end:
        raise InputError(
            f"first_stage takes {network.in_channels} channels and gives {network.out_ch}, data.channels is "
            f"{channels}",
            "Make them equal, and leave out give_pre_end.",
        )
    if any(side % network.downsampling for side in shape):
        raise InputError(
            f"data.size is {shape}; this autoencoder takes multiples of {network.downsampling}",
            "Change data.size, or the number of levels in first_stage.ch_mult.",
        )
    gan = config.autoencoder.adversarial != "none" and config.autoencoder.disc_adaptive
    if config.loop.parallel == "fsdp" and (gan or network.n_embed is not None):
        raise InputError(
            'loop.parallel = "fsdp" has no whole last layer to balance gradients at, and no whole codebook',
            'Take parallel = "ddp"; a first stage is small. Or set autoencoder.disc_adaptive = false.',
        )
    if config.autoencoder.freeze_encoder and config.autoencoder.start_from is None:
        raise InputError(
            "autoencoder.freeze_encoder needs a trained encoder", "Give its file as autoencoder.start_from."
        )
    return network


def _as_asked(function: Callable[[Tensor], T], loop: LoopConfig) -> Callable[[Tensor], T]:
    """The function compiled, and computed again in the backward pass, where the recipe says so."""
    if loop.compile:
        function = torch.compile(function)
    return partial(checkpoint, function, use_reentrant=False) if loop.gradient_checkpointing else function
