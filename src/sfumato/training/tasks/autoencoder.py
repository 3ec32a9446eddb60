"""Training the first stage: L1 reconstruction, an edge term and a slight pull to N(0, I) (Rombach et al. 2022, 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.checkpoints.load import load_file
from sfumato.checkpoints.save import save_file
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.presets import ModelConfig
from sfumato.training.config import TrainingConfig
from sfumato.training.data import Dataset, Position, batches, positions, to_tensor
from sfumato.training.sheets import save_sheet

EVALUATED = 256  # held-out pictures that a score is the mean of
START_LOGVAR = -6.0  # of the posterior before training
MEASURED = 1024  # training pictures that the latent scale is measured on

Batch = tuple[list[Position], Tensor]


class AutoencoderTask:
    """AutoencoderKL on single pictures; `dataset` is trained on, `held_out` scored."""

    def __init__(
        self, config: TrainingConfig, dataset: Dataset, held_out: Dataset, device: torch.device
    ) -> None:
        assert config.first_stage is not None
        self.config, self.dataset, self.held_out, self.device = config, dataset, held_out, device
        self.network_config: AutoencoderConfig = config.first_stage
        self.network = AutoencoderKL(self.network_config)
        with torch.no_grad():  # else unit noise drowns the latents of the first thousands of pictures
            self.network.quant_conv.bias[self.network_config.embed_dim :] = START_LOGVAR
        self.latent_scale: float | None = None
        if config.autoencoder.start_from is not None:
            start = load_file(config.autoencoder.start_from, torch.float32)
            self.network.load_state_dict(start.modules["autoencoder"].state_dict(), strict=True)
            self.latent_scale = start.config.latent_scale if config.autoencoder.freeze_encoder else None
        format = torch.channels_last if config.loop.channels_last else torch.contiguous_format
        self.network.to(device=device, memory_format=format)  # type: ignore[call-overload]
        self.modules: Mapping[str, nn.Module] = {"autoencoder": self.network}
        self.digest = dataset.digest

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        parts = [self.network.decoder, self.network.post_quant_conv]
        if not self.config.autoencoder.freeze_encoder:
            parts += [self.network.encoder, self.network.quant_conv]
        return {"autoencoder": [parameter for part in parts for parameter in part.parameters()]}

    def batches(self, seen: int, size: int) -> Iterator[Batch]:
        order = positions(self.dataset.order, self.config.seed, seen)
        return batches(self.dataset, order, size, self.config.data.workers)

    def losses(self, batch: Batch, seen: int) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        order, pictures = batch
        pictures = pictures.to(self.device)
        with torch.set_grad_enabled(not self.config.autoencoder.freeze_encoder):
            posterior = self.network.encode(pictures)
        noise = torch.stack(
            [torch.randn(posterior.mean.shape[1:], generator=place.generator("posterior")) for place in order]
        )
        latents = posterior.mean + (0.5 * posterior.logvar).exp() * noise.to(self.device)
        decoded = self.network.decode(latents).float()
        l1 = (decoded - pictures).abs().mean()
        edges = _edge_difference(decoded, pictures)
        kl = posterior.kl().mean()
        pixels = pictures[0].numel()
        weights = self.config.autoencoder
        # LDM sums the reconstruction over pixels beside a summed KL; dividing both by the pixels keeps its 1e-6.
        loss = l1 + weights.edge_weight * edges + weights.kl_weight * kl / pixels
        yield "autoencoder", loss, {"loss": loss, "l1": l1, "edges": edges, "kl": kl}

    def evaluate(self) -> dict[str, float]:
        """Held-out peak signal-to-noise ratio in dB (range -1..1, mode of the posterior), mean over pictures."""
        ratios, l1 = [], []
        for pictures in self._pictures(self.held_out, EVALUATED):
            error = self._reconstruct(pictures) - pictures
            ratios += (10 * torch.log10(4 / error.square().mean(dim=(1, 2, 3)).clamp_min(1e-10))).tolist()
            l1 += error.abs().mean(dim=(1, 2, 3)).tolist()
        return {"held_out_psnr": sum(ratios) / len(ratios), "held_out_l1": sum(l1) / len(l1)}

    def preview(self, path: Path) -> None:
        """Held-out pictures in odd rows, their round trips below."""
        pictures = next(self._pictures(self.held_out, 32))[:32]
        rows = torch.stack([pictures, self._reconstruct(pictures)], dim=1)  # (32, 2, c, h, w)
        rows = rows.unflatten(0, (-1, min(16, len(rows)))).transpose(1, 2).flatten(0, 2)
        save_sheet(path, rows, columns=min(16, len(pictures)))

    def finish(self, path: Path) -> None:
        scale = self.latent_scale
        if scale is None:
            latents = torch.cat(
                [self.network.encode(p).mode() for p in self._pictures(self.dataset, MEASURED)]
            )
            scale = float(1 / latents.std())
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


def _edge_difference(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Mean L1 between the finite differences of both along height and width: outlines, without any weights."""
    error = decoded - pictures
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
