"""U-Nets whose levels read the context in place of the picture: Stable Diffusion's x4 upscaler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.checkpoints.layouts.diffusers_unet import unet_values
from sfumato.checkpoints.layouts.tables import pairs, to_foreign
from sfumato.errors import InputError
from sfumato.families import FAMILIES
from sfumato.nn.patches import perturbed_attention, self_attention_layers
from sfumato.nn.unet import UNet
from sfumato.nn.unet_config import UNetConfig

TINY = UNetConfig(
    in_channels=7, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=(2, 4),
    channel_mult=(1, 2, 2), num_heads=4, use_spatial_transformer=True, context_dim=24, legacy=False,
    use_linear_in_transformer=True, num_classes=50, disable_self_attentions=(True, True, False),
)  # fmt: skip
PARAMETERS = 473_398_020  # of the released one, as diffusers builds it


def random_unet(config: UNetConfig) -> UNet:
    generator = torch.Generator().manual_seed(0)
    network = UNet(config)
    for parameter in network.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1 * values
    return network.eval()


@pytest.fixture(scope="module")
def network() -> UNet:
    return random_unet(TINY)


def inputs(size: tuple[int, int] = (8, 12)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, *size, generator=generator)
    context = torch.randn(2, 5, 24, generator=generator)
    return x, torch.tensor([3, 700]), context, torch.tensor([20, 7])


@torch.no_grad()
def test_parity_with_the_reference(network: UNet) -> None:
    import diffusers

    values: dict[str, Any] = {
        name: value for name, value in unet_values(TINY, 8).items() if not name.startswith("_")
    }
    assert values["only_cross_attention"] == [True, True, False] and values["num_class_embeds"] == 50
    theirs = diffusers.UNet2DConditionModel(**values).eval()
    state = to_foreign(pairs("unet", TINY, "diffusers"), network.state_dict())
    theirs.load_state_dict(state, strict=True)
    x, t, context, levels = inputs()
    expected = theirs(x, t, encoder_hidden_states=context, class_labels=levels).sample
    drawn = network(x, t, context, levels)
    assert (drawn - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (drawn - network(x, t, context, levels + 1)).abs().max() > 1e-3
    assert (drawn - network(x, t, context.flip(2), levels)).abs().max() > 1e-3


def test_names_are_those_without_the_option(network: UNet) -> None:
    plain = UNet(replace(TINY, disable_self_attentions=None)).state_dict()
    own = network.state_dict()
    assert list(own) == list(plain)
    changed = {name for name in own if own[name].shape != plain[name].shape}
    places = ("input_blocks.3.1", "output_blocks.2.1", "output_blocks.3.1")
    assert changed == {
        f"{place}.transformer_blocks.0.attn1.{key}.weight" for place in places for key in ("to_k", "to_v")
    }
    assert own["input_blocks.3.1.transformer_blocks.0.attn1.to_k.weight"].shape == (64, 24)


def test_the_table_of_names_has_every_tensor(network: UNet) -> None:
    for layout in ("ldm", "diffusers"):
        table = pairs("unet", TINY, layout)
        assert {pair.native: pair.shape for pair in table} == {
            name: tuple(value.shape) for name, value in network.state_dict().items()
        }


@torch.no_grad()
def test_such_a_level_does_not_mix_positions() -> None:
    """Attention to the context alone treats every position by itself."""
    config = replace(
        TINY, attention_resolutions=(1,), channel_mult=(1,), disable_self_attentions=(True,), num_res_blocks=1
    )
    for disabled, moved in ((True, False), (False, True)):
        network = UNet(replace(config, disable_self_attentions=(disabled,)))
        block = network.get_submodule("input_blocks.1.1.transformer_blocks.0")
        for parameter in block.parameters():
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.2
        x, context = torch.randn(1, 32, 4, 4), torch.randn(1, 5, 24)
        tokens = x.flatten(2).transpose(1, 2)
        other = tokens.clone()
        other[:, 0] *= -1
        change = (block(tokens, context) - block(other, context))[:, 1:].abs().max()
        assert (change > 1e-4) == moved


def test_patches_of_self_attention_leave_it_out(network: UNet) -> None:
    layers = self_attention_layers(network)
    assert "middle_block.1.transformer_blocks.0.attn1" in layers
    assert not any(name.startswith(("input_blocks.3", "output_blocks.2")) for name in layers)
    with pytest.raises(InputError, match=r"no self-attention in 'input_blocks.3'"):
        perturbed_attention(network, ["input_blocks.3"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"disable_self_attentions": (True, False)}, "3 as channel_mult has levels"),
        ({"context_dim": None}, "needs a context_dim"),
    ],
)
def test_options_that_contradict(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        replace(TINY, **changes)


def test_parameters_of_the_released_one() -> None:
    config = FAMILIES["sd-x4-upscaler"].unet
    assert config is not None
    with torch.device("meta"):
        network = UNet(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS
    inner = "output_blocks.5.1.transformer_blocks.0.attn1.to_k.weight"
    assert network.state_dict()[inner].shape == (512, 1024)
