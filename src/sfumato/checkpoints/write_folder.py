"""A model as a diffusers folder: configs, weights, tokenizers and the index, put in place as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sfumato.checkpoints.files import disk_errors, sync
from sfumato.checkpoints.layouts.diffusers_rest import scheduler_values, tokenizer_files, wordpiece_files
from sfumato.checkpoints.layouts.diffusers_stages import autoencoder_values, bert_values, text_values
from sfumato.checkpoints.layouts.diffusers_unet import unet_values
from sfumato.checkpoints.layouts.tables import FOLDERS
from sfumato.checkpoints.schema import WRITTEN_FOR
from sfumato.checkpoints.source import TensorInfo
from sfumato.checkpoints.stream import check_space, write_stream
from sfumato.diffusion.low_scale import MAX_NOISE_LEVEL, NOISE
from sfumato.errors import CheckpointError, InputError
from sfumato.presets import ModelConfig, concat_kind
from sfumato.text.encode import read_tokenizer
from sfumato.text.wordpiece import WordPiece

UNET_FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
OWN = ("model_index.json", "config.json")  # what makes a folder one that may be replaced


class Weights(Protocol):
    """The tensors of one file to be."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...
    @property
    def size(self) -> int: ...

    def read(self, name: str, /) -> Tensor: ...


def write_folder(out: Path, config: ModelConfig, weights: Mapping[str, Weights], *, alone: bool) -> None:
    """Write the parts in `weights` under diffusers' names; the folder appears, or is replaced, when whole.

    alone: a part by itself, without an index; with one part, its config and weights lie in `out` directly.
    Raises `CheckpointError` for what diffusers has no place for, before anything is written.
    """
    texts = {} if alone else pipeline_texts(config)
    folders = {part: _folder(part, config) for part in weights}
    if alone and len(folders) == 1:
        folders = dict.fromkeys(folders, "")
    for part, folder in folders.items():
        texts[os.path.join(folder, "config.json")] = _json(part_values(part, config))
    if out.exists() and not any((out / name).exists() for name in OWN) and any(out.iterdir()):
        raise InputError(f"{out} is no model's folder, and is not replaced", "Choose another place.")
    check_space(out, sum(part.size for part in weights.values()))
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    with disk_errors(out):
        try:
            temporary.mkdir(parents=True)
            for name, text in texts.items():
                place = temporary / name
                place.parent.mkdir(exist_ok=True)
                place.write_text(text, encoding="utf-8")
                sync(place)
            for part, folder in folders.items():
                name = TEXT_FILE if part in ("text", "text2", "bert") else UNET_FILE
                write_stream(
                    temporary / folder / name, weights[part].infos, weights[part].read, {"format": "pt"}
                )
            if out.exists():
                out.rename(old)
            temporary.rename(out)
            sync(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not out.exists():
                old.rename(out)
            shutil.rmtree(old, ignore_errors=True)


def part_values(part: str, config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of one part."""
    if part == "unet":
        assert config.unet is not None
        factor = 1 if config.autoencoder is None else config.autoencoder.downsampling
        return unet_values(config.unet, max(1, config.image_size[-1] // factor))
    if part == "autoencoder":
        assert config.autoencoder is not None
        return autoencoder_values(config.autoencoder, config.latent_scale)
    if part == "bert":
        assert config.bert is not None
        return bert_values(config.bert)
    tower = config.text2 if part == "text2" else config.text
    assert tower is not None
    return text_values(tower)


def pipeline_texts(config: ModelConfig) -> dict[str, str]:
    """The text files of a pipeline: file name -> contents. `CheckpointError` where diffusers has none."""
    index = pipeline_index(config)
    texts = {
        "model_index.json": _json(index),
        "scheduler/scheduler_config.json": _json(scheduler_values(config.schedule, config.prediction)),
    }
    if "low_res_scheduler" in index:
        values = scheduler_values(NOISE, "eps") | {"_class_name": "DDPMScheduler"}
        del values["set_alpha_to_one"]  # DDIM's own
        texts["low_res_scheduler/scheduler_config.json"] = _json(values)
    tokenizer = None if config.tokenizer is None else read_tokenizer(config.tokenizer)
    if isinstance(tokenizer, WordPiece):
        texts |= {f"tokenizer/{name}": text for name, text in wordpiece_files(tokenizer).items()}
    elif tokenizer is not None:
        for folder, tower in (("tokenizer", config.text), ("tokenizer_2", config.text2)):
            if tower is not None:
                files = tokenizer_files(tokenizer, tower.pad_id)
                texts |= {f"{folder}/{name}": text for name, text in files.items()}
    return texts


def pipeline_index(config: ModelConfig) -> dict[str, Any]:
    """`model_index.json`: which pipeline this is, and the classes of its parts."""
    unet = config.unet
    if unet is None or config.classes is not None or config.autoencoder is None:
        lacking = "a U-Net" if unet is None else "the class embedder" if config.classes else "an autoencoder"
        verb = "holds" if config.classes is not None and unet is not None else "needs"
        raise CheckpointError(
            f"a diffusers folder {verb} {'no ' if verb == 'holds' else ''}{lacking.removeprefix('the ')}",
            "Write the ldm layout, or one part with --only.",
        )
    kl = "AutoencoderKL" if config.autoencoder.n_embed is None else "VQModel"
    index: dict[str, Any] = {
        "_diffusers_version": WRITTEN_FOR,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel" if unet.use_spatial_transformer else "UNet2DModel"],
        _folder("autoencoder", config): ["diffusers", kl],
    }
    if config.text is not None:
        index |= {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
        if config.text2 is not None:
            index |= {
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                "tokenizer_2": ["transformers", "CLIPTokenizer"],
                "force_zeros_for_empty_prompt": config.zeros_for_empty,
                "_class_name": "StableDiffusionXLPipeline",
            }
        else:
            index |= {
                "feature_extractor": [None, None],
                "safety_checker": [None, None],
                **(UPSCALER if concat_kind(config) == "enlarges" else {"requires_safety_checker": False}),
            }
            index.setdefault("_class_name", STABLE_DIFFUSION.get(unet.in_channels, "StableDiffusionPipeline"))
    elif config.bert is not None:
        index |= {
            "bert": ["latent_diffusion", "LDMBertModel"],
            "tokenizer": ["transformers", "BertTokenizer"],
            "_class_name": "LDMTextToImagePipeline",
        }
    else:
        small = concat_kind(config) == "enlarges"
        index["_class_name"] = "LDMSuperResolutionPipeline" if small else "LDMPipeline"
    return dict(sorted(index.items()))


UPSCALER = {
    "_class_name": "StableDiffusionUpscalePipeline",
    "low_res_scheduler": ["diffusers", "DDPMScheduler"],
    "max_noise_level": MAX_NOISE_LEVEL,
    "watermarker": [None, None],
}
STABLE_DIFFUSION = {  # by the channels of the U-Net's input
    8: "StableDiffusionInstructPix2PixPipeline",
    9: "StableDiffusionInpaintPipeline",
}


def _folder(part: str, config: ModelConfig) -> str:
    latent_diffusion = config.text is None and config.unet is not None
    return "vqvae" if part == "autoencoder" and latent_diffusion else FOLDERS[part]


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
