"""Deep shrink: what lies deeper sees a smaller map, sizes meet again, and factor 1 is nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.nn.deep_shrink import deep_shrink
from sfumato.nn.patches import combine_patches, freeu
from sfumato.nn.unet import Patch, UNet, UNetConfig

CONFIG = UNetConfig(
    in_channels=2, out_channels=2, model_channels=8, num_res_blocks=1, attention_resolutions=(4,),
    channel_mult=(1, 2, 2), num_heads=2, num_groups=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def network() -> UNet:
    torch.manual_seed(0)
    network = UNet(CONFIG).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return network


def run(network: UNet, x: Tensor, patch: Patch | None) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The answer, and the sizes of the maps that leave the decoder's attention and blocks."""
    seen: list[tuple[int, ...]] = []
    hooks = [
        stage.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[2:])))
        for stage in (*network.input_blocks, network.middle_block, *network.output_blocks)
    ]
    with torch.no_grad():
        answer = network(x, torch.tensor([3.0]), patch=patch)
    for hook in hooks:
        hook.remove()
    return answer, seen


def test_deeper_blocks_see_a_smaller_map(network: UNet) -> None:
    x = torch.randn(1, 2, 32, 24)
    plain, sizes = run(network, x, None)
    shrunk, smaller = run(network, x, deep_shrink(CONFIG, block=2))
    assert shrunk.shape == plain.shape and not torch.allclose(shrunk, plain)
    assert sizes[:6] == [(32, 24), (32, 24), (16, 12), (16, 12), (8, 6), (8, 6)]
    # Blocks 3 and 4 work on what block 2 left at half its size.
    assert smaller[:6] == [(32, 24), (32, 24), (16, 12), (8, 6), (4, 3), (4, 3)]
    assert smaller[-1] == (32, 24)


@pytest.mark.parametrize("size", [(32, 24), (28, 20), (36, 44)])
@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_every_size_meets_its_skip_again(
    network: UNet, size: tuple[int, int], factor: float, block: int
) -> None:
    x = torch.randn(1, 2, *size)
    assert run(network, x, deep_shrink(CONFIG, block, factor))[0].shape == x.shape


def test_factor_one_is_nothing_and_others_compose(network: UNet) -> None:
    x = torch.randn(1, 2, 32, 24)
    plain, _ = run(network, x, None)
    assert torch.equal(run(network, x, deep_shrink(CONFIG, factor=1.0))[0], plain)
    both = combine_patches(deep_shrink(CONFIG), freeu(CONFIG))
    assert not torch.allclose(run(network, x, both)[0], run(network, x, deep_shrink(CONFIG))[0])


def test_what_cannot_be_shrunk_is_refused() -> None:
    with pytest.raises(InputError, match="no block 6"):
        deep_shrink(CONFIG, 6)
    with pytest.raises(InputError, match=r"factor is 0.5"):
        deep_shrink(CONFIG, 2, 0.5)
