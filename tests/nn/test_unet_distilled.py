"""U-Nets with blocks left out compute what diffusers computes with the same weights."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from sfumato.checkpoints.layouts.tables import pairs, to_foreign
from sfumato.errors import InputError
from sfumato.nn.unet import UNet, UNetConfig

SHARED: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "model_channels": 16, "channel_mult": (1, 2, 4), "num_heads": 2,
    "use_spatial_transformer": True, "context_dim": 12, "num_groups": 8,
}  # fmt: skip
DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
NETWORKS = {
    "without a middle, as BK-SDM and KOALA-700M": (
        UNetConfig(
            **SHARED, num_res_blocks=1, attention_resolutions=(2, 4), transformer_depth=(1, 1, 2),
            middle="none",
        ),
        {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 2], "mid_block_type": None},
    ),
    "with another decoder and half a middle, as SSD-1B": (
        UNetConfig(
            **SHARED, num_res_blocks=2, attention_resolutions=(2, 4), transformer_depth=(1, 2, 1),
            middle="residual", transformer_depth_output=(1, 1, 3, 2, 1, 1, 0, 0, 0),
        ),
        {
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 1],
            "reverse_transformer_layers_per_block": [[1, 1, 3], [2, 1, 1], [1, 1, 1]],
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "options"), NETWORKS.values(), ids=list(NETWORKS))
def test_a_distilled_network_computes_what_diffusers_computes(
    config: UNetConfig, options: dict[str, Any]
) -> None:
    ours = UNet(config).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32, 64), down_block_types=DOWN, up_block_types=UP, cross_attention_dim=12,
        attention_head_dim=2, norm_num_groups=8, **options,
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_foreign(pairs("unet", config, "diffusers"), ours.state_dict()))
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 12, generator=generator), torch.randn(2, 5, 12, generator=generator)
    t = torch.tensor([3, 700])
    with torch.no_grad():
        wanted = theirs(x, t, context).sample
        given = ours(x, t, context)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_residuals_reach_a_network_without_a_middle() -> None:
    network = UNet(next(iter(NETWORKS.values()))[0]).eval()
    nn.init.normal_(network.get_parameter("out.2.weight"), std=0.1)
    x, context, t = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), torch.tensor([3])
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4), (32, 2), (64, 2), (64, 2)]
    residuals = [torch.ones(1, width, side, side) for width, side in shapes]
    with torch.no_grad():
        assert not torch.equal(network(x, t, context), network(x, t, context, residuals=residuals))


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"middle": "some"}, "middle is 'some'"),
        ({"transformer_depth_output": (1, 1)}, "one number for each of the 6 blocks"),
        (
            {"transformer_depth_output": (1,) * 6, "use_spatial_transformer": False, "context_dim": None},
            "needs",
        ),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        UNetConfig(**{**SHARED, "num_res_blocks": 1, "attention_resolutions": (2, 4), **options})
