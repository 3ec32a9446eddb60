"""The memory of fine-tuning Stable Diffusion 1.5, predicted; and one prediction held against a real run.

Run: python benchmarks/finetune_memory.py            the table of docs/fine-tuning.md, as JSON
     python benchmarks/finetune_memory.py measure    the embedded model on this machine's CPU
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sfumato.training.finetune.task as task_module
from sfumato.families import FAMILIES
from sfumato.training.config import TrainingConfig
from sfumato.training.finetune.memory import memory
from sfumato.training.run import make_task
from sfumato.training.settings_finetune import FinetuneConfig

GB = 1024**3
SETTINGS = {
    "LoRA, attention, rank 16": {"method": "lora"},
    "the same and the text encoder": {"method": "lora", "lora": {"text": True}},
    "LoRA, transformer, rank 16": {"method": "lora", "lora": {"targets": "transformer"}},
    "LoRA, convolutions too, rank 16": {"method": "lora", "lora": {"targets": "convolutions"}},
    "a word of 4 vectors": {"method": "textual_inversion", "inversion": {"word": "pim", "vectors": 4}},
    "ControlNet": {"method": "controlnet", "control": {"preprocessor": "canny"}},
    "U-Net": {"method": "full"},
    "U-Net and text encoder": {"method": "full", "text": True},
}
WAYS = {  # (frozen precision, checkpointing)
    "float32": ("float32", False),
    "bfloat16": ("bfloat16", False),
    "bfloat16, checkpointing": ("bfloat16", True),
}


def table() -> dict[str, dict[str, float]]:
    """GiB of each setting at 512 px, batch 1, computed in bfloat16."""
    found: dict[str, dict[str, float]] = {}
    for name, values in SETTINGS.items():
        found[name] = {}
        for way, (precision, saving) in WAYS.items():
            options = FinetuneConfig.model_validate({**values, "frozen_precision": precision})
            needed = memory(FAMILIES["sd1"], options, size=(512, 512), checkpointing=saving)
            found[name][way] = round(needed.total / GB, 2)
            found[name]["trained, million"] = round(needed.parameters / 1e6, 2)
            found[name][f"activations, {way}"] = round(needed.activations / GB, 2)
    return found


def measure(batch: int, values: dict[str, object]) -> dict[str, float]:
    """MiB that activations and everything of the trained weights take in two steps, against the prediction.

    On a CPU, in float32, with the fused attention that GPUs train with; the peak of the process before the
    first step is taken off.
    """
    task_module.training_attention = lambda device: nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder, "pictures")
        pictures.mkdir()
        rng = np.random.default_rng(0)
        for index in range(batch):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / f"{index}.png")
        config = TrainingConfig.model_validate(
            {
                "task": "finetune",
                "out": Path(folder, "run"),
                "device": "cpu",
                "finetune": values,
                "data": {"path": pictures, "size": 64, "workers": 0},
                "loop": {"precision": "float32", "channels_last": False},
            }
        )
        task = make_task(config, torch.device("cpu"))
        ((_, parameters),) = task.optimized().items()
        optimizer = torch.optim.AdamW(parameters)
        batches = task.batches(0, batch)
        next(batches)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(2):
            for _, loss, _ in task.losses(next(batches), 0):
                loss.backward(inputs=parameters)
            optimizer.step()
            optimizer.zero_grad()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = task.model.config  # type: ignore[attr-defined]
        needed = memory(model, FinetuneConfig.model_validate(values), size=(64, 64), batch=batch, half=False)
    grown = (
        needed.parameters * 12
    )  # gradients and AdamW's averages; weights were there, no averaged ones here
    return {
        "batch": batch,
        "measured_mib": round((after - before) / 1024, 1),
        "predicted_mib": round((needed.activations + grown) / 1024**2, 1),
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        print(json.dumps(measure(64, {"method": "lora", "lora": {"targets": "transformer"}})))
    else:
        print(json.dumps(table(), indent=1))
