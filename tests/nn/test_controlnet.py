"""Control networks against diffusers' with the same weights, and how they start from a U-Net."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sfumato.checkpoints.controls.layouts import control_pairs
from sfumato.checkpoints.layouts.tables import to_foreign
from sfumato.errors import InputError
from sfumato.families import FAMILIES
from sfumato.nn.controlnet import NEW, ControlNet, ControlNetConfig, controlnet_from_unet
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.runtime import shapes_only

Network = TypeVar("Network", bound=nn.Module)
ENCODER = UNetConfig(
    in_channels=4, out_channels=4, model_channels=16, num_res_blocks=2, attention_resolutions=(1, 2),
    channel_mult=(1, 2, 4), num_heads=2, use_spatial_transformer=True, context_dim=12, num_groups=8,
)  # fmt: skip
SD1 = ControlNetConfig(ENCODER, hint_widths=(4, 6, 8, 10))
SD2 = replace(
    SD1, encoder=replace(ENCODER, num_heads=-1, num_head_channels=8, use_linear_in_transformer=True)
)
SDXL = replace(
    SD1,
    encoder=replace(
        ENCODER, attention_resolutions=(2, 4), transformer_depth=(1, 2, 3), use_linear_in_transformer=True,
        num_classes="sequential", adm_in_channels=8 + 6 * 256,
    ),
)  # fmt: skip
BOTH = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
THEIRS: dict[str, dict[str, Any]] = {
    "sd1": {"down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "attention_head_dim": 2},
    "sd2": {"down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "attention_head_dim": (2, 4, 8), "use_linear_projection": True},
    "sdxl": {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "attention_head_dim": 2, "use_linear_projection": True,
             "transformer_layers_per_block": (1, 2, 3), "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 8 + 6 * 256},
}  # fmt: skip


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(network: Network, deviation: float = 0.15) -> Network:
    """The network with weights that depend on their sizes, those that begin at zero too."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=deviation, generator=torch.Generator().manual_seed(parameter.numel()))
    return network.eval()


def reference(family: str, network: ControlNet) -> diffusers.ControlNetModel:
    model = diffusers.ControlNetModel(
        block_out_channels=(16, 32, 64), layers_per_block=2, cross_attention_dim=12, norm_num_groups=8,
        conditioning_embedding_out_channels=(4, 6, 8, 10), **THEIRS[family],
    ).eval()  # fmt: skip
    model.load_state_dict(to_foreign(control_pairs(network.config), network.state_dict()))
    return model


X, T, CONTEXT, HINT = (
    seeded(0, 2, 4, 8, 12),
    torch.tensor([3, 700]),
    seeded(1, 2, 5, 12),
    seeded(2, 2, 3, 64, 96),
)


@pytest.mark.parametrize("family", BOTH)
@torch.no_grad()
def test_residuals_are_those_of_diffusers(family: str) -> None:
    ours = drawn(ControlNet(BOTH[family]))
    theirs = reference(family, ours)
    vector, more = None, {}
    if family == "sdxl":
        pooled, sizes = seeded(3, 2, 8), torch.tensor([[8.0, 12, 0, 0, 8, 12]] * 2)
        sinusoids = theirs.add_time_proj(sizes.flatten()).reshape(2, -1)
        vector, more = torch.cat([pooled, sinusoids], 1), {"text_embeds": pooled, "time_ids": sizes}
    found = ours(X, T, HINT, CONTEXT, vector)
    down, middle = theirs(X, T, CONTEXT, HINT, added_cond_kwargs=more, return_dict=False)
    assert len(found) == len(down) + 1 == len(ours.input_blocks) + 1
    for a, b in zip(found, [*down, middle], strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())
    assert all(residual.std() > 0.01 for residual in found)


@torch.no_grad()
def test_one_started_from_a_unet_adds_nothing_at_first() -> None:
    unet = drawn(UNet(ENCODER))
    network = controlnet_from_unet(unet, SD1)
    residuals = network(X, T, HINT, CONTEXT)
    assert all(not residual.any() for residual in residuals)
    assert torch.equal(unet(X, T, CONTEXT, residuals=residuals), unet(X, T, CONTEXT))
    theirs = unet.state_dict()
    copied = {name: value for name, value in network.state_dict().items() if not name.startswith(NEW)}
    assert copied and all(torch.equal(value, theirs[name]) for name, value in copied.items())
    first = network.state_dict()["input_blocks.0.0.weight"]
    assert first.data_ptr() != theirs["input_blocks.0.0.weight"].data_ptr()


def test_one_of_other_options_does_not_start_from_a_unet() -> None:
    with pytest.raises(InputError, match=r"not as in the U-Net: input_blocks"):
        controlnet_from_unet(UNet(ENCODER), replace(SD1, encoder=replace(ENCODER, channel_mult=(1, 2, 2))))


def test_by_default_it_has_the_options_of_the_unet() -> None:
    assert controlnet_from_unet(UNet(ENCODER)).config == ControlNetConfig(ENCODER)


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 1, 64, 96), (1, 3, 64, 96), (2, 3, 64, 88)])
def test_hints_of_other_sizes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must be \(2, 3, 64, 96\)"):
        ControlNet(SD1)(X, T, torch.zeros(shape), CONTEXT)


def test_options_without_layers_are_refused() -> None:
    with pytest.raises(InputError, match="make no layers"):
        ControlNetConfig(ENCODER, hint_widths=())


def test_the_full_size_has_the_published_number_of_parameters() -> None:
    encoder = FAMILIES["sd1"].unet
    assert encoder is not None
    with shapes_only():
        network = ControlNet(ControlNetConfig(encoder))
    assert sum(parameter.numel() for parameter in network.parameters()) == 361_279_120


# As in the config.json of lllyasviel/sd-controlnet-canny, thibaud/controlnet-sd21-canny-diffusers and
# diffusers/controlnet-canny-sdxl-1.0.
FULL_SIZE: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {
        "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FULL_SIZE)
def test_the_full_size_is_the_one_of_diffusers(family: str) -> None:
    """Its own names are those of cldm.py, as control_v11p_sd15_canny.pth has them after `control_model.`."""
    encoder = FAMILIES[family].unet
    assert encoder is not None
    with shapes_only():
        ours = ControlNet(ControlNetConfig(encoder))
    with torch.device("meta"):
        theirs = diffusers.ControlNetModel(**FULL_SIZE[family])
    given = {
        name: shape
        for pair in control_pairs(ours.config)
        for name, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True)
    }
    assert given == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    own = ours.state_dict()
    assert {pair.native: pair.shape for pair in control_pairs(ours.config)} == {
        name: tuple(value.shape) for name, value in own.items()
    }
    hints = [f"input_hint_block.{number}.weight" for number in range(0, 16, 2)]
    zeros = [f"zero_convs.{i}.0.weight" for i in range(len(ours.input_blocks))]
    assert {*hints, *zeros, "middle_block_out.0.weight", "input_blocks.0.0.weight"} <= own.keys()


@torch.no_grad()
def test_global_averages_have_one_place() -> None:
    averaging, plain = drawn(ControlNet(replace(SD1, global_average=True))), drawn(ControlNet(SD1))
    for mean, whole in zip(averaging(X, T, HINT, CONTEXT), plain(X, T, HINT, CONTEXT), strict=True):
        assert mean.shape[2:] == (1, 1)
        assert (mean - whole.mean(dim=(2, 3), keepdim=True)).abs().max() <= 1e-5
