"""The original's configurations, the tables of its yaml files: looked up and read, never imported from.

A configuration names classes by their places in the original's code; a place that is not in `TARGETS` or
`COND_STAGES` is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sfumato.checkpoints.build import NETWORKS, assign
from sfumato.checkpoints.files import open_file
from sfumato.compat.ddim import DDIMSampler
from sfumato.compat.diffusion import LatentDiffusion
from sfumato.compat.distributions import DiagonalGaussianDistribution
from sfumato.compat.encoders import ClassEmbedder
from sfumato.compat.networks import (
    AutoencoderKL,
    Decoder,
    Encoder,
    IdentityFirstStage,
    UNetModel,
    VQModel,
    VQModelInterface,
    restore,
)
from sfumato.compat.plms import PLMSSampler
from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import InputError, nearest
from sfumato.families import CLIP_L, OPENCLIP_H
from sfumato.model import StableDiffusion, load
from sfumato.nn.bert import BERTConfig
from sfumato.nn.classes import ClassEmbedderConfig
from sfumato.presets import ModelConfig
from sfumato.runtime import shapes_only
from sfumato.text.tokenizer import clip_json

ABSENT = ("__is_first_stage__", "__is_unconditional__")
ENCODERS = "ldm.modules.encoders.modules."
IDENTITY = "torch.nn.Identity"
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}
NEEDED = ("unet_config", "first_stage_config", "cond_stage_config")
USED = (
    *NEEDED, "timesteps", "beta_schedule", "linear_start", "linear_end", "given_betas", "parameterization",
    "scale_factor", "image_size", "conditioning_key", "first_stage_key", "cond_stage_key",
)  # fmt: skip
UNUSED = (  # of training and logging, or told by the networks themselves
    "base_learning_rate", "channels", "clip_denoised", "concat_keys", "concat_mode", "cond_stage_trainable",
    "finetune_keys", "ignore_keys", "keep_finetune_dims", "l_simple_weight", "learn_logvar", "load_ema",
    "load_only_unet", "log_every_t", "logvar_init", "loss_type", "masked_image_key", "monitor",
    "original_elbo_weight", "scale_by_std", "scheduler_config", "ucg_training", "use_ema",
)  # fmt: skip
FIXED = {  # what would change the computation, at the value that it has here
    "ckpt_path": None, "cond_stage_forward": None, "cosine_s": 8e-3, "num_timesteps_cond": 1,
    "use_positional_encodings": False, "v_posterior": 0.0,
}  # fmt: skip


def instantiate_from_config(config: Mapping[str, Any] | str) -> Any:
    """What a table {"target": a class of the original, "params": its arguments} means; nothing is imported.

    Networks have random weights, as the original's. "__is_first_stage__" and "__is_unconditional__" give
    None. Raises `InputError` for a target that is not in `TARGETS`, and for arguments that do not fit it.
    """
    if isinstance(config, str) and config in ABSENT:
        return None
    return construct(config, TARGETS)


def construct(config: Any, targets: Mapping[str, Callable[..., Any]]) -> Any:
    """The row of `targets` that a table names, called with its params; `InputError` where there is none."""
    if not isinstance(config, Mapping) or "target" not in config:
        raise InputError(f"a configuration without a target: {str(config)[:80]!r}", 'Give {"target": ...}.')
    target, params = str(config["target"]), config.get("params") or {}
    if target not in targets:
        raise InputError(f"there is no target {target[:80]!r} here", f"Known: {', '.join(targets)}.")
    try:
        signature(targets[target]).bind(**params)
        return targets[target](**params)
    except (TypeError, AttributeError, ArithmeticError) as error:  # a text for a number, and the like
        raise InputError(f"{target}: {error}", "Take its params from the model's yaml file.") from error


def load_model_from_config(
    config: Mapping[str, Any] | None,
    ckpt: str | Path,
    verbose: bool = False,
    vocab: str | Path | None = None,
) -> LatentDiffusion:
    """The checkpoint `ckpt` as the configuration describes it, in evaluation mode and float32.

    config: the whole table of a yaml file, of which "model" is read; None believes the checkpoint alone. A
    configuration with use_ema, which is the default there, gets the averaged weights of a file that has them.
    The model is on a cuda or mps device where there is one. `verbose` is taken and ignored: keys that do not
    fit are an error, not a print. vocab: BERT's vocab.txt, for the 1.45 B text model. Raises
    `CheckpointError`, and `InputError` where checkpoint and configuration contradict.
    """
    if config is None:
        return LatentDiffusion(load(ckpt, dtype=torch.float32, vocab=vocab)).eval()
    if "model" not in config:
        raise InputError("the configuration has no 'model'", "Give the whole table of the yaml file.")
    params = construct(config["model"], dict.fromkeys(DIFFUSION, _params))
    ema = bool(params.get("use_ema", True)) and has_averages(Path(ckpt))
    prediction = params.get("parameterization", "eps")
    model = load(ckpt, dtype=torch.float32, vocab=vocab, ema=ema, prediction=prediction)
    return with_keys(LatentDiffusion(described(model, params, str(ckpt))), params).eval()


def has_averages(path: Path) -> bool:
    """Whether `path` is a file with averaged weights beside those of training."""
    return path.is_file() and any(name.startswith("model_ema.") for name in open_file(path).infos)


def latent_diffusion(**params: Any) -> LatentDiffusion:
    """`LatentDiffusion(**params)` of the original, with random weights; errors as `model_config`."""
    config = model_config(params)
    parts = {part: NETWORKS[part](own) for part in NETWORKS if (own := getattr(config, part)) is not None}
    path = (params["first_stage_config"].get("params") or {}).get("ckpt_path")
    if path is not None:
        restore(parts["autoencoder"], path)
    return with_keys(LatentDiffusion(StableDiffusion(config, parts)), params)


def described(model: StableDiffusion, params: Mapping[str, Any], source: str) -> StableDiffusion:
    """The model with the schedule, prediction, scale, U-Net and first stage of the original's params.

    Weights are shared. Raises `CheckpointError` where they do not fit, `InputError` where a part is missing.
    """
    wanted = model_config(params)
    given: dict[str, nn.Module | None] = {"unet": model.unet, "autoencoder": model.autoencoder}
    parts: dict[str, nn.Module] = {}
    for part, module in given.items():
        config = getattr(wanted, part)
        if (config is None) != (module is None):
            raise InputError(f"{source} and its configuration disagree on whether it has an {part}")
        if module is not None:
            with shapes_only():
                parts[part] = NETWORKS[part](config)
            assign(parts[part], module.state_dict(), source)
    encoders = {"text": model.text_encoder, "text2": model.text_encoder2, "bert": model.bert}
    parts |= {part: one for part, one in {**encoders, "classes": model.classes}.items() if one is not None}
    # Not image_size: v2-inference-v.yaml says 64 x 64 latents of a model for 96 x 96.
    names = ["unet", "autoencoder", "schedule", "prediction"]
    if not params.get("scale_by_std"):  # else the checkpoint holds what was measured
        names.append("latent_scale")
    changed = {name: getattr(wanted, name) for name in names}
    return StableDiffusion(dataclasses.replace(model.config, **changed), parts, lambda: model.digest)


def with_keys(model: LatentDiffusion, params: Mapping[str, Any]) -> LatentDiffusion:
    """The model, which names the parts of a batch as the params do; `InputError` where they contradict it."""
    given, own = params.get("conditioning_key"), model.model.conditioning_key
    if given not in (None, own):
        raise InputError(f"conditioning_key is {given!r}, the U-Net's is {own!r}", "Correct the former.")
    model.first_stage_key = params.get("first_stage_key", model.first_stage_key)
    model.cond_stage_key = params.get("cond_stage_key", model.cond_stage_key)
    if isinstance(model.cond_stage_model, ClassEmbedder):
        model.cond_stage_model.key = model.cond_stage_key
    stage = params["cond_stage_config"]
    if isinstance(stage, Mapping) and stage.get("target") == IDENTITY:  # the condition is used as it is given
        model.cond_stage_model = nn.Identity()
    return model


def model_config(params: Mapping[str, Any]) -> ModelConfig:
    """What the params of the original's LatentDiffusion say of a model; what they leave out is its default.

    Raises `InputError` for a key that is missing, unknown, or of another meaning here.
    """
    for name, value in params.items():
        if name not in (*USED, *UNUSED, *FIXED):
            raise InputError(f"LatentDiffusion has no {name!r}", nearest(name, (*USED, *UNUSED, *FIXED)))
        if name in FIXED and value not in (None, FIXED[name]):
            raise InputError(f"{name} is {value!r}; here it is {FIXED[name]!r}", "Leave it out.")
    if missing := [name for name in NEEDED if name not in params]:
        raise InputError(f"LatentDiffusion lacks {', '.join(missing)}", "Take it from the model's yaml file.")
    with shapes_only():
        unet = construct(params["unet_config"], {UNET: UNetModel}).config
        first = construct(_without_weights(params["first_stage_config"]), FIRST_STAGES)
    autoencoder = None if isinstance(first, IdentityFirstStage) else first.config
    condition = params["cond_stage_config"]
    side = params.get("image_size", 256)
    sides = (side, side) if isinstance(side, int) else tuple(side)
    factor = 1 if autoencoder is None else autoencoder.downsampling
    return ModelConfig(
        name="model",
        unet=unet,
        autoencoder=autoencoder,
        schedule=_schedule(params),
        prediction=params.get("parameterization", "eps"),
        latent_scale=params.get("scale_factor", 1.0),
        image_size=tuple(factor * one for one in sides),
        **({} if condition in ABSENT else construct(condition, COND_STAGES)),
    )


def _without_weights(config: Any) -> Any:
    """A first stage's table without the path to its weights, which the model's own file holds too."""
    if not isinstance(config, Mapping) or not isinstance(config.get("params"), Mapping):
        return config
    params = {name: value for name, value in config["params"].items() if name != "ckpt_path"}
    return {**config, "params": params}


def _params(**params: Any) -> dict[str, Any]:
    return params


def _schedule(params: Mapping[str, Any]) -> ScheduleConfig:
    """The schedule by the original's words, whose "linear" is linear in sqrt(beta)."""
    count, kind = params.get("timesteps", 1000), params.get("beta_schedule", "linear")
    start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
    betas = params.get("given_betas")
    if betas is None and kind == "sqrt":
        betas = np.linspace(start, end, count) ** 0.5
    if betas is not None:
        return ScheduleConfig(kind="betas", num_timesteps=len(betas), betas=tuple(float(b) for b in betas))
    if kind not in SCHEDULES:
        raise InputError(f"there is no beta_schedule {kind!r}", nearest(kind, (*SCHEDULES, "sqrt")))
    return ScheduleConfig(SCHEDULES[kind], count, start, end)


def _clip(
    version: str = "openai/clip-vit-large-patch14", device: str = "", max_length: int = 77
) -> dict[str, Any]:
    if version != "openai/clip-vit-large-patch14":
        raise InputError(f"the text encoder {version!r} is not that of Stable Diffusion 1", "Load its file.")
    return {"text": CLIP_L, "tokenizer": clip_json()}


def _open_clip(
    arch: str = "ViT-H-14", version: str = "laion2b_s32b_b79k", device: str = "", max_length: int = 77,
    freeze: bool = True, layer: str = "last",
) -> dict[str, Any]:  # fmt: skip
    if arch != "ViT-H-14" or layer not in ("last", "penultimate"):
        raise InputError(f"the text encoder {arch!r} with layer {layer!r} is not known", "Load its file.")
    # The layer that is not read is left out here, not computed and thrown away.
    layers = 24 if layer == "last" else OPENCLIP_H.num_hidden_layers
    return {"text": dataclasses.replace(OPENCLIP_H, num_hidden_layers=layers), "tokenizer": clip_json("!")}


def _bert(
    n_embed: int, n_layer: int, vocab_size: int = 30522, max_seq_len: int = 77, device: str = "",
    use_tokenizer: bool = True, embedding_dropout: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    return {"bert": BERTConfig(n_embed, n_layer, vocab_size, max_seq_len)}


def _classes(embed_dim: int, n_classes: int = 1000, key: str = "class") -> dict[str, Any]:
    return {"classes": ClassEmbedderConfig(n_classes, embed_dim)}


def _nothing(**params: Any) -> dict[str, Any]:
    return {}


def _from_a_checkpoint(**params: Any) -> None:
    raise InputError(
        "a text encoder alone would have random weights; the original downloads them",
        "Load a checkpoint and take LatentDiffusion(model).cond_stage_model.",
    )


UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
FIRST_STAGES: Mapping[str, Callable[..., Any]] = {
    "ldm.models.autoencoder.AutoencoderKL": AutoencoderKL,
    "ldm.models.autoencoder.VQModel": VQModel,
    "ldm.models.autoencoder.VQModelInterface": VQModelInterface,
    "ldm.models.autoencoder.IdentityFirstStage": IdentityFirstStage,
    IDENTITY: IdentityFirstStage,
}
COND_STAGES: Mapping[str, Callable[..., dict[str, Any]]] = {
    f"{ENCODERS}FrozenCLIPEmbedder": _clip,
    f"{ENCODERS}FrozenOpenCLIPEmbedder": _open_clip,
    f"{ENCODERS}BERTEmbedder": _bert,
    f"{ENCODERS}ClassEmbedder": _classes,
    IDENTITY: _nothing,
}
DIFFUSION = (
    "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
    "ldm.models.diffusion.ddpm_edit.LatentDiffusion",
)
TARGETS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(DIFFUSION, latent_diffusion),
    **FIRST_STAGES,
    **dict.fromkeys(COND_STAGES, _from_a_checkpoint),
    f"{ENCODERS}ClassEmbedder": ClassEmbedder,
    UNET: UNetModel,
    "ldm.modules.diffusionmodules.model.Encoder": Encoder,
    "ldm.modules.diffusionmodules.model.Decoder": Decoder,
    "ldm.modules.distributions.distributions.DiagonalGaussianDistribution": DiagonalGaussianDistribution,
    "ldm.models.diffusion.ddim.DDIMSampler": DDIMSampler,
    "ldm.models.diffusion.plms.PLMSSampler": PLMSSampler,
    IDENTITY: nn.Identity,
}
