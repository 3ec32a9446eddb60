"""The patch discriminator's shapes, names and losses, and the balance of two gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sfumato.errors import InputError
from sfumato.nn.discriminator import (
    DiscriminatorConfig,
    NLayerDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradients,
)


def test_the_names_and_shapes_are_the_released_ones() -> None:
    with torch.device("meta"):
        network = NLayerDiscriminator(DiscriminatorConfig())
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4), "main.0.bias": (64,),
        "main.2.weight": (128, 64, 4, 4), "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        **{
            f"main.{layer}.{name}": (width,)
            for layer, width in ((3, 128), (6, 256), (9, 512))
            for name in ("weight", "bias", "running_mean", "running_var")
        },
        "main.11.weight": (1, 512, 4, 4), "main.11.bias": (1,),
    }  # fmt: skip
    assert sum(math.prod(shape) for name, shape in shapes.items() if "running" not in name) == 2_765_633


def receptive(config: DiscriminatorConfig) -> int:
    """Pixels that one logit in the middle sees."""
    torch.manual_seed(0)
    network = NLayerDiscriminator(config).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1.0)
    picture = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = network(picture)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    assert picture.grad is not None
    return int((picture.grad[0, 0].abs().sum(dim=0) > 0).sum())


@pytest.mark.parametrize(("layers", "seen"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers: int, seen: int) -> None:
    assert receptive(DiscriminatorConfig(ndf=2, n_layers=layers)) == seen


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_side_gives_one_patch(layers: int) -> None:
    config = DiscriminatorConfig(ndf=2, n_layers=layers)
    network = NLayerDiscriminator(config).eval()
    side = config.smallest
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, side - 2, side - 2))


def test_batch_norm_hangs_on_the_batch_and_group_norm_does_not() -> None:
    pictures = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for norm, alike in (("batch", False), ("group", True)):
        torch.manual_seed(0)
        network = NLayerDiscriminator(DiscriminatorConfig(ndf=8, n_layers=2, norm=norm))  # type: ignore[arg-type]
        assert torch.allclose(network(pictures)[:2], network(pictures[:2]), atol=1e-5) == alike


def test_the_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 * (0.25 + 1.0))
    entropy = sum(math.log1p(math.exp(value)) for value in (-2.0, -0.5, -3.0, 1.0)) / 4
    assert discriminator_loss(real, fake, "vanilla").item() == pytest.approx(entropy)
    assert generator_loss(fake).item() == 1.0


def test_balanced_gradients_are_equally_long_at_the_last_layer() -> None:
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    first, second = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 0.5])).sum()
    both = gradients([first, second], layer)
    assert both.tolist() == [[3.0, 4.0], [0.0, 0.5]]
    assert adaptive_weight(*both).item() == pytest.approx(5.0 / (0.5 + 1e-4))
    assert adaptive_weight(both[0] * 1e6, both[1] * 0).item() == 1e4


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="1 or more"):
        DiscriminatorConfig(n_layers=0)
    with pytest.raises(InputError, match="multiple of 8"):
        DiscriminatorConfig(ndf=12, norm="group")
