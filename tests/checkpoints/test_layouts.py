"""Tables of names: complete, exactly invertible, and equal to what diffusers and transformers build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import Tensor, nn

from sfumato.checkpoints.detect.families import UNETS
from sfumato.checkpoints.layouts.tables import LAYOUTS, generate, pairs, prefix, to_foreign, to_native
from sfumato.errors import InputError
from sfumato.families import AUTOENCODERS, CLIP_L, OPENCLIP_BIGG, OPENCLIP_H
from sfumato.nn.attention import AttentionBlock
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.bert import BERTConfig, BERTEmbedder
from sfumato.nn.classes import ClassEmbedder, ClassEmbedderConfig
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.nn.vq import VQModel
from sfumato.presets import ModelConfig
from sfumato.runtime import shapes_only

Shapes = dict[str, tuple[int, ...]]

TEXTS = {"clip-l": CLIP_L, "openclip-h": OPENCLIP_H, "openclip-bigg": OPENCLIP_BIGG}
PUBLISHED = {  # millions of parameters: model cards, CompVis' table of the zoo, this package's notes
    "sd1": 859.52, "sd2": 865.91, "sdxl": 2567.46, "ldm-unconditional": 274.06, "ldm-churches": 294.97,
    "ldm-cin256-v2": 400.92, "ldm-text2img-large": 872.30, "ldm-super-resolution": 113.62,
    "ldm-inpaint": 387.25,
    "bk-sdm-base": 579.38, "bk-sdm-small": 482.35, "bk-sdm-tiny": 323.38, "ssd-1b": 1331.33,
    "segmind-vega": 745.23, "koala-700m": 782.82, "koala-1b": 1161.18,
}  # fmt: skip


def network(part: str, config: Any) -> type[nn.Module]:
    if part == "autoencoder":
        return AutoencoderKL if config.n_embed is None else VQModel
    return {
        "unet": UNet, "text": CLIPTextEncoder, "text2": CLIPTextEncoder, "bert": BERTEmbedder,
        "classes": ClassEmbedder,
    }[part]  # fmt: skip


def shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def foreign_shapes(part: str, config: Any, layout: str, variant: str = "") -> Shapes:
    """The layout's tensors by the table, each name with one shape."""
    found: Shapes = {}
    for pair in pairs(part, config, layout, variant):
        for name, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True):
            assert found.setdefault(name, shape) == shape, name
    return found


# Of those that differ in the number of input channels alone, one.
SHAPES = [name for name in UNETS if not name.endswith(("-inpaint", "-pix2pix")) or name == "ldm-inpaint"]
ALL = [
    *(pytest.param("unet", UNETS[name], id=name) for name in SHAPES),
    *(pytest.param("autoencoder", config, id=name) for name, config in AUTOENCODERS.items()),
    *(pytest.param("text", config, id=name) for name, config in TEXTS.items()),
    pytest.param("bert", BERTConfig(), id="bert"),
    pytest.param("classes", ClassEmbedderConfig(), id="classes"),
]


@pytest.mark.parametrize(("part", "config"), ALL)
def test_a_table_has_every_tensor_of_the_network_once_in_its_shape(part: str, config: Any) -> None:
    with shapes_only():
        wanted = shapes_of(network(part, config)(config))
    for layout in LAYOUTS if part != "classes" else ("ldm",):
        table = pairs(part, config, layout)
        assert len({pair.native for pair in table}) == len(table)
        assert {pair.native: pair.shape for pair in table} == wanted
        for pair in table:
            shapes = pair.foreign_shapes()
            assert pair.transform.native_shape(shapes) == pair.shape, pair
        # Every foreign tensor is made of whole natives: once, or of all of its slices.
        makers: dict[str, list[tuple[int, int]]] = {}
        for pair in table:
            for name in pair.foreign:
                makers.setdefault(name, []).append(pair.transform.piece)
        for name, pieces in makers.items():
            assert sorted(pieces) == [(i, len(pieces)) for i in range(len(pieces))], name


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_as_many_parameters_as_was_published(name: str) -> None:
    count = sum(prod(pair.shape) for pair in pairs("unet", UNETS[name], "ldm"))
    assert count / 1e6 == pytest.approx(PUBLISHED[name], abs=0.006)


TINY_UNET = UNetConfig(
    in_channels=4, out_channels=4, model_channels=16, num_res_blocks=1, attention_resolutions=(1, 2),
    channel_mult=(1, 2), num_heads=2, use_spatial_transformer=True, context_dim=12, num_groups=8,
)  # fmt: skip
TINY_PLAIN = replace(TINY_UNET, use_spatial_transformer=False, context_dim=None)
TINY_KL = AutoencoderConfig(
    resolution=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), num_groups=8
)
TINY_VQ = replace(TINY_KL, double_z=False, n_embed=11)
TINY_TEXT = CLIPTextConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=7, eos_token_id=39,
)  # fmt: skip
TINY_OPEN = replace(TINY_TEXT, hidden_act="gelu", pad_token_id=0, projection_dim=12)
TINY_BERT = BERTConfig(n_embed=16, n_layer=2, vocab_size=30, max_seq_len=5, heads=2, dim_head=4)
TINY = {
    "transformers": ("unet", TINY_UNET, ""),
    "linear": ("unet", replace(TINY_UNET, use_linear_in_transformer=True, adm_in_channels=6), ""),
    "no middle": ("unet", replace(TINY_UNET, middle="none", transformer_depth_output=(1, 2, 0, 3)), ""),
    "half a middle": ("unet", replace(TINY_UNET, middle="residual", num_classes="continuous"), ""),
    "plain": ("unet", replace(TINY_PLAIN, num_classes=5), ""),
    "plain, old": ("unet", TINY_PLAIN, "old"),
    "plain, new order": ("unet", replace(TINY_PLAIN, use_new_attention_order=True), ""),
    "residual resampling": ("unet", replace(TINY_PLAIN, resblock_updown=True, use_scale_shift_norm=True), ""),
    "pooling": ("unet", replace(TINY_PLAIN, conv_resample=False), ""),
    "volumes": ("unet", replace(TINY_PLAIN, dims=3), ""),
    "kl": ("autoencoder", TINY_KL, ""),
    "kl, old": ("autoencoder", TINY_KL, "old"),
    "kl, linear attention": ("autoencoder", replace(TINY_KL, attn_type="linear"), ""),
    "kl, pooling": ("autoencoder", replace(TINY_KL, attn_type="none", resamp_with_conv=False), ""),
    "vq": ("autoencoder", TINY_VQ, ""),
    "clip": ("text", TINY_TEXT, ""),
    "clip, bare": ("text", TINY_TEXT, "bare"),
    "openclip": ("text2", TINY_OPEN, ""),
    "bert": ("bert", TINY_BERT, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("part", "config", "variant"), TINY.values(), ids=list(TINY))
def test_tables_invert_exactly(part: str, config: Any, variant: str, layout: str) -> None:
    table = pairs(part, config, layout, variant)
    generator = torch.Generator().manual_seed(0)
    own = {pair.native: torch.randn(pair.shape, generator=generator) for pair in table}
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == shapes_of(
        network(part, config)(config)
    )

    theirs = to_foreign(table, own)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == foreign_shapes(
        part, config, layout, variant
    )
    back = to_native(table, theirs.__getitem__)
    assert_same(back, own)

    theirs = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in theirs.items()}
    assert_same(to_foreign(table, to_native(table, theirs.__getitem__)), theirs)


def assert_same(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(given[name], tensor), name


def unet_2d(config: UNetConfig) -> dict[str, Any]:
    """diffusers' options for a U-Net; of those that its folders were released with, all that make tensors."""
    levels = range(len(config.channel_mult))
    kind = "CrossAttn" if config.use_spatial_transformer else "Attn"
    blocks = [kind if config.attended(level) else "" for level in levels]
    options: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": tuple(config.model_channels * factor for factor in config.channel_mult),
        "layers_per_block": config.num_res_blocks,
        "down_block_types": tuple(f"{block}DownBlock2D" for block in blocks),
        "up_block_types": tuple(f"{block}UpBlock2D" for block in reversed(blocks)),
    }
    if not config.use_spatial_transformer:
        resample = "resnet" if config.resblock_updown else "conv"
        scale = "scale_shift" if config.use_scale_shift_norm else "default"
        if config.resblock_updown:
            names = [f"{block}DownBlock2D" if block else "ResnetDownsampleBlock2D" for block in blocks]
            options["down_block_types"] = tuple(names)
            options["up_block_types"] = tuple(
                f"{block}UpBlock2D" if block else "ResnetUpsampleBlock2D" for block in reversed(blocks)
            )
        return options | {
            "attn_norm_num_groups": 32,
            "downsample_type": resample, "upsample_type": resample, "resnet_time_scale_shift": scale,
            "attention_head_dim": 32,
        }  # fmt: skip
    options |= {
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": [config.depth(level) for level in levels],
        "use_linear_projection": config.use_linear_in_transformer,
        "attention_head_dim": 8,
    }
    if config.middle != "attention":
        options["mid_block_type"] = {"residual": "UNetMidBlock2D", "none": None}[config.middle]
    if config.disable_self_attentions is not None:
        options |= {"only_cross_attention": list(config.disable_self_attentions), "num_class_embeds": 1000,
                    "mid_block_only_cross_attention": False}  # fmt: skip
    if config.num_classes == "sequential":
        options |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": config.adm_in_channels,
        }  # fmt: skip
    if config.transformer_depth_output is not None:
        depths = iter(config.transformer_depth_output)
        levels_up = [
            [next(depths) for _ in range(config.residual_blocks(level) + 1)] for level in reversed(levels)
        ]
        options["reverse_transformer_layers_per_block"] = [
            [depth or 1 for depth in level] for level in levels_up
        ]
    return options


@pytest.mark.parametrize("name", SHAPES)
def test_unet_names_are_those_of_diffusers(name: str) -> None:
    config = UNETS[name]
    kind = diffusers.UNet2DConditionModel if config.use_spatial_transformer else diffusers.UNet2DModel
    with shapes_only():
        theirs = shapes_of(kind(**unet_2d(config)))
    assert foreign_shapes("unet", config, "diffusers") == theirs


def test_class_labels_are_those_of_diffusers() -> None:
    config = replace(UNETS["sd1"], num_res_blocks=1, num_classes=10)
    with shapes_only():
        theirs = shapes_of(diffusers.UNet2DConditionModel(**unet_2d(config), num_class_embeds=10))
    assert foreign_shapes("unet", config, "diffusers") == theirs


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_names_are_those_of_diffusers(name: str) -> None:
    config = AUTOENCODERS[name]
    levels = [config.resolution >> level in config.attn_resolutions for level in range(len(config.ch_mult))]
    options: dict[str, Any] = {
        "block_out_channels": config.widths,
        "layers_per_block": 2,
        "latent_channels": config.z_channels,
        "down_block_types": [f"{'Attn' if there else ''}DownEncoderBlock2D" for there in levels],
        "up_block_types": [f"{'Attn' if there else ''}UpDecoderBlock2D" for there in reversed(levels)],
        "mid_block_add_attention": config.attn_type != "none",
    }
    with shapes_only():
        if config.n_embed is None:
            theirs = shapes_of(diffusers.AutoencoderKL(**options))
        else:
            theirs = shapes_of(diffusers.VQModel(**options, num_vq_embeddings=config.n_embed))
    assert foreign_shapes("autoencoder", config, "diffusers") == theirs


@pytest.mark.parametrize("name", TEXTS)
def test_text_names_are_those_of_transformers(name: str) -> None:
    config = TEXTS[name]
    described = transformers.CLIPTextConfig(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        projection_dim=config.projection_dim or 512,
    )  # fmt: skip
    projected = config.projection_dim is not None
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    with shapes_only():
        theirs = shapes_of(kind(described))
    # From transformers 5 on the model without a projection lacks a level, which its files keep.
    bare = not any(key.startswith("text_model.") for key in theirs)
    assert foreign_shapes("text", config, "diffusers", "bare" if bare else "") == theirs


def test_bert_names_are_those_of_diffusers() -> None:
    config = BERTConfig(n_layer=2)
    described = LDMBertConfig(
        vocab_size=30522, max_position_embeddings=77, encoder_layers=2, encoder_ffn_dim=5120, d_model=1280
    )
    with shapes_only():
        theirs = shapes_of(LDMBertModel(described))
    unused = {name for name in theirs if name.startswith("to_logits.")}
    assert foreign_shapes("bert", config, "diffusers") == {
        name: shape for name, shape in theirs.items() if name not in unused
    }


@pytest.mark.parametrize("legacy_order", [True, False])
def test_plain_attention_computes_what_diffusers_computes(legacy_order: bool) -> None:
    """The head-interleaved rows of qkv come apart into the right q, k and v."""
    config = replace(
        TINY_PLAIN, use_new_attention_order=not legacy_order, attention_resolutions=(), num_heads=4
    )
    table = [pair for pair in pairs("unet", config, "diffusers") if pair.native.startswith("middle_block.1.")]
    ours = AttentionBlock(32, 4, use_new_attention_order=not legacy_order, num_groups=8)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    theirs = Attention(
        query_dim=32, heads=4, dim_head=8, norm_num_groups=8, bias=True, residual_connection=True,
        upcast_softmax=True, _from_deprecated_attn_block=True, eps=1e-5,
    )  # fmt: skip
    state = {f"middle_block.1.{name}": tensor for name, tensor in ours.state_dict().items()}
    converted = to_foreign(table, state)
    theirs.load_state_dict({name.removeprefix("mid_block.attentions.0."): t for name, t in converted.items()})
    x = torch.randn(2, 32, 5, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_open_clip_computes_what_torch_computes() -> None:
    """in_proj_weight is that of torch's own multi-head attention, which OpenCLIP uses."""
    ours = CLIPTextEncoder(TINY_OPEN)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    theirs = to_foreign(pairs("text2", TINY_OPEN, "ldm"), ours.state_dict())
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    start = "transformer.resblocks.1.attn."
    attention.load_state_dict(
        {name.removeprefix(start): theirs[name] for name in theirs if name.startswith(start)}
    )
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.full((7, 7), -torch.inf).triu(1)
    wanted = attention(x, x, x, attn_mask=mask, need_weights=False)[0]
    given = ours.get_submodule("text_model.encoder.layers.1.self_attn")(x)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    pooled = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    projected = ours.get_submodule("text_projection")(pooled)
    torch.testing.assert_close(projected, pooled @ theirs["text_projection"])


def test_prefixes_are_those_of_the_released_files() -> None:
    sd1 = ModelConfig("sd1", unet=UNETS["sd1"], text=CLIP_L)
    sd2 = ModelConfig("sd2", unet=UNETS["sd2"], text=OPENCLIP_H)
    sdxl = ModelConfig("sdxl", unet=UNETS["sdxl"], text=CLIP_L, text2=OPENCLIP_BIGG)
    zoo = ModelConfig("zoo", bert=BERTConfig(), classes=ClassEmbedderConfig())
    assert prefix("unet", "ldm", sd1) == "model.diffusion_model."
    assert prefix("autoencoder", "ldm", sdxl) == "first_stage_model."
    assert prefix("text", "ldm", sd1) == "cond_stage_model.transformer."
    assert prefix("text", "ldm", sd2) == "cond_stage_model.model."
    assert prefix("text", "ldm", sdxl) == "conditioner.embedders.0.transformer."
    assert prefix("text2", "ldm", sdxl) == "conditioner.embedders.1.model."
    assert prefix("bert", "ldm", zoo) == prefix("classes", "ldm", zoo) == "cond_stage_model."
    assert prefix("text2", "diffusers", sdxl) == ""


def test_what_is_no_layout_or_part_is_refused() -> None:
    with pytest.raises(InputError, match="no layout 'difusers'"):
        pairs("unet", TINY_UNET, "difusers")
    with pytest.raises(InputError, match="no part 'vae'"):
        pairs("vae", TINY_KL, "ldm")
    with pytest.raises(InputError, match="no class embedder"):
        pairs("classes", ClassEmbedderConfig(), "diffusers")


def test_a_table_is_made_as_it_is_asked_for() -> None:
    huge = replace(TINY_UNET, num_res_blocks=10**9, transformer_depth=10**9)
    table = generate("unet", huge, "ldm")
    assert [next(table).native for _ in range(2)] == ["input_blocks.0.0.weight", "input_blocks.0.0.bias"]
