"""Latent upscalers and LDM's inpainting: told by structure, loaded from both layouts, and written to both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.checkpoints.build import NETWORKS
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.detect.families import UNETS, plain_form
from sfumato.checkpoints.detect.plan import Plan, detect
from sfumato.checkpoints.files import write_tensors
from sfumato.checkpoints.layouts.tables import pairs, prefix, to_foreign
from sfumato.checkpoints.load import open_model
from sfumato.checkpoints.report import as_text, report
from sfumato.checkpoints.rules import rule_of
from sfumato.checkpoints.source import TensorInfo
from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import CheckpointError
from sfumato.families import AUTOENCODERS, FAMILIES, OPENCLIP_H
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.clip import CLIPTextConfig
from sfumato.nn.unet import UNetConfig
from sfumato.presets import PARTS, ModelConfig, concat_kind, noise_levels, num_classes
from sfumato.text.tokenizer import clip_json

TINY = ModelConfig(
    "tiny",
    unet=UNetConfig(
        in_channels=7, out_channels=4, model_channels=16, num_res_blocks=1, attention_resolutions=(2, 4),
        channel_mult=(1, 2, 4), num_heads=8, use_spatial_transformer=True, context_dim=64, legacy=False,
        num_groups=16, use_linear_in_transformer=True, num_classes=400,
        disable_self_attentions=(True, True, False),
    ),
    autoencoder=AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1),
    text=CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, hidden_act="gelu",
        pad_token_id=0,
    ),
    tokenizer=clip_json("!"),
)  # fmt: skip
VQ = AutoencoderConfig(
    z_channels=3, embed_dim=3, ch=32, ch_mult=(1, 2), num_res_blocks=1, double_z=False, n_embed=16
)
PLAIN = UNetConfig(
    in_channels=6, out_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=(2,),
    channel_mult=(1, 2), num_head_channels=32, legacy=False,
)  # fmt: skip
SMALL = ModelConfig("tiny", unet=PLAIN, autoencoder=VQ)
MASKED = replace(SMALL, unet=replace(PLAIN, in_channels=7, resblock_updown=True, conv_resample=False,
                                     num_heads=8, num_head_channels=-1))  # fmt: skip
Infos = dict[str, TensorInfo]
State = dict[str, Tensor]


def weights(config: ModelConfig) -> dict[str, State]:
    """Random weights for every part, as state dicts; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return {
        part: {
            name: torch.randn(value.shape, generator=generator) * 0.05
            for name, value in NETWORKS[part](part_config).state_dict().items()
        }
        for part in PARTS
        if (part_config := getattr(config, part)) is not None
    }


def in_ldm(config: ModelConfig) -> State:
    """All parts under the names that single files have."""
    return {
        prefix(part, "ldm", config) + name: value
        for part, state in weights(config).items()
        for name, value in to_foreign(pairs(part, getattr(config, part), "ldm"), state).items()
    }


def same(module: nn.Module, state: State) -> bool:
    """Whether a network has exactly these weights."""
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


def infos_of(config: ModelConfig) -> Infos:
    """A single file under LDM's names."""
    return {
        prefix(part, "ldm", config) + name: TensorInfo(torch.float16, shape)
        for part in ("unet", "autoencoder", "text")
        if getattr(config, part) is not None
        for pair in pairs(part, getattr(config, part), "ldm")
        for name, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True)
    }


def tensor(*shape: int) -> TensorInfo:
    return TensorInfo(torch.float32, shape)


def test_the_released_file() -> None:
    known = FAMILIES["sd-x4-upscaler"]
    config = ModelConfig("x4", unet=known.unet, autoencoder=AUTOENCODERS["kl-f4-z4"], text=OPENCLIP_H)
    infos = infos_of(config) | {"low_scale_model.betas": tensor(1000)}
    infos["low_scale_model.sqrt_recipm1_alphas_cumprod"] = tensor(1000)
    plan = detect(infos, {})
    assert (plan.family, plan.unknown) == ("sd-x4-upscaler", ())
    assert plan.ignored == {
        "schedule buffers": ("low_scale_model.betas", "low_scale_model.sqrt_recipm1_alphas_cumprod")
    }
    found = plan.config
    assert (found.prediction, found.latent_scale, found.image_size) == ("v", 0.08333, (512, 512))
    assert found.schedule == ScheduleConfig(beta_start=0.0001, beta_end=0.02)
    assert found.unet == known.unet and found.defaults == {"guidance": 9.0}
    assert concat_kind(found) == "enlarges" and noise_levels(found) == 1000 and num_classes(found) is None
    assert detect(infos, {}, prediction="eps").config.prediction == "eps"


def test_its_networks_alone() -> None:
    unet = FAMILIES["sd-x4-upscaler"].unet
    assert unet is not None
    for layout in ("ldm", "diffusers"):
        infos = {
            name: tensor(*shape)
            for pair in pairs("unet", unet, layout)
            for name, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True)
        }
        plan = detect(infos, {})
        assert (plan.family, plan.config.unet, plan.config.latent_scale) == ("sd-x4-upscaler", unet, 0.08333)


def test_levels_without_attention_and_the_option_unset_make_no_difference() -> None:
    unet = UNETS["sd-x4-upscaler"]
    written = replace(unet, disable_self_attentions=(False, True, True, False))
    assert plain_form(written) == plain_form(unet) == unet
    off = replace(unet, disable_self_attentions=(True, False, False, False))
    assert plain_form(off).disable_self_attentions is None


@pytest.fixture(scope="module")
def x4_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("x4") / "x4.safetensors"
    tensors = in_ldm(TINY)
    write_tensors(path, tensors | {"low_scale_model.betas": torch.zeros(4)}, {})
    return path


def test_another_size_is_like_it(x4_file: Path) -> None:
    opened = open_model(x4_file).opened
    assert opened.family == "like sd-x4-upscaler"
    assert opened.config.unet == TINY.unet and opened.config.autoencoder == TINY.autoencoder
    assert (opened.config.prediction, opened.config.latent_scale) == ("v", 0.08333)
    shown = as_text(report(opened))
    assert "like sd-x4-upscaler" in shown and "schedule buffers" in shown


def test_there_and_back(x4_file: Path, tmp_path: Path) -> None:
    convert(open_model(x4_file).opened, tmp_path / "folder")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionUpscalePipeline" and index["max_noise_level"] == 350
    assert "requires_safety_checker" not in index
    low = json.loads((tmp_path / "folder/low_res_scheduler/scheduler_config.json").read_text())
    assert (low["_class_name"], low["beta_schedule"], low["beta_end"]) == (
        "DDPMScheduler", "scaled_linear", 0.02,
    )  # fmt: skip
    opened = open_model(tmp_path / "folder").opened
    assert opened.config.unet == TINY.unet and concat_kind(opened.config) == "enlarges"
    assert (opened.config.prediction, opened.config.latent_scale) == ("v", 0.08333)
    assert opened.notes == ()
    convert(opened, tmp_path / "again.safetensors")
    again = open_model(tmp_path / "again.safetensors")
    states = weights(TINY)
    assert all(same(again.module(part), state) for part, state in states.items())
    assert concat_kind(again.config) == "enlarges"


def test_an_old_folder_says_no_latent_scale(x4_file: Path, tmp_path: Path) -> None:
    convert(open_model(x4_file).opened, tmp_path / "folder")
    place = tmp_path / "folder" / "vae" / "config.json"
    values = json.loads(place.read_text())
    del values["scaling_factor"]
    place.write_text(json.dumps(values))
    assert open_model(tmp_path / "folder").config.latent_scale == 0.08333


def test_one_flag_for_all_levels(x4_file: Path, tmp_path: Path) -> None:
    convert(open_model(x4_file).opened, tmp_path / "folder", only="unet")
    place = tmp_path / "folder" / "config.json"
    values = json.loads(place.read_text())
    place.write_text(json.dumps(values | {"only_cross_attention": False}))
    with pytest.raises(CheckpointError, match=r"attn1\.to_k\.weight: shape"):
        open_model(tmp_path / "folder")


# Latent diffusion's own, which follow no text


def plan_of(config: ModelConfig, **extra: TensorInfo) -> Plan:
    return detect(infos_of(config) | extra, {})


@pytest.mark.parametrize(
    ("name", "autoencoder", "kind"),
    [("ldm-super-resolution", "vq-f4", "enlarges"), ("ldm-inpaint", "vq-f4-noattn", "inpaints_black")],
)
def test_the_released_ones(name: str, autoencoder: str, kind: str) -> None:
    config = ModelConfig(name, unet=UNETS[name], autoencoder=AUTOENCODERS[autoencoder])
    plan = plan_of(config)
    assert (plan.family, plan.unknown, plan.config.latent_scale) == (name, (), 1.0)
    assert concat_kind(plan.config) == kind and noise_levels(plan.config) is None
    assert plan.config.schedule.beta_end == {"enlarges": 0.0155}.get(kind, 0.0205)
    unet = replace(config, autoencoder=None)
    assert concat_kind(plan_of(unet).config) == kind


def test_others_of_their_kind() -> None:
    assert concat_kind(plan_of(SMALL).config) == "enlarges"
    assert concat_kind(plan_of(MASKED).config) == "inpaints_black"
    kl = replace(VQ, n_embed=None, double_z=True)
    assert concat_kind(plan_of(replace(SMALL, autoencoder=kl)).config) == "edits"
    assert concat_kind(plan_of(replace(MASKED, autoencoder=kl)).config) == "inpaints"


def test_a_first_stage_saved_twice_is_left_out() -> None:
    """LDM's inpainting encodes its condition by its own first stage, under a name of its own too."""
    infos = infos_of(MASKED)
    twice = {
        name.replace("first_stage_model.", "cond_stage_model."): info
        for name, info in infos.items()
        if name.startswith("first_stage_model.")
    }
    for given in (infos | twice, twice | infos):
        plan = detect(given, {})
        assert plan.unknown == () and set(plan.ignored["first stage of the condition"]) == set(twice)
        assert all(name.startswith("first_stage_model.") for name in plan.parts["autoencoder"].names)
    assert rule_of("cond_stage_model.quantize.embedding.weight") == "first stage of the condition"
    assert rule_of("cond_stage_model.transformer.x") is None


def test_they_go_through_diffusers(tmp_path: Path) -> None:
    source = tmp_path / "sr.safetensors"
    write_tensors(source, in_ldm(SMALL), {})
    convert(open_model(source).opened, tmp_path / "folder")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "LDMSuperResolutionPipeline" and "vqvae" in index
    found = open_model(tmp_path / "folder")
    assert concat_kind(found.config) == "enlarges" and found.config.unet == replace(PLAIN, num_heads=-1)
    assert same(found.module("unet"), weights(SMALL)["unet"])
