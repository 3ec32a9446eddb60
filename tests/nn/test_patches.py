"""Patches against diffusers with the same weights: attention perturbed, smoothed and kept; FreeU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, PAGIdentitySelfAttnProcessor2_0
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import (
    CrossAttnStoreProcessor,
)
from torch import Tensor, nn

from sfumato.checkpoints.layouts.tables import pairs, to_foreign
from sfumato.errors import InputError
from sfumato.nn.attention import attend
from sfumato.nn.patches import (
    choose_layers,
    combine_patches,
    freeu,
    kept_attention,
    low_scaled,
    perturbed_attention,
    self_attention_layers,
    smoothed_attention,
)
from sfumato.nn.unet import Patch, UNet, UNetConfig

CONFIG = UNetConfig(
    in_channels=4, out_channels=4, model_channels=16, num_res_blocks=1, attention_resolutions=(2, 4),
    channel_mult=(1, 2, 4), num_heads=2, use_spatial_transformer=True, context_dim=12, num_groups=8,
)  # fmt: skip
PLAIN = replace(CONFIG, use_spatial_transformer=False, context_dim=None)
WITHOUT_CONTEXT = replace(CONFIG, context_dim=None)
MIDDLE = "middle_block.1.transformer_blocks.0.attn1"


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, T, CONTEXT = seeded(0, 2, 4, 12, 16), torch.tensor([3, 700]), seeded(1, 2, 5, 12)


def build(config: UNetConfig) -> UNet:
    network = UNet(config).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15, generator=torch.Generator().manual_seed(parameter.numel()))
    return network


@pytest.fixture(scope="module")
def ours() -> UNet:
    return build(CONFIG)


@pytest.fixture
def theirs(ours: UNet) -> diffusers.UNet2DConditionModel:
    network = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, cross_attention_dim=12, attention_head_dim=2, norm_num_groups=8,
    ).eval()  # fmt: skip
    network.load_state_dict(to_foreign(pairs("unet", CONFIG, "diffusers"), ours.state_dict()))
    return network


@torch.no_grad()
def run(network: UNet, patch: Patch | None = None, x: Tensor = X) -> Tensor:
    context = None if network.config.context_dim is None else CONTEXT[: x.shape[0]]
    return network(x, T[: x.shape[0]], context=context, patch=patch)


@torch.no_grad()
def run_theirs(network: diffusers.UNet2DConditionModel, times: int = 1) -> Tensor:
    return network(X.repeat(times, 1, 1, 1), T.repeat(times), CONTEXT.repeat(times, 1, 1)).sample[-2:]


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def test_without_patches_both_are_the_same(ours: UNet, theirs: diffusers.UNet2DConditionModel) -> None:
    assert difference(run(ours), run_theirs(theirs)) <= 1e-5
    assert run(ours).std() > 0.1


# Choosing layers


def test_self_attention_layers(ours: UNet) -> None:
    blocks = ("input_blocks.3.1", "input_blocks.5.1", "output_blocks.0.1", "output_blocks.1.1",
              "output_blocks.2.1", "output_blocks.3.1", "middle_block.1")  # fmt: skip
    found = self_attention_layers(ours)
    assert sorted(found) == sorted(f"{block}.transformer_blocks.0.attn1" for block in blocks)
    assert self_attention_layers(build(PLAIN))[2:4] == ["middle_block.1", "output_blocks.0.1"]
    both = self_attention_layers(build(WITHOUT_CONTEXT))
    assert len(both) == 14 and "middle_block.1.transformer_blocks.0.attn2" in both


def test_choosing_layers_by_what_they_lie_in(ours: UNet) -> None:
    assert choose_layers(ours, ["middle_block"]) == [MIDDLE]
    assert choose_layers(ours, [MIDDLE]) == [MIDDLE]
    chosen = choose_layers(ours, ["output_blocks.1", "middle_block.1", "input_blocks"])
    assert len(chosen) == 4 and chosen == [name for name in self_attention_layers(ours) if name in chosen]


@pytest.mark.parametrize(
    "prefix", ["middle", "output_blocks.9", "middle_block.0", "", "middle_block.1.attn2"]
)
def test_layers_that_are_not_there_are_refused_with_those_that_are(ours: UNet, prefix: str) -> None:
    with pytest.raises(InputError, match="no self-attention in") as caught:
        choose_layers(ours, ["middle_block", prefix])
    assert MIDDLE in caught.value.hint and "output_blocks.0.1.transformer_blocks.0.attn1" in caught.value.hint


def test_a_network_whose_middle_is_gone_has_nothing_to_disturb_there() -> None:
    with pytest.raises(InputError, match="'middle_block'"):
        perturbed_attention(build(replace(CONFIG, middle="residual")))


# Perturbed, smoothed, kept


@pytest.mark.parametrize(
    ("layers", "place"),
    [(("middle_block",), "mid_block"), (("output_blocks.1", "output_blocks.0"), "up_blocks.0"),
     (("output_blocks", "middle_block", "input_blocks"), "")],
)  # fmt: skip
def test_perturbed_attention_equals_diffusers(
    ours: UNet, theirs: diffusers.UNet2DConditionModel, layers: tuple[str, ...], place: str
) -> None:
    for name, module in theirs.named_modules():
        if isinstance(module, Attention) and name.startswith(place) and name.endswith("attn1"):
            module.set_processor(PAGIdentitySelfAttnProcessor2_0())  # pyright: ignore[reportArgumentType]
    got = run(ours, perturbed_attention(ours, layers))
    assert difference(got, run_theirs(theirs, times=2)) <= 1e-5
    assert difference(got, run(ours)) > 1e-3


@pytest.mark.parametrize("config", [PLAIN, WITHOUT_CONTEXT])
def test_networks_without_a_context_are_disturbed_too(config: UNetConfig) -> None:
    network = build(config)
    assert difference(run(network, perturbed_attention(network)), run(network)) > 1e-3
    assert difference(run(network, smoothed_attention(network)), run(network)) > 1e-4


def test_smoothed_attention_equals_attention_with_mean_queries(ours: UNet) -> None:
    def literal(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if name != MIDDLE:
            return attend(name, q, k, v)
        scores = torch.einsum("bhd,bhkd->bhk", q.sum(dim=2) / q.shape[2], k) / q.shape[3] ** 0.5
        out = torch.einsum("bhk,bhkd->bhd", scores.softmax(dim=-1), v)
        return out[:, :, None].repeat(1, 1, q.shape[2], 1)

    got = run(ours, smoothed_attention(ours))
    assert difference(got, run(ours, Patch(attention=literal))) <= 1e-5
    assert difference(got, run(ours)) > 1e-4


def test_kept_attention_equals_diffusers(ours: UNet, theirs: diffusers.UNet2DConditionModel) -> None:
    patch, take = kept_attention(ours)
    got = run(ours, patch)
    assert torch.equal(got, run(ours))
    received = take()
    store = CrossAttnStoreProcessor()
    theirs.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").set_processor(store)  # pyright: ignore
    run_theirs(theirs)
    assert isinstance(store.attention_probs, Tensor)
    expected = store.attention_probs.unflatten(0, (2, 2)).mean(1).sum(1)
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(received.mean(dim=1), torch.ones(2))
    assert received.shape == (2, 3 * 4) and received.std() > 1e-3


def test_kept_attention_is_that_of_the_last_pass_and_is_taken_once(ours: UNet) -> None:
    patch, take = kept_attention(ours, "output_blocks")
    run(ours, patch)
    run(ours, patch, X[:1])
    assert take().shape == (1, 3 * 4)
    with pytest.raises(IndexError):
        take()


# FreeU


@pytest.mark.parametrize("factors", [(1.5, 1.6, 0.9, 0.2), (1.2, 1.4, 0.5, 1.3)])
@pytest.mark.parametrize("size", [(12, 16), (8, 8), (4, 20)])
def test_freeu_equals_diffusers(
    ours: UNet, theirs: diffusers.UNet2DConditionModel, factors: tuple[float, ...], size: tuple[int, int]
) -> None:
    b1, b2, s1, s2 = factors
    theirs.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)
    x = seeded(7, 2, 4, *size)
    with torch.no_grad():
        expected = theirs(x, T, CONTEXT).sample
    got = run(ours, freeu(CONFIG, b1, b2, s1, s2), x)
    assert difference(got, expected) <= 1e-5
    assert difference(got, run(ours, x=x)) > 1e-3


def test_freeu_of_factors_1_changes_nothing(ours: UNet) -> None:
    for version in (1, 2):
        assert difference(run(ours, freeu(CONFIG, 1, 1, 1, 1, version=version)), run(ours)) <= 1e-5


def test_freeu_by_structure() -> None:
    """Half of the channels times 1 + (b - 1) * (mean - min) / (max - min), position by position."""
    h, skip = seeded(3, 2, 6, 4, 4), seeded(4, 2, 3, 4, 4)
    got, same = freeu(CONFIG, 1.5, 1.0, 1.0, 1.0, version=2).skip(1, h, skip)
    torch.testing.assert_close(same, skip)
    for image in range(2):
        mean = h[image].sum(dim=0) / 6
        share = (mean - mean.min()) / (mean.max() - mean.min())
        for channel in range(6):
            expected = h[image, channel] * (1 + 0.5 * share) if channel < 3 else h[image, channel]
            torch.testing.assert_close(got[image, channel], expected)
    flat = torch.ones(2, 6, 4, 4)
    assert torch.equal(freeu(CONFIG, version=2).skip(0, flat, skip)[0], flat)


def test_freeu_touches_the_two_deepest_levels_alone() -> None:
    h, skip = seeded(3, 2, 6, 4, 4), seeded(4, 2, 3, 4, 4)
    before = h.clone(), skip.clone()
    patch = freeu(CONFIG, 2.0, 3.0, 0.5, 0.25)
    factors = [(patch.skip(i, h, skip)[0] / h)[0, 0, 0, 0].item() for i in range(6)]
    assert factors == pytest.approx([2, 2, 3, 3, 1, 1])
    assert all(value is given for value, given in zip(patch.skip(4, h, skip), (h, skip), strict=True))
    assert torch.equal(h, before[0]) and torch.equal(skip, before[1])


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 1, 1), (1, 2, 2, 6, 4)])
def test_low_frequencies_of_any_rank(shape: tuple[int, ...]) -> None:
    """What is taken away has the four (2 to the rank) lowest frequencies, and 0 takes all of the mean."""
    values = seeded(5, *shape)
    axes = tuple(range(2, len(shape)))
    rest = low_scaled(values, 0.0)
    torch.testing.assert_close(rest.mean(dim=axes), torch.zeros(shape[:2]), atol=1e-6, rtol=0)
    torch.testing.assert_close(low_scaled(values, 0.3), 0.3 * values + 0.7 * rest)
    torch.testing.assert_close(low_scaled(values, 1.0), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_freeu_keeps_the_number_format(dtype: torch.dtype) -> None:
    h, skip = seeded(3, 2, 6, 3, 5).to(dtype), seeded(4, 2, 3, 3, 5).to(dtype)
    for version in (1, 2):
        got = freeu(CONFIG, version=version).skip(0, h, skip)
        assert [value.dtype for value in got] == [dtype, dtype]
        assert all(bool(value.isfinite().all()) for value in got)


# Several at once


def test_patches_compose(ours: UNet) -> None:
    perturbed, free = perturbed_attention(ours), freeu(CONFIG)
    both, other = combine_patches(perturbed, free), combine_patches(free, perturbed)
    by_hand = Patch(attention=perturbed.attention, skip=free.skip)
    assert torch.equal(run(ours, both), run(ours, by_hand))
    assert torch.equal(run(ours, other), run(ours, by_hand))
    assert difference(run(ours, both), run(ours, perturbed)) > 1e-3
    assert torch.equal(run(ours, combine_patches(Patch(), Patch())), run(ours))


def test_blocks_go_through_the_first_patch_then_the_second() -> None:
    first = Patch(encoder=lambda i, h: h + i, skip=lambda i, h, skip: (h + 1, skip * 2))
    second = Patch(encoder=lambda i, h: h * 10, skip=lambda i, h, skip: (h * 10, skip + 1))
    both = combine_patches(first, second)
    assert both.encoder(3, torch.tensor(1.0)) == 40
    assert both.skip(0, torch.tensor(1.0), torch.tensor(5.0)) == (20, 11)


def test_attention_patches_of_other_layers_and_of_the_same(ours: UNet) -> None:
    low, high = perturbed_attention(ours), perturbed_attention(ours, ["output_blocks.3"])
    together = run(ours, perturbed_attention(ours, ["middle_block", "output_blocks.3"]))
    assert torch.equal(run(ours, combine_patches(low, high)), together)
    assert torch.equal(run(ours, combine_patches(high, low)), together)
    smooth = smoothed_attention(ours)
    assert torch.equal(run(ours, combine_patches(low, smooth)), run(ours, low))  # the first decides
    patch, take = kept_attention(ours)
    assert torch.equal(run(ours, combine_patches(patch, smooth)), run(ours, smooth))  # and this one looks on
    assert take().shape == (2, 12)


def test_a_patch_of_every_layer_comes_last(ours: UNet) -> None:
    def everywhere(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(name, q * 0.5, k, v)

    patch, low = Patch(attention=everywhere), perturbed_attention(ours)
    both = run(ours, combine_patches(low, patch))
    assert difference(both, run(ours, patch)) > 1e-4 and difference(both, run(ours, low)) > 1e-4
    assert torch.equal(
        run(ours, combine_patches(patch, freeu(CONFIG, 1, 1, 1, 1))),
        run(ours, combine_patches(freeu(CONFIG, 1, 1, 1, 1), patch)),
    )
    with pytest.raises(InputError, match="every layer"):
        combine_patches(patch, low)


@pytest.mark.parametrize("make", [perturbed_attention, smoothed_attention, lambda network: freeu(CONFIG)])
def test_an_image_does_not_depend_on_its_batch(ours: UNet, make: Any) -> None:
    together = run(ours, make(ours))
    alone = run(ours, make(ours), X[:1])
    assert difference(alone, together[:1]) <= 1e-5
