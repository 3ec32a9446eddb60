"""`LatentDiffusion` around the families whose conditions differ from Stable Diffusion 1's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from sfumato.checkpoints.build import NETWORKS
from sfumato.checkpoints.layouts.tables import PARTS, pairs, prefix
from sfumato.compat.ldm import (
    DDPM,
    BERTEmbedder,
    ClassEmbedder,
    DDIMSampler,
    FrozenCLIPEmbedder,
    LatentDiffusion,
)
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import InputError
from sfumato.families import FAMILIES
from sfumato.model import StableDiffusion
from sfumato.nn.bert import BERTConfig
from sfumato.nn.bert import BERTEmbedder as BERTNetwork
from sfumato.nn.classes import ClassEmbedder as ClassTable
from sfumato.nn.classes import ClassEmbedderConfig
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.unet import UNet
from sfumato.presets import ModelConfig
from sfumato.runtime import shapes_only
from sfumato.text.wordpiece import WordPiece

SIZES = 6 * 256  # SDXL's six size numbers of 256 features each


def with_unet(model: StableDiffusion, parts: dict[str, nn.Module], **options: object) -> StableDiffusion:
    """The tiny model's U-Net and autoencoder, changed by `options`, with other encoders."""
    unet_options = {name: options.pop(name) for name in ("in_channels", "context_dim", "num_classes",
                                                         "adm_in_channels") if name in options}  # fmt: skip
    assert model.config.unet is not None and model.autoencoder is not None
    unet = dataclasses.replace(model.config.unet, **unet_options)  # type: ignore[arg-type]
    config = dataclasses.replace(model.config, unet=unet, **options)  # type: ignore[arg-type]
    network = UNet(unet).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return StableDiffusion(config, {"unet": network, "autoencoder": model.autoencoder, **parts})


@pytest.fixture
def bert_model(tiny_model: StableDiffusion) -> StableDiffusion:
    config = BERTConfig(n_embed=16, n_layer=1, vocab_size=9, max_seq_len=6, heads=2, dim_head=4)
    words = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "##es"])
    parts: dict[str, nn.Module] = {"bert": BERTNetwork(config).eval()}
    return with_unet(tiny_model, parts, text=None, bert=config, tokenizer=words.to_json())


@pytest.fixture
def two_tower_model(tiny_model: StableDiffusion) -> StableDiffusion:
    assert tiny_model.text_encoder is not None
    first = dataclasses.replace(tiny_model.text_encoder.config, num_hidden_layers=2)
    second = dataclasses.replace(first, projection_dim=12)
    parts: dict[str, nn.Module] = {
        "text": CLIPTextEncoder(first).eval(),
        "text2": CLIPTextEncoder(second).eval(),
    }
    return with_unet(
        tiny_model, parts, text=first, text2=second, clip_skip=2, text_normed=False, zeros_for_empty=True,
        context_dim=32, adm_in_channels=12 + SIZES, num_classes="sequential",
    )  # fmt: skip


def test_the_text_model_of_ldm(bert_model: StableDiffusion) -> None:
    model = LatentDiffusion(bert_model)
    assert isinstance(model.cond_stage_model, BERTEmbedder) and model.cond_stage_key == "caption"
    assert model.cond_stage_model.max_length == 6 and model.cond_stage_model.device.type == "cpu"
    c, uc = model.get_learned_conditioning(2 * ["a red fox"]), model.get_learned_conditioning(2 * [""])
    assert bert_model.bert is not None
    alone = bert_model.bert(torch.tensor([[2, 5, 6, 7, 3, 0]]))
    tokens = model.get_learned_conditioning(torch.tensor([[2, 5, 6, 7, 3, 0]]))
    for found in (c[:1], tokens):  # a batch rounds differently
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    samples, _ = DDIMSampler(model).sample(
        S=4, conditioning=c, batch_size=2, shape=[2, 8, 8], unconditional_guidance_scale=5.0,
        unconditional_conditioning=uc,
    )  # fmt: skip
    assert bool(torch.isfinite(model.decode_first_stage(samples)).all())
    name = "cond_stage_model.transformer.attn_layers.layers.0.1.to_q.weight"
    assert name in model.state_dict()
    with pytest.raises(InputError, match="no text encoder"):
        FrozenCLIPEmbedder(bert_model)


def test_two_towers_and_a_vector(two_tower_model: StableDiffusion) -> None:
    model = LatentDiffusion(two_tower_model)
    assert model.model.conditioning_key == "crossattn-adm"
    assert isinstance(model.cond_stage_model, FrozenCLIPEmbedder)
    assert model.cond_stage_model.transformer2 is two_tower_model.text_encoder2
    wanted = two_tower_model.encode_prompt(["a red apple"])
    c, uc = model.get_learned_conditioning("a red apple"), model.get_learned_conditioning("")
    assert wanted.context is not None and wanted.vector is not None
    assert torch.equal(c["c_crossattn"][0], wanted.context) and torch.equal(c["c_adm"], wanted.vector)
    x, t = torch.randn(1, 2, 8, 8), torch.tensor([300])
    assert torch.equal(model.apply_model(x, t, c), two_tower_model.network(x, t.float(), wanted))
    start = torch.randn(1, 2, 8, 8)
    guided, _ = DDIMSampler(model).sample(
        S=4, conditioning=c, batch_size=1, shape=[2, 8, 8], x_T=start, unconditional_guidance_scale=2.0,
        unconditional_conditioning=uc,
    )  # fmt: skip
    plain, _ = DDIMSampler(model).sample(4, 1, [2, 8, 8], c, x_T=start)
    assert guided.shape == (1, 2, 8, 8) and not torch.allclose(guided, plain)
    with pytest.raises(InputError, match="c_adm was not given"):
        model.apply_model(x, t, c["c_crossattn"])
    with pytest.raises(InputError, match="no BERTEmbedder"):
        BERTEmbedder(two_tower_model)


def test_classes_as_a_context(tiny_model: StableDiffusion) -> None:
    config = ClassEmbedderConfig(n_classes=4, embed_dim=16)
    parts: dict[str, nn.Module] = {"classes": ClassTable(config)}
    source = with_unet(tiny_model, parts, text=None, tokenizer=None, classes=config)
    model = LatentDiffusion(source)
    assert isinstance(model.cond_stage_model, ClassEmbedder) and model.cond_stage_key == "class_label"
    labels = torch.tensor([0, 3])
    c = model.get_learned_conditioning({"class_label": labels})
    assert torch.equal(c, source.encode_label([0, 3]).context)  # type: ignore[arg-type]
    assert torch.equal(model.cond_stage_model({"class": labels}, key="class"), c)
    batch = {"image": torch.zeros(2, 16, 16, 3), "class_label": labels}
    assert torch.equal(model.get_input(batch, "image")[1], c)
    with pytest.raises(InputError, match="no 'class_label' in the batch"):
        model.get_learned_conditioning({"class_lable": labels})
    with pytest.raises(InputError, match="labels are a str"):
        model.get_learned_conditioning("3")


def test_classes_in_the_unet(pixel_model: StableDiffusion) -> None:
    assert pixel_model.config.unet is not None
    unet = dataclasses.replace(pixel_model.config.unet, num_classes=3)
    config: ModelConfig = dataclasses.replace(pixel_model.config, unet=unet)
    model = LatentDiffusion(StableDiffusion(config, {"unet": UNet(unet).eval()}))
    assert model.model.conditioning_key == "adm" and model.cond_stage_model is None
    y = model.get_learned_conditioning({"class_label": torch.tensor([2])})
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    wanted = model.model.diffusion_model(x, t, y=y)
    assert torch.equal(model.apply_model(x, t, y), wanted)
    samples, _ = DDIMSampler(model).sample(2, 1, (1, 8, 8), y)
    assert samples.shape == (1, 1, 8, 8)


def test_the_inpainting_model(tiny_model: StableDiffusion) -> None:
    """Nine channels: the sample, a mask and the latents of the masked picture."""
    assert tiny_model.text_encoder is not None
    source = with_unet(tiny_model, {"text": tiny_model.text_encoder}, in_channels=5)
    model = LatentDiffusion(source)
    assert model.model.conditioning_key == "hybrid" and model.channels == 2
    concat, context = torch.randn(1, 3, 8, 8), model.get_learned_conditioning("a fox")
    c = {"c_concat": [concat], "c_crossattn": [context]}
    uc = {"c_concat": [concat], "c_crossattn": [model.get_learned_conditioning("")]}
    x, t = torch.randn(1, 2, 8, 8), torch.tensor([7])
    joined = source.unet(torch.cat([x, concat], dim=1), t, context)
    assert torch.equal(model.apply_model(x, t, c), joined)
    samples, _ = DDIMSampler(model).sample(
        3, 1, (2, 8, 8), c, unconditional_guidance_scale=7.5, unconditional_conditioning=uc
    )
    assert samples.shape == (1, 2, 8, 8)
    with pytest.raises(InputError, match="c_concat was not given"):
        model.apply_model(x, t, context)


@pytest.mark.parametrize("family", ["sd1", "sd1-inpaint", "ldm-cin256-v2", "ldm-text2img-large"])
def test_state_dict_is_the_released_files(family: str) -> None:
    """Every name and shape but those of the original's unused extras, on the meta device."""
    config = FAMILIES[family]
    parts = [part for part in PARTS if getattr(config, part) is not None]
    with shapes_only():
        modules = {part: NETWORKS[part](getattr(config, part)) for part in parts}
    model = LatentDiffusion(StableDiffusion(config, modules))
    given = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wanted = {
        prefix(part, "ldm", config) + name: tuple(shape)
        for part in parts
        for pair in pairs(part, getattr(config, part), "ldm")
        for name, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True)
    }
    buffers = {name: (1000,) for name in DDPM(Schedule(config.schedule), config.prediction).state_dict()}
    assert given == wanted | buffers
