"""IP-Adapters against diffusers: projections, and attention inside a U-Net with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sfumato.checkpoints.controls.adapters_layouts import ip_pairs
from sfumato.checkpoints.layouts.tables import pairs, to_foreign
from sfumato.errors import InputError
from sfumato.families import FAMILIES
from sfumato.nn.ip_adapter import IPAdapter, IPAdapterConfig, image_layers, image_prompt_patch
from sfumato.nn.patches import combine_patches, perturbed_attention
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.runtime import shapes_only

UNET = UNetConfig(
    in_channels=4, out_channels=4, model_channels=16, num_res_blocks=1, attention_resolutions=(1, 2),
    channel_mult=(1, 2, 4), num_heads=2, use_spatial_transformer=True, context_dim=12, num_groups=8,
)  # fmt: skip
WIDTHS = (16, 32, 32, 32, 16, 16, 64)  # encoder's, decoder's, middle's
PLAIN = IPAdapterConfig(WIDTHS, context_dim=12, image_dim=20)
CONFIGS = {
    "plain": PLAIN,
    "plus": replace(PLAIN, kind="plus", num_tokens=6, resampler_dim=24, num_heads=2, depth=4),
    "full": replace(PLAIN, kind="full"),
}


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(network: nn.Module, seed: int = 0) -> None:
    for parameter in network.parameters():
        generator = torch.Generator().manual_seed(parameter.numel() + seed)
        nn.init.normal_(parameter, std=0.15, generator=generator)


@pytest.fixture(scope="module")
def unet() -> UNet:
    network = UNet(UNET).eval()
    draw(network)
    return network


def adapter_of(name: str, seed: int = 0) -> IPAdapter:
    adapter = IPAdapter(CONFIGS[name]).eval()
    draw(adapter, seed)
    return adapter


def released(adapter: IPAdapter) -> dict[str, dict[str, Tensor]]:
    """The adapter as its authors' files hold it: two tables."""
    tables: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in to_foreign(ip_pairs(adapter.config), adapter.state_dict()).items():
        table, _, rest = name.partition(".")
        tables[table][rest] = value
    return tables


def reference(unet: UNet, adapters: list[IPAdapter]) -> Any:
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, cross_attention_dim=12, attention_head_dim=2, norm_num_groups=8,
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_foreign(pairs("unet", UNET, "diffusers"), unet.state_dict()))
    theirs._load_ip_adapter_weights([released(one) for one in adapters], low_cpu_mem_usage=False)
    return theirs


SEEN = {"plain": seeded(5, 2, 20), "plus": seeded(6, 2, 9, 20), "full": seeded(7, 2, 9, 20)}
X, T, CONTEXT = seeded(0, 2, 4, 12, 8), torch.tensor([3, 700]), seeded(1, 2, 5, 12)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_tokens_are_those_of_diffusers(unet: UNet, name: str) -> None:
    adapter = adapter_of(name)
    theirs = reference(unet, [adapter]).encoder_hid_proj.image_projection_layers[0]
    found, expected = adapter(SEEN[name]), theirs(SEEN[name])
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5
    assert expected.std() > 0.05


@pytest.mark.parametrize("names", [["plain"], ["plus"], ["plain", "plus"]])
@torch.no_grad()
def test_inside_a_unet_they_act_as_in_diffusers(unet: UNet, names: list[str]) -> None:
    adapters = [adapter_of(name, seed) for seed, name in enumerate(names)]
    scales = [0.7, -0.4][: len(names)]
    theirs = reference(unet, adapters)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = scales
    seen = [SEEN[name] for name in names]
    expected = theirs(
        X, T, CONTEXT, added_cond_kwargs={"image_embeds": [one[:, None] for one in seen]}
    ).sample
    tokens = [adapter(one) for adapter, one in zip(adapters, seen, strict=True)]
    found = unet(X, T, CONTEXT, patch=image_prompt_patch(unet, adapters, tokens, scales))
    assert (found - expected).abs().max() <= 1e-5
    assert (found - unet(X, T, CONTEXT)).abs().max() > 0.003


@torch.no_grad()
def test_it_shares_a_network_with_other_patches(unet: UNet) -> None:
    adapter = adapter_of("plain")
    patch = image_prompt_patch(unet, [adapter], [adapter(SEEN["plain"])], [1.0])
    other = perturbed_attention(unet)
    both = unet(X, T, CONTEXT, patch=combine_patches(patch, other))
    assert torch.equal(both, unet(X, T, CONTEXT, patch=combine_patches(other, patch)))
    for alone in (patch, other):
        assert (both - unet(X, T, CONTEXT, patch=alone)).abs().max() > 1e-4


@torch.no_grad()
def test_at_scale_0_nothing_changes(unet: UNet) -> None:
    adapter = adapter_of("plain")
    patch = image_prompt_patch(unet, [adapter], [adapter(SEEN["plain"])], [0.0])
    assert torch.equal(unet(X, T, CONTEXT, patch=patch), unet(X, T, CONTEXT))


def test_the_full_size_has_the_published_layers() -> None:
    """ip-adapter_sd15: 16 layers numbered 1, 3, ... 31; "only 22M parameters" (Ye et al. 2023)."""
    sd1 = FAMILIES["sd1"].unet
    assert sd1 is not None
    with shapes_only():
        unet = UNet(sd1)
        layers = image_layers(unet)
        widths = tuple(unet.get_parameter(f"{name}.to_q.weight").shape[0] for name in layers)
        config = IPAdapterConfig(widths, context_dim=768, image_dim=1024)
        adapter = IPAdapter(config)
    names = [pair.foreign[0] for pair in ip_pairs(config)]
    assert widths == (320, 320, 640, 640, 1280, 1280, *[1280] * 3, *[640] * 3, *[320] * 3, 1280)
    assert [name for name in names if "to_k_ip" in name] == [
        f"ip_adapter.{i}.to_k_ip.weight" for i in range(1, 32, 2)
    ]
    assert {pair.native for pair in ip_pairs(config)} == set(adapter.state_dict())
    count = sum(parameter.numel() for parameter in adapter.parameters())
    assert count == 22_319_616


def test_one_for_another_unet_is_refused(unet: UNet) -> None:
    adapter = IPAdapter(replace(PLAIN, widths=WIDTHS[:-1]))
    with pytest.raises(InputError, match="for 6 attention layers"):
        image_prompt_patch(unet, [adapter], [torch.zeros(2, 4, 12)], [1.0])


def test_what_another_image_encoder_sees_is_refused() -> None:
    with pytest.raises(InputError, match=r"plain adapter takes \(b, 20\)"):
        adapter_of("plain")(torch.zeros(2, 9, 20))


def test_a_network_without_context_has_no_layers_for_it() -> None:
    assert image_layers(UNet(replace(UNET, context_dim=None))) == []
