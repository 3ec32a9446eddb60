"""Networks that go around: a shifted picture is the picture shifted; afterwards nothing has changed."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.seamless import seamless
from sfumato.nn.unet import UNet, UNetConfig

UNET = UNetConfig(
    in_channels=2, out_channels=2, model_channels=8, num_res_blocks=1, attention_resolutions=(2,),
    channel_mult=(1, 2), num_heads=2, num_groups=4,
)  # fmt: skip


def unet(config: UNetConfig = UNET) -> UNet:
    torch.manual_seed(0)
    network = UNet(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)  # the last convolution starts as zeros
    return network


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4)).eval()


def applied(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(network, AutoencoderKL):
            return network.encode(x).mode()
        return network(x, torch.tensor([3.0]))


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("kind", ["unet", "autoencoder"])
def test_a_shift_around_the_edge_is_a_shift(kind: str, axis: int) -> None:
    network = unet() if kind == "unet" else autoencoder()
    x = torch.randn(1, 2 if kind == "unet" else 3, 16, 24)
    factor = 1 if kind == "unet" else 2

    def moved() -> Tensor:
        return applied(network, torch.roll(x, 4, axis)).roll(-4 // factor, axis) - applied(network, x)

    before = applied(network, x)
    with seamless(network, x=axis == -1, y=axis == -2):
        assert moved().abs().max() < 1e-5 * before.abs().max()
        inside = applied(network, x)
    assert moved().abs().max() > 1e-3 * before.abs().max()
    # The other axis keeps its zeros: an edge in it is an edge.
    other = -3 - axis
    with seamless(network, x=axis == -1, y=axis == -2):
        shifted = applied(network, torch.roll(x, 4, other)).roll(-4 // factor, other)
    assert (shifted - inside).abs().max() > 1e-3 * before.abs().max()


@torch.no_grad()
def test_decoded_pictures_continue_across_their_edges() -> None:
    model = autoencoder()
    smooth = torch.sin(torch.arange(24) / 24 * 2 * torch.pi).expand(1, 4, 24, 24)
    with seamless(model):
        picture = model.decode(smooth)
    step = (picture[..., 1:] - picture[..., :-1]).abs().mean(dim=(0, 1, 2))
    assert (picture[..., 0] - picture[..., -1]).abs().mean() <= 1.5 * step.max()
    assert torch.allclose(picture, model.decode(smooth.repeat(1, 1, 3, 3))[..., 48:96, 48:96], atol=0.2)


@pytest.mark.parametrize("axes", [(True, True), (True, False), (False, True), (False, False)])
def test_everything_is_restored(axes: tuple[bool, bool]) -> None:
    network, model = unet(), autoencoder()
    x = torch.randn(1, 2, 8, 8)
    before, names, pads = applied(network, x), list(model.state_dict()), repr(model)

    def failing() -> AbstractContextManager[None]:
        return seamless(network, model, x=axes[0], y=axes[1])

    with pytest.raises(ArithmeticError), failing():
        assert list(model.state_dict()) == names
        raise ArithmeticError
    assert torch.equal(applied(network, x), before)
    assert repr(model) == pads
    assert not any(module._forward_pre_hooks for module in (*network.modules(), *model.modules()))


def test_a_network_of_sequences_is_refused_and_left_as_it_was() -> None:
    network = UNet(UNetConfig(
        in_channels=2, out_channels=2, model_channels=8, num_res_blocks=1, attention_resolutions=(),
        channel_mult=(1,), num_heads=2, num_groups=4, dims=1,
    ))  # fmt: skip
    two = unet()
    with pytest.raises(InputError, match="no convolution of pictures"), seamless(two, network):
        pass
    assert not any(module._forward_pre_hooks for module in two.modules())
