"""The loss of the paper's first stage: L1, perceptual distance, an adversary (Rombach et al. 2022, 3.1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sfumato.nn.discriminator import (
    NLayerDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradients,
)
from sfumato.training.loop import Loss
from sfumato.training.settings_autoencoder import AutoencoderTaskConfig
from sfumato.training.tasks.autoencoder.bottleneck import Squeezed, mean_over_processes
from sfumato.training.tasks.autoencoder.perceptual import Distance


class LogVariance(nn.Module):
    """One number: the log-variance of the reconstruction error, learned; 0 at first, as in LDM."""

    def __init__(self) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(()))


def losses(
    pictures: Tensor,
    decoded: Tensor,
    squeezed: Squeezed,
    config: AutoencoderTaskConfig,
    distance: Distance | None,
    logvar: LogVariance | None,
    discriminator: NLayerDiscriminator | None,
    last: Tensor,
) -> Iterator[Loss]:
    """The autoencoder's loss and then, where there is a discriminator, its own.

    pictures, decoded: (b, c, h, w) in float32. discriminator: None before it joins in. last: the decoder's
    last layer, at which gradients are balanced. LDM steps the autoencoder before the discriminator judges;
    here both see the same weights.
    """
    # Reconstruction, with the variance that is learned: -log of a Laplace density, up to constants.
    l1 = (decoded - pictures).abs().mean()
    nll, metrics = l1, {"l1": l1, **squeezed.metrics}
    if config.edge_weight:
        metrics["edges"] = _edge_difference(decoded, pictures)
        nll = nll + config.edge_weight * metrics["edges"]
    if distance is not None:
        metrics["perceptual"] = distance(decoded, pictures).mean()
        nll = nll + config.perceptual_weight * metrics["perceptual"]
    if logvar is not None:
        nll = nll / logvar.logvar.exp() + logvar.logvar
        metrics["logvar"] = logvar.logvar
    loss = nll + squeezed.loss

    # The adversary's pull, as strong as the reconstruction's where the decoder ends.
    if discriminator is not None:
        discriminator.requires_grad_(False)  # it learns by its own loss alone
        adversarial = generator_loss(discriminator(decoded).float())
        discriminator.requires_grad_(True)
        balance = torch.ones((), device=loss.device)
        if config.disc_adaptive:
            balance = adaptive_weight(*mean_over_processes(gradients([nll, adversarial], last)))
        loss = loss + config.disc_factor * config.disc_weight * balance * adversarial
        metrics |= {"adversarial": adversarial, "balance": balance}
    yield "autoencoder", loss, {"loss": loss, **metrics}

    if discriminator is not None and config.adversarial != "none":
        real, fake = discriminator(pictures).float(), discriminator(decoded.detach()).float()
        verdict = config.disc_factor * discriminator_loss(real, fake, config.adversarial)
        told = {"logits_real": real.mean(), "logits_fake": fake.mean()}
        yield "discriminator", verdict, {"discriminator": verdict, **told}


def _edge_difference(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Mean L1 between the finite differences of both along height and width: outlines, without weights."""
    error = decoded - pictures
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
