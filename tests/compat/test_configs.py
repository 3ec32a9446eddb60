"""Configurations of the original: looked up and read, never imported from; what they say is what is built."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.checkpoints.files import write_tensors
from sfumato.compat import configs
from sfumato.compat.configs import model_config
from sfumato.compat.ldm import (
    AutoencoderKL,
    ClassEmbedder,
    DDIMSampler,
    IdentityFirstStage,
    LatentDiffusion,
    UNetModel,
    VQModel,
    VQModelInterface,
    instantiate_from_config,
    load_model_from_config,
)
from sfumato.errors import CheckpointError, InputError
from sfumato.families import FAMILIES
from sfumato.model import StableDiffusion
from sfumato.nn.unet import UNet
from sfumato.runtime import shapes_only

DDCONFIG = {
    "double_z": True, "z_channels": 2, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8,
    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "num_groups": 8,
}  # fmt: skip
UNET = {
    "image_size": 8, "in_channels": 2, "out_channels": 2, "model_channels": 16, "attention_resolutions": [2],
    "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True,
    "transformer_depth": 1, "context_dim": 16, "num_groups": 8,
}  # fmt: skip
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 2, "monitor": "val/rec_loss", "ddconfig": DDCONFIG,
               "lossconfig": {"target": "torch.nn.Identity"}},
}  # fmt: skip
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {"embed_dim": 2, "n_embed": 9, "ddconfig": {**DDCONFIG, "double_z": False},
               "lossconfig": {"target": "torch.nn.Identity"}},
}  # fmt: skip
# The shape of configs/latent-diffusion/cin256-v2.yaml, made small.
CLASSES = {
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "linear_start": 0.0015, "linear_end": 0.0195, "num_timesteps_cond": 1, "log_every_t": 200,
        "timesteps": 1000, "first_stage_key": "image", "cond_stage_key": "class_label", "image_size": 8,
        "channels": 2, "cond_stage_trainable": True, "conditioning_key": "crossattn", "monitor": "val/loss",
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
        "first_stage_config": VQ,
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.ClassEmbedder",
                              "params": {"n_classes": 5, "embed_dim": 16, "key": "class_label"}},
    },
}  # fmt: skip
# The shape of configs/stable-diffusion/v1-inference.yaml.
STABLE = {
    "base_learning_rate": 1e-4,
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "linear_start": 0.00085, "linear_end": 0.0120, "num_timesteps_cond": 1, "log_every_t": 200,
        "timesteps": 1000, "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": 8, "channels": 2,
        "cond_stage_trainable": False, "conditioning_key": "crossattn", "monitor": "val/loss_simple_ema",
        "scale_factor": 0.18215, "use_ema": False,
        "scheduler_config": {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": {}},
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
        "first_stage_config": {
            "target": KL["target"], "params": {**KL["params"], "ckpt_path": "not/there.ckpt"},  # type: ignore[dict-item]
        },
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    },
}  # fmt: skip


def released(unet: dict[str, Any], first: dict[str, Any], stage: Any, **params: Any) -> dict[str, Any]:
    """The params of a released configuration."""
    table = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet}
    return {"unet_config": table, "first_stage_config": first, "cond_stage_config": stage, **params}


def encoder(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.modules.encoders.modules.{name}", "params": params}


BIG_DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
SD_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "num_heads": 8, "legacy": False,
    "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 768, "use_checkpoint": True,
}  # fmt: skip
SD_KL = {**KL, "params": {"embed_dim": 4, "ddconfig": BIG_DDCONFIG}}
SD_PARAMS = {"linear_start": 0.00085, "linear_end": 0.012, "scale_factor": 0.18215, "image_size": 64}
ZOO_VQ = {**VQ, "params": {"embed_dim": 3, "n_embed": 8192, "ddconfig": {
    **BIG_DDCONFIG, "double_z": False, "z_channels": 3, "ch_mult": [1, 2, 4],
}}}  # fmt: skip
RELEASED = {
    "sd1": released(SD_UNET, SD_KL, encoder("FrozenCLIPEmbedder"), **SD_PARAMS),
    "sd1-inpaint": released({**SD_UNET, "in_channels": 9}, SD_KL, encoder("FrozenCLIPEmbedder"),
                            conditioning_key="hybrid", finetune_keys=None, **SD_PARAMS),
    "sd2": released(
        {**{name: value for name, value in SD_UNET.items() if name != "num_heads"}, "num_head_channels": 64,
         "use_linear_in_transformer": True, "context_dim": 1024, "use_fp16": True},
        SD_KL, encoder("FrozenOpenCLIPEmbedder", freeze=True, layer="penultimate"), parameterization="v",
        **SD_PARAMS,
    ),
    "ldm-cin256-v2": released(
        {"image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 192, "num_res_blocks": 2,
         "attention_resolutions": [8, 4, 2], "channel_mult": [1, 2, 3, 5], "num_heads": 1,
         "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 512},
        ZOO_VQ, encoder("ClassEmbedder", n_classes=1001, embed_dim=512, key="class_label"),
        linear_start=0.0015, linear_end=0.0195, image_size=64,
    ),
    "ldm-text2img-large": released(
        {**SD_UNET, "context_dim": 1280}, SD_KL, encoder("BERTEmbedder", n_embed=1280, n_layer=32),
        **{**SD_PARAMS, "image_size": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", RELEASED)
def test_released_configurations_describe_the_released_models(family: str) -> None:
    given, wanted = model_config(RELEASED[family]), FAMILIES[family]
    for field in dataclasses.fields(wanted):
        # v2-inference-v.yaml says 64 x 64 latents of a model for 96 x 96.
        if field.name not in ("name", "unet", "defaults", *(["image_size"] if family == "sd2" else [])):
            assert getattr(given, field.name) == getattr(wanted, field.name), field.name
    assert given.unet is not None and wanted.unet is not None
    with shapes_only():
        ours, theirs = UNet(given.unet), UNet(wanted.unet)
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for width in {320, 640, 1280} if "sd" in family else {192, 384, 960}:
        assert given.unet.heads(width) == wanted.unet.heads(width)


def changed(config: dict[str, Any], **params: Any) -> dict[str, Any]:
    return {**config, "params": {**config["params"], **params}}


def test_a_class_conditional_model_from_its_configuration() -> None:
    model = instantiate_from_config(CLASSES)
    assert isinstance(model, LatentDiffusion) and isinstance(model.first_stage_model, VQModelInterface)
    assert isinstance(model.cond_stage_model, ClassEmbedder) and model.cond_stage_model.key == "class_label"
    assert (model.cond_stage_key, model.image_size, model.channels) == ("class_label", 8, 2)
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    np.testing.assert_allclose(model.betas.numpy(), betas, rtol=1e-6)
    names = set(model.state_dict())
    assert {"cond_stage_model.embedding.weight", "first_stage_model.quantize.embedding.weight"} <= names

    # The sampling loop of the original's class-conditional notebook.
    uc = model.get_learned_conditioning({model.cond_stage_key: torch.tensor([4, 4])})
    c = model.get_learned_conditioning({model.cond_stage_key: torch.tensor([0, 3])})
    assert torch.equal(c[:, 0], model.cond_stage_model.embedding.weight[[0, 3]])
    samples, _ = DDIMSampler(model).sample(
        S=4, conditioning=c, batch_size=2, shape=[2, 8, 8], verbose=False, unconditional_guidance_scale=3.0,
        unconditional_conditioning=uc, eta=0.0, quantize_x0=True,
    )  # fmt: skip
    pictures = model.decode_first_stage(samples)
    assert pictures.shape == (2, 3, 16, 16)
    latents = model.get_first_stage_encoding(model.encode_first_stage(pictures))
    assert isinstance(latents, torch.Tensor) and latents.shape == samples.shape
    raw = model.decode_first_stage(samples, force_not_quantize=True)
    assert not torch.allclose(raw, pictures)
    torch.testing.assert_close(
        model.decode_first_stage(model.quantize_first_stage(samples), force_not_quantize=True), pictures
    )


def test_quantised_x0_lies_in_the_codebook() -> None:
    model = instantiate_from_config(CLASSES)
    c = model.get_learned_conditioning({"class_label": torch.tensor([1])})
    _, drawn = DDIMSampler(model).sample(4, 1, (2, 8, 8), c, quantize_x0=True)
    entries = model.first_stage_model.quantize.embedding.weight.detach()
    nearest = (drawn["pred_x0"][-1].movedim(1, -1).reshape(-1, 1, 2) - entries).abs().sum(-1).min(dim=1)
    assert float(nearest.values.max()) == 0


def test_what_stable_diffusions_configuration_says() -> None:
    config = model_config(STABLE["params"])  # type: ignore[arg-type]
    assert config.latent_scale == 0.18215 and config.image_size == (16, 16) and config.prediction == "eps"
    assert (config.schedule.kind, config.schedule.beta_start) == ("scaled_linear", 0.00085)
    assert config.text is not None and config.text.num_hidden_layers == 12 and config.tokenizer is not None
    second = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
              "params": {"freeze": True, "layer": "penultimate"}}  # fmt: skip
    config = model_config({**STABLE["params"], "cond_stage_config": second, "parameterization": "v"})  # type: ignore[dict-item]
    assert config.text is not None and config.prediction == "v"
    assert (config.text.num_hidden_layers, config.text.hidden_size, config.text.pad_token_id) == (23, 1024, 0)
    bert = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {"n_embed": 16, "n_layer": 2}}
    config = model_config({**STABLE["params"], "cond_stage_config": bert})  # type: ignore[dict-item]
    assert config.bert is not None and (config.bert.n_layer, config.text) == (2, None)


@pytest.mark.parametrize(
    ("params", "kind", "betas"),
    [
        ({}, "scaled_linear", np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2),
        ({"beta_schedule": "sqrt_linear"}, "linear", np.linspace(1e-4, 0.02, 1000)),
        ({"beta_schedule": "sqrt", "timesteps": 10}, "betas", np.linspace(1e-4, 0.02, 10) ** 0.5),
        ({"given_betas": [0.1, 0.2, 0.3]}, "betas", np.array([0.1, 0.2, 0.3])),
    ],
)
def test_schedules_by_the_originals_words(params: dict[str, Any], kind: str, betas: np.ndarray) -> None:
    base = {name: value for name, value in CLASSES["params"].items() if not name.startswith("linear")}
    config = changed({**CLASSES, "params": base}, **params)
    config["params"].pop("timesteps") if params == {} else None
    model = instantiate_from_config(config)
    assert model.schedule.config.kind == kind
    np.testing.assert_allclose(model.betas.numpy(), betas, rtol=1e-6)


def test_networks_alone() -> None:
    assert isinstance(instantiate_from_config(KL), AutoencoderKL)
    assert isinstance(instantiate_from_config(VQ), VQModelInterface)
    assert isinstance(instantiate_from_config({**VQ, "target": "ldm.models.autoencoder.VQModel"}), VQModel)
    assert isinstance(instantiate_from_config(CLASSES["params"]["unet_config"]), UNetModel)
    assert isinstance(instantiate_from_config(CLASSES["params"]["cond_stage_config"]), ClassEmbedder)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), torch.nn.Identity)
    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": None}
    assert isinstance(instantiate_from_config(identity), IdentityFirstStage)
    assert instantiate_from_config("__is_unconditional__") is None


def test_pixels_without_a_condition() -> None:
    plain = {**UNET, "use_spatial_transformer": False, "context_dim": None, "num_heads": 4}
    config = changed(
        CLASSES,
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": plain},
        first_stage_config={"target": "torch.nn.Identity"},
        cond_stage_config="__is_unconditional__",
        conditioning_key=None,
    )
    model = instantiate_from_config(config)
    assert model.cond_stage_model is None and isinstance(model.first_stage_model, IdentityFirstStage)
    samples, _ = DDIMSampler(model).sample(2, 1, (2, 8, 8))
    assert samples.shape == (1, 2, 8, 8)


def test_a_picture_as_the_condition() -> None:
    """LDM's inpainting model: the first stage encodes the masked picture, the mask joins it."""
    wide = {**UNET, "in_channels": 5, "use_spatial_transformer": False, "context_dim": None, "num_heads": 4}
    config = changed(
        CLASSES,
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": wide},
        cond_stage_config="__is_first_stage__",
        conditioning_key="concat",
    )
    model = instantiate_from_config(config)
    assert model.cond_stage_model is model.first_stage_model
    masked = torch.rand(1, 3, 16, 16)
    c = model.cond_stage_model.encode(masked)
    assert torch.equal(model.get_learned_conditioning(masked), c)
    c = torch.cat((c, torch.zeros(1, 1, *c.shape[-2:])), dim=1)
    samples, _ = DDIMSampler(model).sample(S=2, conditioning=c, batch_size=1, shape=(2, 8, 8), verbose=False)
    assert model.decode_first_stage(samples).shape == (1, 3, 16, 16)
    as_it_is = changed(config, cond_stage_config={"target": "torch.nn.Identity"})  # LDM's super-resolution
    assert instantiate_from_config(as_it_is).get_learned_conditioning(c) is c
    joined = model.model.diffusion_model(torch.cat([samples, c], dim=1), torch.tensor([3]))
    assert torch.equal(model.apply_model(samples, torch.tensor([3]), {"c_concat": [c]}), joined)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.exec",
        "ldm.models.autoencoder.Nothing",
        "tests.compat.canary.Canary",
        7,
        None,
        "",
    ],
)
def test_an_unknown_target_is_never_imported(target: object) -> None:
    before = set(sys.modules)
    with pytest.raises(InputError, match=r"no target(.|\n)*Known: (.|\n)*LatentDiffusion"):
        instantiate_from_config({"target": target, "params": {"command": "touch here"}})
    for place in ("unet_config", "first_stage_config", "cond_stage_config"):
        with pytest.raises(InputError, match="no target"):
            instantiate_from_config(changed(CLASSES, **{place: {"target": target}}))
    assert set(sys.modules) == before


@pytest.mark.parametrize("config", ["nonsense", [], 3, None, {}, {"params": {}}])
def test_what_is_no_configuration(config: Any) -> None:
    with pytest.raises(InputError, match="without a target"):
        instantiate_from_config(config)


def test_arguments_are_checked() -> None:
    with pytest.raises(InputError, match="unexpected keyword argument 'depth'"):
        instantiate_from_config(changed(CLASSES["params"]["unet_config"], depth=3))
    with pytest.raises(InputError, match=r"no 'linear_stop'(.|\n)*'linear_start'"):
        instantiate_from_config(changed(CLASSES, linear_stop=0.1))
    with pytest.raises(InputError, match=r"LatentDiffusion: (.|\n)*params from the model's yaml"):
        instantiate_from_config(changed(CLASSES, timesteps="many", beta_schedule="sqrt"))
    with pytest.raises(InputError, match="lacks unet_config"):
        instantiate_from_config({"target": CLASSES["target"], "params": {"timesteps": 10}})
    with pytest.raises(InputError, match="conditioning_key is 'hybrid', the U-Net's is 'crossattn'"):
        instantiate_from_config(changed(CLASSES, conditioning_key="hybrid"))
    with pytest.raises(InputError, match="no beta_schedule 'cosin'"):
        instantiate_from_config(changed(CLASSES, beta_schedule="cosin"))
    with pytest.raises(InputError, match="use_positional_encodings is True"):
        instantiate_from_config(changed(CLASSES, use_positional_encodings=True))


@pytest.mark.parametrize("name", ["FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "BERTEmbedder"])
def test_a_text_encoder_alone_has_no_weights_to_have(name: str) -> None:
    with pytest.raises(InputError, match=r"random weights(.|\n)*cond_stage_model"):
        instantiate_from_config({"target": f"ldm.modules.encoders.modules.{name}"})


def test_load_model_from_config(tiny_model: StableDiffusion, tiny_model_file: Path) -> None:
    path = tiny_model_file
    config = {"model": STABLE, "data": {"target": "main.DataModuleFromConfig"}}
    model = load_model_from_config(config, path, verbose=True)
    assert model.scale_factor == 0.18215 and model.first_stage_key == "jpg" and not model.training
    assert model.source.config.text == tiny_model.config.text
    x, t = torch.randn(1, 2, 8, 8), torch.tensor([400])
    c = model.get_learned_conditioning("a fox")
    torch.testing.assert_close(model.apply_model(x, t, c), tiny_model.unet(x, t, c))
    assert load_model_from_config(None, path).scale_factor == 1.0

    # Heads cannot be told from weights: the configuration has the last word.
    heads = changed(STABLE, unet_config=changed(STABLE["params"]["unet_config"], num_heads=4))  # type: ignore[index]
    other = load_model_from_config({"model": heads}, path)
    assert not torch.allclose(other.apply_model(x, t, c), model.apply_model(x, t, c))

    wider = changed(STABLE, unet_config=changed(STABLE["params"]["unet_config"], model_channels=32))  # type: ignore[index]
    with pytest.raises(CheckpointError, match=r"does not fit(.|\n)*shape"):
        load_model_from_config({"model": wider}, path)
    with pytest.raises(InputError, match="no 'model'"):
        load_model_from_config(STABLE, path)
    with pytest.raises(InputError, match=r"no target 'ldm\.models\.autoencoder\.AutoencoderKL'"):
        load_model_from_config({"model": KL}, path)
    with pytest.raises(CheckpointError):
        load_model_from_config(config, path.with_name("nothing.ckpt"))


@pytest.mark.parametrize(
    ("in_file", "use_ema", "wanted"),
    [(True, None, True), (True, False, False), (False, None, False), (False, True, False)],
)
def test_averaged_weights_as_the_configuration_asks(
    tiny_model: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    in_file: bool, use_ema: bool | None, wanted: bool,
) -> None:  # fmt: skip
    asked: list[object] = []

    def load(path: Path, **options: object) -> StableDiffusion:
        asked.append(options["ema"])
        return tiny_model

    monkeypatch.setattr(configs, "load", load)
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"model_ema.decay" if in_file else "other": torch.zeros(1)}, {})
    params = {name: value for name, value in STABLE["params"].items() if name != "use_ema"}  # type: ignore[union-attr]
    given = {} if use_ema is None else {"use_ema": use_ema}
    load_model_from_config({"model": {**STABLE, "params": {**params, **given}}}, path)
    assert asked == [wanted]


def test_first_stage_weights_from_a_file(tiny_model: StableDiffusion, tiny_model_file: Path) -> None:
    path = tiny_model_file
    model = AutoencoderKL(DDCONFIG, None, 2, ckpt_path=path, ignore_keys=["loss"])
    assert tiny_model.autoencoder is not None
    wanted = tiny_model.autoencoder.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    whole = instantiate_from_config(changed(CLASSES, first_stage_config=changed(KL, ckpt_path=path)))
    assert torch.equal(whole.first_stage_model.quant_conv.weight, wanted["quant_conv.weight"])
    with pytest.raises(CheckpointError, match="does not fit VQModel"):
        VQModel({**DDCONFIG, "double_z": False}, None, 9, 2, ckpt_path=path)
