"""Our side of the training comparison: the task and the loop of `sfumato train`, in a fresh process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sfumato.training.config import TrainingConfig
from sfumato.training.loop import train
from sfumato.training.run import make_task
from training_side import (
    BATCH,
    CHANNELS,
    CLIP_NORM,
    GROUPS,
    HEAD_WIDTH,
    LEARNING_RATE,
    PIXELS,
    WIDTHS,
    Watch,
    options,
    tell,
)


def recipe(work: Path, steps: int, text_cache: bool) -> TrainingConfig:
    """The recipe folder-diffusion.toml with a frozen text encoder, as the reference's script has it.

    text_cache: captions are encoded once, as latents are; not where bare steps are compared.
    """
    images = steps * BATCH
    values: dict[str, Any] = {
        "task": "diffusion", "out": work / "ours", "device": "cpu",
        "data": {"path": work / "pictures", "size": PIXELS, "workers": 0},
        "diffusion": {
            "autoencoder": work / "ours-autoencoder.safetensors", "text_from": work / "ours-text.safetensors",
            "text_trainable": False, "text_cache": text_cache, "caption_dropout": 0.0, "steps": 1,
        },
        "unet": {
            "in_channels": CHANNELS, "out_channels": CHANNELS, "model_channels": WIDTHS[0],
            "channel_mult": [width // WIDTHS[0] for width in WIDTHS], "num_res_blocks": 1,
            "attention_resolutions": [2, 4], "num_head_channels": HEAD_WIDTH, "num_groups": GROUPS,
            "use_spatial_transformer": True, "use_linear_in_transformer": True, "context_dim": 256,
        },
        "optimizer": {
            "learning_rate": LEARNING_RATE, "warmup_images": 0, "decay": "constant", "clip_norm": CLIP_NORM,
        },
        "loop": {
            "images": images, "batch": BATCH, "log_images": BATCH, "save_images": images,
            "preview_images": images, "precision": "float32", "channels_last": False,
        },
    }  # fmt: skip
    return TrainingConfig.model_validate(values)


class Measured(Exception):
    """The last step has been taken; what follows it, previews and files, is not compared."""


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    config, device = recipe(given.work, given.steps, not (given.cached or given.encode)), torch.device("cpu")
    torch.manual_seed(0)
    if given.encode:
        make_task(config, device)
        return
    watch, last = Watch(), 0.0
    task = make_task(config, device)
    parameters = sum(p.numel() for module in task.modules.values() for p in module.parameters())

    def report(line: Mapping[str, float | str]) -> None:
        nonlocal last
        if "loss" in line:
            last = float(line["loss"])
            watch.step()
            if len(watch.ends) == given.steps:
                raise Measured

    try:
        train(config, task, device, report)
    except Measured:
        tell(watch, parameters, last)


if __name__ == "__main__":
    main()
