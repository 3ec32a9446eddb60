"""T2I-Adapters against diffusers' with the same weights, alone and inside a U-Net."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sfumato.checkpoints.controls.adapters_layouts import t2i_pairs
from sfumato.checkpoints.layouts.tables import pairs, to_foreign
from sfumato.errors import InputError
from sfumato.families import FAMILIES
from sfumato.nn.t2i_adapter import T2IAdapter, T2IAdapterConfig, adapter_patch, adapter_places
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.runtime import shapes_only

FULL = T2IAdapterConfig(channels=(16, 32, 64))
CONFIGS = {
    "full": FULL,
    "full, grey, three blocks": replace(FULL, in_channels=1, num_res_blocks=3),
    "full-xl": replace(FULL, channels=(16, 32, 64, 64), kind="full-xl", unshuffle=16),
    "light": replace(FULL, num_res_blocks=4, kind="light"),
}
TYPES = {"full": "full_adapter", "full-xl": "full_adapter_xl", "light": "light_adapter"}
UNET = UNetConfig(
    in_channels=4, out_channels=4, model_channels=16, num_res_blocks=2, attention_resolutions=(1, 2),
    channel_mult=(1, 2, 4), num_heads=2, use_spatial_transformer=True, context_dim=12, num_groups=8,
)  # fmt: skip
XL = replace(UNET, attention_resolutions=(2, 4))
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(network: nn.Module) -> None:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))


def build(config: T2IAdapterConfig) -> tuple[T2IAdapter, Any]:
    ours = T2IAdapter(config)
    draw(ours)
    # diffusers' light adapter does not count the last level, which is as wide as the one before
    channels = config.channels[:-1] if config.kind == "light" else config.channels
    theirs = diffusers.T2IAdapter(
        in_channels=config.in_channels, channels=list(channels), num_res_blocks=config.num_res_blocks,
        downscale_factor=config.unshuffle, adapter_type=TYPES[config.kind],
    )  # fmt: skip
    theirs.load_state_dict(to_foreign(t2i_pairs(config), ours.state_dict()))
    return ours, theirs


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_features_are_those_of_diffusers(name: str) -> None:
    config = CONFIGS[name]
    if config.kind == "light":
        config = replace(config, channels=(16, 32, 64, 64))
    ours, theirs = build(config)
    picture = seeded(0, 2, config.in_channels, 128, 192).abs()
    found, expected = ours(picture), theirs(picture)
    assert len(found) == len(expected) == len(config.channels)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5
        assert b.std() > 0.01


@pytest.mark.parametrize(
    ("config", "types", "count"), [(UNET, (CROSS, CROSS, PLAIN), 3), (XL, (PLAIN, CROSS, CROSS), 4)]
)
@torch.no_grad()
def test_inside_a_unet_they_act_as_in_diffusers(
    config: UNetConfig, types: tuple[str, ...], count: int
) -> None:
    ours = UNet(config).eval()
    draw(ours)
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32, 64), down_block_types=types,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(types)),
        layers_per_block=2, cross_attention_dim=12, attention_head_dim=2, norm_num_groups=8,
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_foreign(pairs("unet", config, "diffusers"), ours.state_dict()))
    x, t, context = seeded(0, 2, 4, 8, 12), torch.tensor([3, 700]), seeded(1, 2, 5, 12)
    # An adapter of SDXL follows the halving of a level without attention, and ends at the middle block.
    sides = [(8, 12), (4, 6), (2, 3)] if count == 3 else [(4, 6), (4, 6), (2, 3), (2, 3)]
    widths = (16, 32, 64, 64)
    features = [
        seeded(i, 2, width, *side) for i, (width, side) in enumerate(zip(widths, sides, strict=False))
    ]
    expected = theirs(
        x, t, context, down_intrablock_additional_residuals=[f.clone() for f in features]
    ).sample
    found = ours(x, t, context, patch=adapter_patch(config, features))
    assert (found - expected).abs().max() <= 1e-5
    assert (found - ours(x, t, context)).abs().max() > 0.01
    one_row = ours(x, t, context, patch=adapter_patch(config, [feature[:1] for feature in features]))
    assert (one_row[0] - expected[0]).abs().max() <= 1e-5


def test_the_places_in_released_unets() -> None:
    """LDM's T2I-Adapter adds after every third input block; SDXL's first level halves before it."""
    sd1, sdxl = FAMILIES["sd1"].unet, FAMILIES["sdxl"].unet
    assert sd1 is not None and sdxl is not None
    assert adapter_places(sd1) == [2, 5, 8, 11]
    assert adapter_places(sdxl) == [3, 5, 8]


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (T2IAdapterConfig(), {"num_res_blocks": 2}),
        (
            T2IAdapterConfig(kind="full-xl", unshuffle=16),
            {"adapter_type": "full_adapter_xl", "downscale_factor": 16},
        ),
        (
            T2IAdapterConfig(kind="light", num_res_blocks=4),
            {"adapter_type": "light_adapter", "channels": [320, 640, 1280], "num_res_blocks": 4},
        ),
    ],
)
def test_the_full_size_is_the_one_of_diffusers(config: T2IAdapterConfig, theirs: dict[str, Any]) -> None:
    with shapes_only():
        ours = T2IAdapter(config)
    with torch.device("meta"):
        reference = diffusers.T2IAdapter(**theirs)
    given = {
        name: shape
        for pair in t2i_pairs(config)
        for name, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True)
    }
    assert given == {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    assert {pair.native for pair in t2i_pairs(config)} == set(ours.state_dict())


def test_pictures_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"takes \(b, 3, h, w\)"):
        T2IAdapter(FULL)(torch.zeros(1, 1, 64, 64))
    with pytest.raises(InputError, match="multiples of 32"):
        T2IAdapter(FULL)(torch.zeros(1, 3, 64, 72))


def test_features_that_do_not_fit_are_refused() -> None:
    unet, features = UNet(UNET), [torch.zeros(1, 16, 4, 4)]
    with pytest.raises(InputError, match="another family"):
        unet(
            torch.zeros(1, 4, 8, 8),
            torch.tensor([1]),
            torch.zeros(1, 2, 12),
            patch=adapter_patch(UNET, features),
        )
    with pytest.raises(InputError, match="5 features"):
        adapter_patch(UNET, features * 5)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="light"):
        T2IAdapterConfig(kind="lihgt")  # type: ignore[arg-type]
