"""Training the first stage: L1, an edge term and a slight pull to N(0, I) (Rombach et al. 2022, 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
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
from sfumato.presets import ModelConfig
from sfumato.runtime import channels_last
from sfumato.training.config import LoopConfig, TrainingConfig
from sfumato.training.data import WHOLE, Dataset, Position, Share, batches, groups, to_tensor
from sfumato.training.loop import Loss
from sfumato.training.sheets import save_sheet

EVALUATED = 256  # held-out pictures that a score is the mean of
MEASURED = 1024  # training pictures that the latent scale is measured on
SHOWN, COLUMNS = 32, 16  # held-out pictures on a sheet
START_LOGVAR = -6.0  # of the posterior before training: unit noise would drown the first latents

Batch = tuple[list[Position], Tensor]
T = TypeVar("T")


class AutoencoderTask:
    """AutoencoderKL on single pictures; `dataset` is trained on, `held_out` scored.

    Raises `InputError` for a recipe whose parts do not fit together.
    """

    def __init__(
        self, config: TrainingConfig, dataset: Dataset, held_out: Dataset, device: torch.device
    ) -> None:
        self.config, self.dataset, self.held_out, self.device = config, dataset, held_out, device
        self.network_config = _checked(config)
        self.network = AutoencoderKL(self.network_config)
        bias = self.network.quant_conv.bias
        assert bias is not None
        nn.init.constant_(bias[self.network_config.embed_dim :], START_LOGVAR)
        self.latent_scale: float | None = None
        if (path := config.autoencoder.start_from) is not None:
            start = load_file(path, torch.float32)
            weights = start.module("autoencoder").state_dict()
            copy_into(self.network, weights, f"{path} does not fit [first_stage]")
            self.latent_scale = start.config.latent_scale if config.autoencoder.freeze_encoder else None
        self.network.to(device)
        if config.loop.channels_last:
            channels_last(self.network)
        self.modules: Mapping[str, nn.Module] = {"autoencoder": self.network}
        self.digest = dataset.digest
        self.encode: Callable[[Tensor], DiagonalGaussian] = _as_asked(self.network.encode, config.loop)
        self.decode: Callable[[Tensor], Tensor] = _as_asked(self.network.decode, config.loop)

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        parts = [self.network.decoder, self.network.post_quant_conv]
        if not self.config.autoencoder.freeze_encoder:
            parts += [self.network.encoder, self.network.quant_conv]
        return {"autoencoder": [parameter for part in parts for parameter in part.parameters()]}

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Batch, None, None]:
        order = groups(self.dataset, self.config.seed, seen, size, share)
        return batches(self.dataset, order, self.config.data.workers)

    def losses(self, batch: Batch, seen: int) -> Iterator[Loss]:
        order, pictures = batch
        pictures = pictures.to(self.device)
        with torch.set_grad_enabled(not self.config.autoencoder.freeze_encoder):
            posterior = self.encode(pictures)
        noise = torch.stack(
            [torch.randn(posterior.mean.shape[1:], generator=place.generator("posterior")) for place in order]
        )
        latents = posterior.mean + posterior.std * noise.to(self.device)
        decoded = self.decode(latents).float()
        l1 = (decoded - pictures).abs().mean()
        edges = _edge_difference(decoded, pictures)
        kl = posterior.kl().mean()
        weights = self.config.autoencoder
        # LDM sums the reconstruction over pixels beside a summed KL; both over the pixels, its 1e-6 stays.
        loss = l1 + weights.edge_weight * edges + weights.kl_weight * kl / pictures[0].numel()
        yield "autoencoder", loss, {"loss": loss, "l1": l1, "edges": edges, "kl": kl}

    def evaluate(self) -> dict[str, float]:
        """Held-out mean L1 and peak signal-to-noise ratio in dB (range -1..1) of the posterior's mode."""
        ratios, l1 = [], []
        for pictures in self._pictures(self.held_out, EVALUATED):
            error = self._reconstruct(pictures) - pictures
            ratios += (10 * torch.log10(4 / error.square().mean(dim=(1, 2, 3)).clamp_min(1e-10))).tolist()
            l1 += error.abs().mean(dim=(1, 2, 3)).tolist()
        return {"held_out_psnr": sum(ratios) / len(ratios), "held_out_l1": sum(l1) / len(l1)}

    def preview(self, path: Path) -> None:
        """Held-out pictures in odd rows, their round trips below; a last row that is not full is left out."""
        pictures = next(self._pictures(self.held_out, SHOWN))
        columns = min(COLUMNS, len(pictures))
        pictures = pictures[: len(pictures) // columns * columns]
        pairs = torch.stack([pictures, self._reconstruct(pictures)])  # (2, b, c, h, w)
        rows = pairs.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2)
        save_sheet(path, rows, columns)

    def finish(self, path: Path) -> None:
        scale = self.latent_scale
        if scale is None:
            modes = [self.network.encode(p).mode() for p in self._pictures(self.dataset, MEASURED)]
            scale = float(1 / torch.cat(modes).std())
        config = ModelConfig(
            name=self.config.name,
            autoencoder=self.network_config,
            latent_scale=scale,
            image_size=self.config.data.shape,
            notices=self.config.notices,
        )
        save_file(path, config, {"autoencoder": self.network.state_dict()}, torch.float16)

    def _reconstruct(self, pictures: Tensor) -> Tensor:
        return self.network.decode(self.network.encode(pictures).mode()).clamp(-1, 1)

    def _pictures(self, dataset: Dataset, count: int) -> Iterator[Tensor]:
        """The same `count` pictures spread over the data set each time, in batches."""
        stride = max(1, len(dataset) // count)
        indices = iter(range(0, len(dataset), stride)[:count])
        while group := list(islice(indices, 64)):
            yield torch.stack([to_tensor(dataset.picture(index)) for index in group]).to(self.device)


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


def _edge_difference(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Mean L1 between the finite differences of both along height and width: outlines, without weights."""
    error = decoded - pictures
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
