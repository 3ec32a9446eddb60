"""Models so small that a fine-tuning run takes a second, built as Stable Diffusion 1 and as SDXL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.checkpoints.build import NETWORKS
from sfumato.checkpoints.files import read_tensors
from sfumato.checkpoints.save import save_file
from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.clip import CLIPTextConfig
from sfumato.nn.unet import UNetConfig
from sfumato.presets import ModelConfig
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.config import TrainingConfig
from sfumato.training.finetune import FinetuneTask
from sfumato.training.loop import train
from sfumato.training.run import make_task

TOKENIZER = Tokenizer.train(["a square number 0 1 2 in blue ink", "the picture of a pim"], 530, 16)
TEXT = CLIPTextConfig(
    vocab_size=TOKENIZER.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=16, eos_token_id=TOKENIZER.end_id,
)  # fmt: skip
UNET = UNetConfig(
    in_channels=2, out_channels=2, model_channels=8, num_res_blocks=1, channel_mult=(1, 2),
    attention_resolutions=(2,), num_heads=2, use_spatial_transformer=True, context_dim=16, num_groups=8,
)  # fmt: skip
SD1 = ModelConfig(
    name="tiny",
    unet=UNET,
    autoencoder=AutoencoderConfig(
        ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=2, embed_dim=2, resolution=8, num_groups=2
    ),
    text=TEXT,
    tokenizer=TOKENIZER.to_json(),
    schedule=ScheduleConfig(),
    latent_scale=0.5,
    image_size=(8, 8),
    defaults={"steps": 2, "guidance": 2.0},
)
SDXL = replace(
    SD1,
    name="tiny-xl",
    unet=replace(
        UNET, use_linear_in_transformer=True, context_dim=40, num_classes="sequential",
        adm_in_channels=8 + 6 * 256, num_heads=-1, num_head_channels=8,
    ),
    text2=replace(TEXT, hidden_size=24, projection_dim=8, pad_token_id=0, hidden_act="gelu"),
    clip_skip=2,
    text_normed=False,
    zeros_for_empty=True,
    prediction="v",
)  # fmt: skip
CPU = torch.device("cpu")
BOTH = {"sd1": SD1, "sdxl": SDXL}


def networks(config: ModelConfig, seed: int = 0) -> dict[str, nn.Module]:
    """The networks of a model, no weight of them zero."""
    parts = {
        part: NETWORKS[part](getattr(config, part))
        for part in ("unet", "autoencoder", "text", "text2")
        if getattr(config, part) is not None
    }
    generator = torch.Generator().manual_seed(seed)
    for module in parts.values():
        for name, layer in module.named_modules():
            for kind, parameter in layer.named_parameters(recurse=False):
                if isinstance(layer, nn.GroupNorm | nn.LayerNorm) or parameter.ndim == 1:
                    mean = float(kind == "weight")
                    nn.init.normal_(parameter, mean, 0.05, generator=generator)
                else:
                    loud = 2.0 if ".attn2." in name else 0.7  # so that words make a difference
                    deviation = 0.3 if "embedding" in name else loud / parameter[0].numel() ** 0.5
                    nn.init.normal_(parameter, std=deviation, generator=generator)
    return parts


def written(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Path:
    """The file of a model."""
    path = folder / f"{config.name}.safetensors"
    save_file(path, config, {part: each.state_dict() for part, each in networks(config).items()}, dtype)
    return path


def tables(model: Path, out: Path, pictures: Path, **finetune: Any) -> dict[str, Any]:
    """A recipe of eight images."""
    return {
        "task": "finetune", "out": out, "device": "cpu", "name": "tuned", "seed": 3,
        "data": {"path": pictures, "size": 8, "workers": 0},
        "optimizer": {"learning_rate": 1e-3, "warmup_images": 0, "weight_decay": 0.0, "decay": "constant"},
        "loop": {
            "images": 8, "batch": 4, "ema_images": 0, "log_images": 4, "save_images": 4, "preview_images": 8,
            "precision": "float32", "channels_last": False,
        },
        "finetune": {"model": str(model), "prompts": ("a blue square",), **finetune},
    }  # fmt: skip


METHODS: Mapping[str, dict[str, Any]] = {
    "full": {"method": "full", "text": True},
    "lora": {"method": "lora", "lora": {"rank": 2, "alpha": 1.0, "targets": "convolutions", "text": True}},
    "textual_inversion": {
        "method": "textual_inversion",
        "inversion": {"word": "pim", "vectors": 2, "start": "blue square"},
        "prompts": ("the picture of a pim",),
    },
    "controlnet": {"method": "controlnet", "control": {"preprocessor": "canny", "widths": (4, 8)}},
}


def ran(config: TrainingConfig) -> tuple[FinetuneTask, list[dict[str, Any]]]:
    """The task after its run, and what the run reported."""
    lines: list[dict[str, Any]] = []
    task = make_task(config, CPU)
    assert isinstance(task, FinetuneTask)
    train(config, task, CPU, lambda line: lines.append(dict(line)))
    return task, lines


def state(config: TrainingConfig) -> dict[str, torch.Tensor]:
    """Every tensor of the newest state of a run."""
    newest = max((config.out / "states").glob("[0-9]*"))
    found: dict[str, torch.Tensor] = {}
    for path in newest.glob("*.safetensors"):
        found |= read_tensors(path)[0]
    return found
