"""Every family told apart by names and shapes; every tensor accounted for; what is damaged named."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sfumato.checkpoints.detect.families import SD1, SDXL, UNETS, plain_form
from sfumato.checkpoints.detect.plan import Plan, detect, explain_unknown, fit_part
from sfumato.checkpoints.layouts.tables import FOLDERS, pairs, prefix
from sfumato.checkpoints.rules import RULES, rule_of
from sfumato.checkpoints.source import TensorInfo
from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.families import AUTOENCODERS, CLIP_L, OPENCLIP_BIGG, OPENCLIP_H
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.bert import BERTConfig
from sfumato.nn.classes import ClassEmbedderConfig
from sfumato.nn.clip import CLIPTextConfig
from sfumato.nn.unet import UNetConfig
from sfumato.presets import ModelConfig

Infos = dict[str, TensorInfo]
Classes = int | Literal["sequential", "continuous"] | None

KL_F8, VQ_F4 = AUTOENCODERS["kl-f8"], AUTOENCODERS["vq-f4"]


def family(name: str, **parts: Any) -> ModelConfig:
    """A released model by its U-Net's name and its other parts; of the rest, what shapes do not tell."""
    return ModelConfig(name, unet=UNETS[name], **parts)


XL = {"autoencoder": KL_F8, "text": CLIP_L, "text2": OPENCLIP_BIGG}
SD = {"autoencoder": KL_F8, "text": CLIP_L}
SD2 = {"autoencoder": KL_F8, "text": OPENCLIP_H}
FAMILIES = [
    *(family(name, **SD) for name in ("sd1", "sd1-inpaint", "instruct-pix2pix")),
    *(family(name, **SD) for name in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")),
    family("sd2", **SD2),
    family("sd2-inpaint", **SD2),
    family("sd-x4-upscaler", **(SD2 | {"autoencoder": AUTOENCODERS["kl-f4-z4"]})),
    *(family(name, **XL) for name in ("sdxl", "sdxl-inpaint", "ssd-1b", "segmind-vega")),
    *(family(name, **XL) for name in ("koala-1b", "koala-700m")),
    family("ldm-unconditional", autoencoder=VQ_F4),
    family("ldm-churches", autoencoder=KL_F8),
    family(
        "ldm-cin256",
        autoencoder=AUTOENCODERS["vq-f8"],
        classes=ClassEmbedderConfig(1000, 512, unconditional=False),
    ),
    family("ldm-cin256-v2", autoencoder=VQ_F4, classes=ClassEmbedderConfig()),
    family("ldm-text2img256", autoencoder=VQ_F4, bert=BERTConfig(n_embed=640)),
    family("ldm-text2img-large", autoencoder=KL_F8, bert=BERTConfig()),
    family("ldm-layout2img", autoencoder=VQ_F4, bert=BERTConfig(512, 16, vocab_size=8192, max_seq_len=92)),
    family("ldm-super-resolution", autoencoder=VQ_F4),
    family("ldm-inpaint", autoencoder=AUTOENCODERS["vq-f4-noattn"]),
]
BY_NAME = {config.name: config for config in FAMILIES}
PARTS = ("unet", "autoencoder", "text", "text2", "bert", "classes")


def infos_of(part: str, config: Any, layout: str, start: str = "", variant: str = "") -> Infos:
    """What a file says of a part, its names behind `start`."""
    return {
        start + name: TensorInfo(torch.float16, shape)
        for pair in pairs(part, config, layout, variant)
        for name, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True)
    }


def single_file(config: ModelConfig) -> Infos:
    found: Infos = {}
    for part in PARTS:
        if getattr(config, part) is not None:
            found |= infos_of(part, getattr(config, part), "ldm", prefix(part, "ldm", config))
    return found


def folder(config: ModelConfig) -> Infos:
    found: Infos = {}
    for part, place in FOLDERS.items():
        if getattr(config, part) is not None:
            found |= infos_of(part, getattr(config, part), "diffusers", f"{place}/")
    return found


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> TensorInfo:
    return TensorInfo(dtype, shape)


def as_released(config: ModelConfig) -> Infos:
    """A single file with what training left in the released ones."""
    found = single_file(config)
    extra: Infos = {name: tensor(1000) for name in ("betas", "alphas_cumprod", "posterior_mean_coef2")}
    extra |= {"model_ema.decay": tensor(), "model_ema.num_updates": tensor(dtype=torch.int32)}
    extra["first_stage_model.loss.discriminator.main.0.weight"] = tensor(64, 3, 4, 4)
    if config.text == CLIP_L:
        start = prefix("text", "ldm", config)
        extra[f"{start}text_model.embeddings.position_ids"] = tensor(1, 77, dtype=torch.int64)
    if config.text == OPENCLIP_H:
        start = prefix("text", "ldm", config)
        extra |= {f"{start}text_projection": tensor(1024, 1024), f"{start}logit_scale": tensor()}
        extra |= {
            name.replace("resblocks.0", "resblocks.23"): info
            for name, info in found.items()
            if "resblocks.0." in name
        }
    if config.bert is not None:
        extra["cond_stage_model.transformer.to_logits.weight"] = tensor(30522, config.bert.n_embed)
    return found | extra


def read(plan: Plan) -> dict[str, Any]:
    return {part: getattr(plan.config, part) for part in PARTS}


def wanted(config: ModelConfig) -> dict[str, Any]:
    return {part: getattr(config, part) for part in PARTS}


def assert_accounted(plan: Plan, infos: Infos) -> None:
    """Each tensor of the file is used, left out by one rule, or unknown."""
    used = {name for part in plan.parts.values() for name in part.names}
    left = [name for names in plan.ignored.values() for name in names]
    assert len(left) == len(set(left))
    assert used | set(left) | set(plan.unknown) == infos.keys()
    assert len(used) + len(left) + len(plan.unknown) == len(infos)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.name)
def test_a_released_file_is_told_apart(config: ModelConfig) -> None:
    infos = as_released(config)
    names = list(infos)
    random.Random(config.name).shuffle(names)
    plan = detect({name: infos[name] for name in names}, {})
    assert plan.family == plan.config.name == config.name
    assert read(plan) == wanted(config)
    assert plan.layout == "ldm"
    assert plan.unknown == ()
    assert_accounted(plan, infos)
    for part, found in plan.parts.items():
        table = pairs(part, found.config, "ldm")
        start = prefix(part, "ldm", config)
        assert [(pair.native, pair.shape, pair.transform) for pair in found.mapping] == [
            (pair.native, pair.shape, pair.transform) for pair in table
        ]
        assert [pair.foreign for pair in found.mapping] == [
            tuple(start + name for name in pair.foreign) for pair in table
        ]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.name)
def test_a_diffusers_folder_is_told_apart(config: ModelConfig) -> None:
    config = replace(config, classes=None)
    infos = folder(config)
    plan = detect(infos, {})
    assert (plan.family, plan.layout, plan.unknown) == (config.name, "diffusers", ())
    assert read(plan) == wanted(config)
    assert_accounted(plan, infos)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.name)
def test_a_missing_or_misshapen_tensor_is_named(config: ModelConfig) -> None:
    infos = single_file(config)
    chosen = random.Random(config.name).sample(sorted(infos), 3)
    for name in chosen:
        with pytest.raises(CheckpointError) as caught:
            detect({key: info for key, info in infos.items() if key != name}, {})
        assert f"{name}: missing" in caught.value.message
        assert "(1 in all)" in caught.value.message
        with pytest.raises(CheckpointError) as caught:
            detect(infos | {name: stretched(infos[name])}, {})
        assert f"{name}: shape {stretched(infos[name]).shape} for {infos[name].shape}" in caught.value.message


def stretched(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=(*info.shape[:-1], info.shape[-1] + 1))


TINY_UNET = UNetConfig(
    in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=(1, 2),
    channel_mult=(1, 2), num_heads=8, use_spatial_transformer=True, context_dim=64, legacy=False,
)  # fmt: skip
TINY_TEXT = CLIPTextConfig(
    vocab_size=99, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
    eos_token_id=98,
)  # fmt: skip
TINY = ModelConfig(
    "tiny",
    unet=TINY_UNET,
    autoencoder=AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1),
    text=TINY_TEXT,
)


def test_every_tensor_of_a_small_model_is_missed_by_name() -> None:
    infos = single_file(TINY)
    for name in random.Random(0).sample(sorted(infos), 80):
        with pytest.raises(CheckpointError) as caught:
            detect({key: info for key, info in infos.items() if key != name}, {})
        # A tensor that alone tells an option is named without its prefix.
        text = caught.value.message
        assert f"{name}: missing" in text or any(
            name.endswith(word) and f"tells {word}" in text for word in SOLE
        )


SOLE = ("input_blocks.0.0.weight", "encoder.conv_in.weight")


def test_a_tensor_of_integers_is_named() -> None:
    infos = single_file(TINY)
    name = "first_stage_model.quant_conv.weight"
    infos[name] = TensorInfo(torch.int64, infos[name].shape)
    with pytest.raises(CheckpointError, match=r"quant_conv.weight: torch.int64 is not floating-point"):
        detect(infos, {})


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("sd1", "model.diffusion_model.input_blocks.4."),
        ("sd1", "model.diffusion_model.middle_block.1."),
        ("sd1", "model.diffusion_model.output_blocks."),
        ("sdxl", "model.diffusion_model.input_blocks.7.1.transformer_blocks.9."),
        ("ldm-churches", "model.diffusion_model.output_blocks.5."),
        ("sd2", "first_stage_model.encoder.down.1.block.0."),
        ("ldm-cin256-v2", "first_stage_model.decoder.up.2."),
        ("sd1", "cond_stage_model.transformer.text_model.embeddings."),
    ],
)
def test_whole_blocks_that_are_gone_are_named(name: str, gone: str) -> None:
    infos = single_file(BY_NAME[name])
    missing = [key for key in infos if key.startswith(gone)]
    with pytest.raises(CheckpointError, match=r"there.ckpt does not hold a whole") as caught:
        detect(without(infos, gone), {}, place="there.ckpt")
    assert f"({len(missing)} in all)" in caught.value.message
    assert caught.value.message.count(": missing") == min(10, len(missing))
    assert all(f"{key}: missing" in caught.value.message for key in missing[:10])


def test_a_family_of_another_size_is_read_from_the_weights() -> None:
    plan = detect(single_file(TINY), {})
    assert plan.family == "like sd1"
    assert read(plan) == wanted(TINY)
    assert any("no released one" in note for note in plan.notes)


# Options that shapes tell: any of them comes back from the names and shapes alone.


@st.composite
def unets(draw: st.DrawFn) -> UNetConfig:
    levels = draw(st.integers(1, 3))
    per_level = st.integers(1, 2)
    blocks = draw(st.lists(per_level, min_size=levels, max_size=levels))
    plain = draw(st.booleans())
    resampling = draw(st.sampled_from(["convolution", "residual", "none"]))
    kinds: list[Classes] = [None, None, 7, "continuous", "sequential"]
    classes = draw(st.sampled_from(kinds))
    attended = tuple(2**level for level in range(levels) if draw(st.booleans()))
    transformer = {}
    if not plain:
        depth = st.lists(st.integers(1, 3), min_size=levels, max_size=levels)
        outputs = st.lists(st.integers(0, 2), min_size=sum(blocks) + levels, max_size=sum(blocks) + levels)
        transformer = {
            "use_spatial_transformer": True,
            "context_dim": draw(st.sampled_from([None, 5, 24])),
            "transformer_depth": draw(st.one_of(st.integers(1, 3), depth)),
            "transformer_depth_middle": draw(st.sampled_from([None, 1, 2])),
            "transformer_depth_output": draw(st.one_of(st.none(), outputs)),
            "use_linear_in_transformer": draw(st.booleans()),
        }
        if transformer["context_dim"] is not None:
            disabled = st.lists(st.booleans(), min_size=levels, max_size=levels)
            transformer["disable_self_attentions"] = draw(st.one_of(st.none(), disabled))
    return UNetConfig(
        in_channels=draw(st.integers(1, 9)),
        out_channels=draw(st.integers(1, 6)),
        model_channels=16,
        num_res_blocks=tuple(blocks),
        attention_resolutions=attended,
        channel_mult=tuple(draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels))),
        conv_resample=resampling == "convolution",
        resblock_updown=resampling == "residual",
        dims=draw(st.integers(1, 3)),
        num_classes=classes,
        adm_in_channels=11 if classes == "sequential" else None,
        num_head_channels=8,
        use_scale_shift_norm=draw(st.booleans()),
        middle=draw(st.sampled_from(["attention", "attention", "residual", "none"])),
        num_groups=16,
        **transformer,
    )


def shapes_of(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    return {pair.native: pair.shape for pair in pairs("unet", config, "ldm")}


@settings(max_examples=80, deadline=None)
@given(config=unets(), layout=st.sampled_from(["ldm", "diffusers"]))
def test_any_unet_comes_back_from_its_shapes(config: UNetConfig, layout: str) -> None:
    heads = {"num_head_channels": "8"}
    infos = infos_of("unet", config, layout)
    if layout == "diffusers":  # it has no place for attention after only some blocks of a level
        assume(config.transformer_depth_output is None or 0 not in config.transformer_depth_output)
    found = detect(infos, heads).config.unet
    assert found is not None
    assert shapes_of(found) == shapes_of(config)
    assert found.num_head_channels == 8
    again = detect(infos_of("unet", found, layout), heads).config.unet
    assert again == found


@st.composite
def autoencoders(draw: st.DrawFn) -> AutoencoderConfig:
    factors = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    codes = draw(st.sampled_from([None, 13]))
    return AutoencoderConfig(
        z_channels=draw(st.integers(1, 5)),
        embed_dim=draw(st.integers(1, 5)),
        in_channels=draw(st.integers(1, 4)),
        out_ch=draw(st.integers(1, 4)),
        ch=16,
        ch_mult=tuple(factors),
        num_res_blocks=draw(st.integers(1, 3)),
        attn_resolutions=tuple(256 >> level for level in range(len(factors)) if draw(st.booleans())),
        attn_type=draw(st.sampled_from(["vanilla", "none", "linear"])),
        resamp_with_conv=len(factors) < 2 or draw(st.booleans()),
        double_z=codes is None,
        n_embed=codes,
        num_groups=16,
    )


@settings(max_examples=60, deadline=None)
@given(config=autoencoders(), layout=st.sampled_from(["ldm", "diffusers"]))
def test_any_autoencoder_comes_back_from_its_shapes(config: AutoencoderConfig, layout: str) -> None:
    if config.attn_type == "none":
        config = replace(config, attn_resolutions=())
    found = detect(infos_of("autoencoder", config, layout), {}).config.autoencoder
    assert found == replace(config, attn_resolutions=tuple(sorted(config.attn_resolutions, reverse=True)))


# Parts alone, and other ways to write them.


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_alone(name: str, layout: str) -> None:
    infos = infos_of("autoencoder", AUTOENCODERS[name], layout)
    infos |= {"loss.perceptual_loss.lin0.model.1.weight": tensor(1, 64, 1, 1), "loss.logvar": tensor()}
    plan = detect(infos, {})
    assert (plan.family, plan.layout, list(plan.parts)) == (name, layout, ["autoencoder"])
    assert plan.config.autoencoder == AUTOENCODERS[name]
    assert plan.config.latent_scale == {"kl-f8": 0.18215, "kl-f4-z4": 0.08333}.get(name, 1.0)
    assert plan.ignored == {"autoencoder loss": ("loss.logvar", "loss.perceptual_loss.lin0.model.1.weight")}


@pytest.mark.parametrize("start", ["", "model.diffusion_model."])
def test_a_unet_alone(start: str) -> None:
    plan = detect(infos_of("unet", SDXL, "ldm", start), {})
    assert (plan.family, list(plan.parts), plan.config.unet) == ("sdxl", ["unet"], SDXL)
    assert plan.config.latent_scale == 0.13025
    plan = detect(infos_of("unet", SD1, "diffusers"), {})
    assert (plan.family, plan.layout, plan.config.unet) == ("sd1", "diffusers", SD1)


def test_a_text_encoder_alone() -> None:
    vision = {"vision_model.embeddings.class_embedding": tensor(1024), "logit_scale": tensor()}
    plan = detect(infos_of("text", CLIP_L, "diffusers") | vision, {})
    assert (plan.family, plan.layout, plan.config.text, plan.unknown) == ("clip-l", "diffusers", CLIP_L, ())
    assert set(plan.ignored) == {"vision tower", "logit scale"}
    plan = detect(infos_of("text", CLIP_L, "diffusers", variant="bare"), {})
    assert plan.config.text == CLIP_L
    for layout in ("ldm", "diffusers"):
        plan = detect(infos_of("text2", OPENCLIP_BIGG, layout), {})
        assert (plan.family, plan.layout, plan.config.text2) == ("openclip-bigg", layout, OPENCLIP_BIGG)
        plan = detect(infos_of("text", replace(OPENCLIP_H, num_hidden_layers=24), layout), {})
        assert (plan.family, plan.config.text) == ("openclip-h", OPENCLIP_H)
        assert len(plan.ignored["unused last layer"]) == (12 if layout == "ldm" else 16)
    plan = detect(infos_of("text", CLIP_L, "ldm", "transformer."), {})
    assert plan.config.text == CLIP_L


def test_old_files_lack_a_level_of_the_text_encoder() -> None:
    config = BY_NAME["sd1"]
    infos = single_file(replace(config, text=None))
    infos |= infos_of("text", CLIP_L, "ldm", "cond_stage_model.transformer.", variant="bare")
    plan = detect(infos, {})
    assert (plan.family, plan.layout, read(plan)) == ("sd1", "ldm", wanted(config))


def test_a_stable_diffusion_2_written_from_diffusers_has_23_layers() -> None:
    config = BY_NAME["sd2"]
    plan = detect(single_file(config), {})
    assert read(plan) == wanted(config)
    assert plan.ignored == {}


def test_a_small_stable_diffusion_2_leaves_its_last_layer_out() -> None:
    tower = CLIPTextConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=1, hidden_act="gelu",
        pad_token_id=0, projection_dim=64,
    )  # fmt: skip
    unet = replace(TINY_UNET, use_linear_in_transformer=True, num_heads=-1, num_head_channels=64)
    infos = single_file(ModelConfig("small", unet=replace(unet, model_channels=64), text=tower))
    plan = detect(infos, {})
    assert plan.config.text == replace(tower, num_hidden_layers=2, projection_dim=None)
    assert set(plan.ignored) == {"unused last layer", "unused projection"}
    assert plan.family == "like sd2"
    assert_accounted(plan, infos)


@pytest.mark.parametrize("part", ["unet", "autoencoder"])
def test_old_names_of_attention_in_diffusers(part: str) -> None:
    config = UNETS["ldm-unconditional"] if part == "unet" else VQ_F4
    infos = infos_of(part, config, "diffusers", variant="old")
    assert any("proj_attn" in name for name in infos)
    plan = detect(infos, {})
    assert plan.parts[part].config == config
    assert_accounted(plan, infos)


def test_one_wide_convolutions_may_be_matrices_and_the_other_way_round() -> None:
    infos = infos_of("autoencoder", KL_F8, "ldm")
    flat = {name: replace(info, shape=info.shape[:2]) for name, info in infos.items() if ".attn_1." in name}
    plan = detect(infos | flat, {})
    name = "encoder.mid.attn_1.q.weight"
    pair = next(pair for pair in plan.parts["autoencoder"].mapping if pair.native == name)
    given = torch.randn(512, 512)
    assert torch.equal(pair.transform.to_native([given])[..., 0, 0], given)
    assert torch.equal(pair.transform.to_foreign(given[..., None, None])[0], given)


# What else a file says.


def averaged(config: UNetConfig) -> Infos:
    """LDM's LitEma: buffers named as the parameters of its `model`, less their dots."""
    start = "model_ema.diffusion_model"
    return {
        start + pair.native.replace(".", ""): tensor(*pair.shape) for pair in pairs("unet", config, "ldm")
    }


def test_averaged_weights_are_taken_where_they_are_asked_for() -> None:
    infos = as_released(BY_NAME["sd1"]) | averaged(SD1)
    plan = detect(infos, {})
    assert len(plan.ignored["ema"]) == 688
    assert all(not name.startswith("model_ema") for name in plan.parts["unet"].names)
    plan = detect(infos, {}, ema=True)
    assert all(name.startswith("model_ema.diffusion_model") for name in plan.parts["unet"].names)
    assert len(plan.ignored["weights without EMA"]) == 686
    assert plan.ignored["ema"] == ("model_ema.decay", "model_ema.num_updates")
    assert plan.unknown == ()
    assert_accounted(plan, infos)
    pair = next(p for p in plan.parts["unet"].mapping if p.native == "input_blocks.1.0.in_layers.2.weight")
    assert pair.foreign == ("model_ema.diffusion_modelinput_blocks10in_layers2weight",)


def test_averaged_weights_that_are_not_there_are_the_callers_mistake() -> None:
    infos = single_file(TINY)
    with pytest.raises(InputError, match="no averaged weights"):
        detect(infos, {}, ema=True)
    some = averaged(TINY_UNET)
    del some["model_ema.diffusion_modelout2bias"]
    with pytest.raises(CheckpointError, match=r"model_ema.diffusion_modelout2bias: missing"):
        detect(infos | some, {}, ema=True)


def test_flattened_names_do_not_collide() -> None:
    for config in UNETS.values():
        names = [pair.native.replace(".", "") for pair in pairs("unet", config, "ldm")]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("metadata", "extra", "asked", "prediction", "evidence", "probe"),
    [
        ({}, (), None, "v", "assumed", True),
        ({}, (), "eps", "eps", "asked for", False),
        ({"modelspec.prediction_type": "epsilon"}, (), None, "eps", "modelspec.prediction_type", False),
        ({"modelspec.prediction_type": "v"}, (), None, "v", "modelspec.prediction_type", False),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, (), None, "eps", "v2-512", False),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), None, "v", "v2-768-v", False),
        ({"global_step": "875000"}, (), None, "eps", "step 875000", False),
        ({"global_step": "220000"}, (), None, "eps", "2.1 base", False),
        ({"global_step": "110000"}, (), None, "v", "step 110000", False),
        ({"global_step": "5"}, (), None, "v", "assumed", True),
        ({}, ("v_pred",), None, "v", "v_pred", False),
    ],
)
def test_what_a_stable_diffusion_2_predicts(
    metadata: dict[str, str],
    extra: tuple[str, ...],
    asked: str | None,
    prediction: str,
    evidence: str,
    probe: bool,
) -> None:
    infos = single_file(BY_NAME["sd2"]) | {name: tensor() for name in extra}
    plan = detect(infos, metadata, prediction=asked)
    assert plan.config.prediction == prediction
    assert evidence in plan.prediction_evidence
    assert plan.needs_probe == probe
    assert plan.config.image_size == ((768, 768) if prediction == "v" else (512, 512))
    assert plan.family == "sd2"
    assert plan.unknown == ()


def test_other_families_predict_noise_unless_the_file_says_so() -> None:
    infos = single_file(BY_NAME["sdxl"])
    plan = detect(infos, {})
    assert (plan.config.prediction, plan.needs_probe) == ("eps", False)
    plan = detect(infos | {"v_pred": tensor(), "ztsnr": tensor()}, {})
    assert (plan.config.prediction, plan.config.schedule.zero_terminal_snr) == ("v", True)
    assert plan.ignored["prediction flags"] == ("v_pred", "ztsnr")
    plan = detect(infos | {"ztsnr": tensor()}, {})
    assert (plan.config.prediction, plan.config.schedule.zero_terminal_snr) == ("eps", False)
    assert "ztsnr" in plan.prediction_evidence
    assert detect(single_file(BY_NAME["sd2-inpaint"]), {}).config.prediction == "eps"
    with pytest.raises(InputError, match="no prediction 'vv'"):
        detect(infos, {}, prediction="vv")


def test_families_bring_their_rules() -> None:
    sdxl, sd2, zoo = (detect(single_file(BY_NAME[name]), {}) for name in ("sdxl", "sd2", "ldm-cin256-v2"))
    assert (sdxl.config.clip_skip, sdxl.config.text_normed, sdxl.config.zeros_for_empty) == (2, False, True)
    assert (sdxl.config.latent_scale, sdxl.config.image_size) == (0.13025, (1024, 1024))
    assert (sd2.config.clip_skip, sd2.config.text_normed, sd2.config.latent_scale) == (1, True, 0.18215)
    assert zoo.config.schedule == ScheduleConfig(beta_start=0.0015, beta_end=0.0195)
    assert (zoo.config.latent_scale, zoo.scale_key) == (1.0, None)
    assert zoo.notes == ("1 attention heads: those of ldm-cin256-v2",)
    large = detect(single_file(BY_NAME["ldm-text2img-large"]), {}).config
    assert (large.schedule, large.latent_scale) == (ScheduleConfig(), 0.18215)
    churches = detect(single_file(BY_NAME["ldm-churches"]) | {"scale_factor": tensor()}, {})
    assert (churches.scale_key, churches.config.schedule.beta_end) == ("scale_factor", 0.0155)
    assert churches.ignored == {"latent scale": ("scale_factor",)}


def test_heads_come_from_the_metadata_where_they_are_given() -> None:
    infos = single_file(TINY)
    unet = detect(infos, {"num_heads": "4"}).config.unet
    assert unet is not None and (unet.num_heads, unet.num_head_channels) == (4, -1)
    for bad in ("0", "-1", "x", "9" * 30):
        with pytest.raises(CheckpointError, match="heads"):
            detect(infos, {"num_head_channels": bad})


def test_a_file_that_describes_itself_is_taken_at_its_word() -> None:
    own = replace(TINY, prediction="v", latent_scale=0.7, image_size=(32, 32))
    plan = detect(single_file(own), {"sfumato": own.to_json()})
    assert (plan.config, plan.prediction_evidence) == (own, "the file describes itself")
    assert detect(single_file(own), {"sfumato": own.to_json()}, prediction="eps").config.prediction == "eps"
    grouped = replace(own, unet=replace(TINY_UNET, num_groups=8, num_heads=2))
    assert detect(single_file(grouped), {"sfumato": grouped.to_json()}).config == grouped
    less = {name: info for name, info in single_file(own).items() if not name.startswith("first")}
    with pytest.raises(CheckpointError, match="describes its autoencoder"):
        detect(less, {"sfumato": own.to_json()})
    huge = replace(own, unet=replace(TINY_UNET, num_res_blocks=1_000_000, transformer_depth=1_000_000))
    with pytest.raises(CheckpointError, match="more layers of its unet than it holds"):
        detect(single_file(own), {"sfumato": huge.to_json()})
    odd = replace(own, unet=replace(TINY_UNET, num_heads=-1, num_head_channels=999_999))
    with pytest.raises(CheckpointError):
        detect(single_file(own), {"sfumato": odd.to_json()})


# What is not accounted for, and files of other kinds.


def test_a_tensor_that_no_rule_knows_stays_unknown() -> None:
    plan = detect(single_file(TINY) | {"model.diffusion_model.extra": tensor(3), "zzz": tensor()}, {})
    assert plan.unknown == ("model.diffusion_model.extra", "zzz")
    error = explain_unknown(plan.unknown, "a.ckpt", plan.parts)
    assert "a.ckpt holds 2 tensors" in error.message and "model.diffusion_model.extra, zzz" in error.message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora.up.weight", "a LoRA"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("emb_params", "a textual inversion"),
        ("double_blocks.0.img_attn.qkv.weight", "a Flux"),
        ("joint_blocks.0.x", "a Stable Diffusion 3"),
        ("decoder.layers.0.conv.weight", "TAESD"),
        ("something.resblocks.x", "an OpenCLIP text encoder"),
        ("something", "Give a Stable Diffusion checkpoint"),
    ],
)
def test_a_file_without_a_known_network_is_explained(name: str, kind: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        detect({name: tensor(3)}, {}, place="x.pt")
    assert kind in caught.value.hint
    assert name in caught.value.message


def test_an_empty_file_is_explained() -> None:
    with pytest.raises(CheckpointError, match="none at all"):
        detect({}, {})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("controlnet_down_blocks.0.weight", "a ControlNet"),
        ("conditioner.embedders.0.model.ln_final.weight", "SDXL's refiner"),
        ("edm_vpred.sigma_max", "EDM"),
        ("down_blocks.0.motion_modules.0.proj_in.weight", "a video model"),
    ],
)
def test_networks_that_share_names_with_ours_are_refused(name: str, kind: str) -> None:
    with pytest.raises(CheckpointError, match=kind):
        detect(infos_of("unet", TINY_UNET, "diffusers") | {name: tensor(3)}, {})


def test_parts_that_do_not_go_together_are_refused() -> None:
    for change, cause in (
        ({"text": CLIP_L}, "a context 64 wide, its encoder gives 768"),
        ({"autoencoder": VQ_F4}, "gives 4 channels, the autoencoder takes 3"),
    ):
        with pytest.raises(CheckpointError, match=cause):
            detect(single_file(replace(TINY, **change)), {})
    xl = BY_NAME["sdxl"]
    with pytest.raises(CheckpointError, match="takes a vector of 2560, not 2816"):
        detect(single_file(replace(xl, unet=replace(SDXL, adm_in_channels=2560))), {})


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda infos: without(infos, "input_blocks.1.1.transformer_blocks.1."), "transformers after"),
        (lambda infos: without(infos, "middle_block.1."), "no attention"),
        (
            lambda infos: without(infos, "input_blocks.1."),
            r"levels of \[1, 2\] residual blocks, which asks for 5 in the decoder, and it has 6",
        ),
    ],
)
def test_networks_that_no_options_describe_are_refused_with_the_reason(change: Any, cause: str) -> None:
    config = replace(TINY_UNET, num_res_blocks=2, transformer_depth=2)
    with pytest.raises(CheckpointError, match=cause):
        detect(change(infos_of("unet", config, "ldm")), {})


def without(infos: Infos, start: str) -> Infos:
    return {name: info for name, info in infos.items() if not name.startswith(start)}


def test_known_configurations_are_compared_with_a_file() -> None:
    infos = infos_of("autoencoder", VQ_F4, "diffusers", "vae/", variant="old")
    found = fit_part("autoencoder", VQ_F4, "diffusers", infos, prefix="vae/")
    assert found.names == list(infos)
    with pytest.raises(CheckpointError, match="whole autoencoder"):
        fit_part("autoencoder", KL_F8, "diffusers", infos, prefix="vae/")


def test_equal_networks_have_one_plain_form() -> None:
    written = replace(
        SDXL, attention_resolutions=(4, 2, 64), transformer_depth=(0, 2, 10), dropout=0.1, legacy=True
    )
    assert plain_form(written) == SDXL


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("model_ema.diffusion_modelout2bias", "ema"),
        ("sqrt_one_minus_alphas_cumprod", "schedule buffers"),
        ("sqrt_recipm1_alphas_cumprod", "schedule buffers"),
        ("log_one_minus_alphas_cumprod", "schedule buffers"),
        ("posterior_log_variance_clipped", "schedule buffers"),
        ("lvlb_weights", "schedule buffers"),
        ("denoiser.sigmas", "schedule buffers"),
        ("cond_stage_model.transformer.text_model.embeddings.position_ids", "position ids"),
        ("cond_stage_model.model.attn_mask", "causal mask"),
        ("first_stage_model.loss.perceptual_loss.net.slice1.0.weight", "autoencoder loss"),
        ("first_stage_model.quantize.used", "codebook usage"),
        ("safety_checker.concept_embeds", "safety checker"),
        ("optimizer_states.0.state.0.exp_avg", "training state"),
        ("callbacks", "training state"),
        ("logvar", "learned log-variance"),
        ("cond_stage_model.model.visual.proj", "vision tower"),
        ("model.diffusion_model.input_blocks.0.0.weight", None),
        ("betas.extra", None),
        ("first_stage_model.losses.x", None),
    ],
)
def test_rules(name: str, rule: str | None) -> None:
    assert rule_of(name) == rule
    assert rule is None or rule in RULES


WORDS = """
    input_blocks output_blocks middle_block down_blocks up_blocks encoder decoder down up mid block resnets
    attn text_model layers transformer resblocks attn_layers model diffusion_model first_stage_model
    cond_stage_model conditioner embedders embeddings embedding in_layers out_layers transformer_blocks op
    conv weight bias unet/ vae/ quantize 0 1 2 3 17 99999 999999999999 ² ٣ -1
"""
PIECES = st.sampled_from(WORDS.split()) | st.text(max_size=4)


@settings(max_examples=120, deadline=None)
@given(
    names=st.lists(st.lists(PIECES, min_size=1, max_size=7).map(".".join), max_size=30),
    sides=st.lists(st.integers(0, 2**62), max_size=4),
    keep=st.integers(0, 400),
)
def test_any_names_and_shapes_end_in_a_plan_or_one_kind_of_error(
    names: list[str], sides: list[int], keep: int
) -> None:
    infos: Mapping[str, TensorInfo] = {
        **dict(list(single_file(TINY).items())[:keep]),
        **{name: tensor(*sides) for name in names},
    }
    try:
        plan = detect(infos, {})
    except SfumatoError as error:
        assert isinstance(error, CheckpointError)
    else:
        assert_accounted(plan, dict(infos))


def mutations(infos: Infos) -> Iterator[Infos]:
    source = random.Random(0)
    for _ in range(80):
        name = source.choice(sorted(infos))
        shape = list(infos[name].shape)
        if shape:
            shape[source.randrange(len(shape))] = source.choice([0, 1, 7, 2**40])
        yield {**infos, name: replace(infos[name], shape=tuple(shape[: source.choice([1, 2, 4])]))}


def test_a_misshapen_tensor_anywhere_is_an_error_or_another_model() -> None:
    infos = single_file(TINY)
    for changed in mutations(infos):
        try:
            plan = detect(changed, {})
        except CheckpointError:
            continue
        assert (
            changed == infos
            or read(plan) != wanted(TINY)
            or all(
                pair.foreign_shapes() == [changed[name].shape for name in pair.foreign]
                for part in plan.parts.values()
                for pair in part.mapping
            )
        )


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lora_unet_mid_block.lora_up.weight", "--lora FILE"),
        ("emb_params", "--embedding-dir"),
        ("body.0.rdb1.conv1.weight", "sfumato upscale"),
    ],
)
def test_what_belongs_elsewhere_is_told_where(name: str, place: str) -> None:
    assert place in explain_unknown([name], "a.safetensors").hint
