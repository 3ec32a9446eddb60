"""ESRGAN's networks against their published structure, written out tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import InputError
from sfumato.nn.esrgan import CompactConfig, CompactNet, RRDBConfig, RRDBNet
from sfumato.runtime import shapes_only

State = dict[str, Tensor]


def conv(state: State, name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)


def published_rrdb(state: State, x: Tensor, blocks: int, ups: int, unshuffle: int) -> Tensor:
    """Wang et al. 2018, figure 4, with the constants of section 3.1; unshuffling as in Wang et al. 2021."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // unshuffle, unshuffle, w // unshuffle, unshuffle)
    x = x.permute(0, 1, 3, 5, 2, 4).reshape(b, c * unshuffle**2, h // unshuffle, w // unshuffle)
    first = trunk = conv(state, "conv_first", x)
    for block in range(blocks):
        entry = trunk
        for dense in (1, 2, 3):
            inside, known = trunk, [trunk]
            for number in (1, 2, 3, 4):
                made = conv(state, f"body.{block}.rdb{dense}.conv{number}", torch.cat(known, dim=1))
                known.append(torch.where(made > 0, made, 0.2 * made))
            last = conv(state, f"body.{block}.rdb{dense}.conv5", torch.cat(known, dim=1))
            trunk = inside + 0.2 * last
        trunk = entry + 0.2 * trunk
    trunk = first + conv(state, "conv_body", trunk)
    for up in range(1, ups + 1):
        doubled = trunk.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        trunk = F.leaky_relu(conv(state, f"conv_up{up}", doubled), 0.2)
    return conv(state, "conv_last", F.leaky_relu(conv(state, "conv_hr", trunk), 0.2))


def published_compact(state: State, x: Tensor, layers: int, scale: int) -> Tensor:
    """Real-ESRGAN's SRVGGNetCompact: convolutions and PReLU in turn, shuffled, plus the nearest pixels."""
    h = x
    for layer in range(0, 2 * layers + 2, 2):
        h = conv(state, f"body.{layer}", h)
        h = torch.where(h > 0, h, h * state[f"body.{layer + 1}.weight"][:, None, None])
    h = conv(state, f"body.{2 * layers + 2}", h)
    b, c, height, width = h.shape
    h = h.reshape(b, c // scale**2, scale, scale, height, width).permute(0, 1, 4, 2, 5, 3)
    base = x.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    return h.reshape(b, c // scale**2, height * scale, width * scale) + base


@pytest.mark.parametrize(
    ("ups", "unshuffle", "scale"), [(2, 1, 4), (2, 2, 2), (2, 4, 1), (1, 1, 2), (3, 1, 8)]
)
def test_rrdb_is_the_published_network(ups: int, unshuffle: int, scale: int) -> None:
    torch.manual_seed(ups + unshuffle)
    config = RRDBConfig(num_features=8, num_blocks=2, num_growth=4, num_upsamplings=ups, unshuffle=unshuffle)
    network, x = RRDBNet(config), torch.rand(2, 3, 8, 12)
    with torch.no_grad():
        given, wanted = network(x), published_rrdb(network.state_dict(), x, 2, ups, unshuffle)
    assert config.scale == scale and given.shape == (2, 3, 8 * scale, 12 * scale)
    assert (given - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_compact_is_the_published_network(scale: int) -> None:
    torch.manual_seed(scale)
    network = CompactNet(CompactConfig(num_features=8, num_convs=3, scale=scale))
    x = torch.rand(2, 3, 5, 7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1 and "bias" not in name:
                parameter.copy_(torch.rand_like(parameter))  # slopes that differ
        given, wanted = network(x), published_compact(network.state_dict(), x, 3, scale)
    assert given.shape == (2, 3, 5 * scale, 7 * scale)
    assert (given - wanted).abs().max() <= 1e-5


def test_numbers_of_the_releases() -> None:
    with shapes_only():
        x4, x2 = RRDBNet(RRDBConfig()), RRDBNet(RRDBConfig(unshuffle=2))
        anime, general = CompactNet(CompactConfig(num_convs=16)), CompactNet(CompactConfig())
    counts = [sum(each.numel() for each in network.parameters()) for network in (x4, x2, anime, general)]
    # 67.0 MB of RealESRGAN_x4plus.pth in float32, 2.5 MB and 4.9 MB of the compact networks'
    assert counts[:2] == [16_697_987, 16_703_171]
    assert counts[2:] == [621_424, 1_213_296]


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="num_blocks is 0"):
        RRDBConfig(num_blocks=0)
    with pytest.raises(InputError, match="no whole"):
        RRDBConfig(num_upsamplings=1, unshuffle=4)
    with pytest.raises(InputError, match="scale is 0"):
        CompactConfig(scale=0)
