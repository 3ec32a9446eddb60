"""What stands between encoder and decoder in training: a draw of a Gaussian, or entries of a codebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from sfumato.nn.autoencoder import DiagonalGaussian
from sfumato.nn.codebook import CodebookState, chosen, draw, usage
from sfumato.nn.vq import Latents, VQModel
from sfumato.training.data import Position
from sfumato.training.settings_autoencoder import AutoencoderTaskConfig


@dataclass(frozen=True)
class Squeezed:
    """What is decoded (b, c, h, w), the scalar loss of the latents, and metrics.

    done: called when the losses are differentiated, to update what gradients do not.
    """

    latents: Tensor
    loss: Tensor
    metrics: Mapping[str, float | Tensor]
    done: Callable[[], None] = lambda: None


def gaussian(
    posterior: DiagonalGaussian, order: Sequence[Position], pixels: int, config: AutoencoderTaskConfig
) -> Squeezed:
    """A draw of every picture's posterior, and its divergence from N(0, I) by the pixels of a picture."""
    shape = posterior.mean.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=place.generator("posterior")) for place in order])
    kl = posterior.kl().mean()
    # LDM sums the reconstruction over pixels beside a summed KL; both over the pixels, its 1e-6 stays.
    latents = posterior.mean + posterior.std * noise.to(posterior.mean.device)
    return Squeezed(latents, config.kl_weight * kl / pixels, {"kl": kl})


class Codebook:
    """A VQModel's codebook in training; `state` belongs to the run's modules.

    Processes that train together draw and count together.
    """

    def __init__(self, network: VQModel, state: CodebookState, config: AutoencoderTaskConfig) -> None:
        self.network, self.state, self.config = network, state, config

    def __call__(self, encoded: Latents, order: Sequence[Position]) -> Squeezed:
        """Entries for the latents of a batch. The first batch makes the entries where none were given."""
        latents, quantiser, config = encoded.mean, self.network.quantize, self.config
        if config.freeze_encoder:
            return Squeezed(quantiser(latents), latents.new_zeros(()), {})
        if not self.state.ready and config.start_from is None:
            self._renew(latents, order, torch.arange(len(self.state.uses), device=latents.device))
            self.state.ready.fill_(1)
        found = quantiser.train_step(latents)
        drawn = found.codebook if config.codebook == "gradient" else 0.0
        loss = config.codebook_weight * (drawn + config.beta * found.commitment)
        counts, sums = (_summed(each) for each in chosen(latents, found.indices, len(self.state.uses)))
        if not self.state.ready:  # averages that weigh as much as those of a run with such batches
            self.state.begin(quantiser.embedding.weight, counts.sum() / len(counts))
        used, perplexity = usage(counts)
        metrics = {"commitment": found.commitment, "codes_used": used, "perplexity": perplexity}

        def done() -> None:
            if not torch.isfinite(sums).all():  # the loop passes over such a step
                return
            images = float(counts.sum()) / found.indices[0].numel()
            self.state.observe(counts, sums, 0.5 ** (images / config.codebook_images))
            if config.codebook == "ema":
                quantiser.embedding.weight.data.copy_(self.state.averages())
            dead = (self.state.uses < config.revive_below).nonzero().flatten()
            if len(dead):
                self._renew(latents, order, dead)

        return Squeezed(found.straight, loss, metrics, done)

    def _renew(self, latents: Tensor, order: Sequence[Position], places: Tensor) -> None:
        """Entries drawn of the latents of this batch, by the first process for all."""
        entries = draw(latents, len(places), order[0].generator("codebook"))
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(entries, 0)
        self.state.put(entries, places, self.network.quantize.embedding.weight.data)


def _summed(tensor: Tensor) -> Tensor:
    """Over all processes."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def mean_over_processes(tensor: Tensor) -> Tensor:
    """What one process with the whole batch would have, of a mean over each one's share."""
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return _summed(tensor) / world
