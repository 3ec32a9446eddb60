"""What the tests of first stages share: options of tiny ones, their task, its first batch."""

from __future__ import annotations

from typing import Any

import torch

from sfumato.training.config import TrainingConfig
from sfumato.training.run import make_task
from sfumato.training.tasks.autoencoder import AutoencoderTask

CPU = torch.device("cpu")
VQ = {"double_z": False, "n_embed": 16}
SHORT = {"images": 16, "save_images": 8, "preview_images": 16}


def task_of(config: TrainingConfig) -> AutoencoderTask:
    torch.manual_seed(config.seed)
    task = make_task(config, CPU)
    assert isinstance(task, AutoencoderTask)
    return task


def batch_of(task: AutoencoderTask) -> Any:
    batches = task.batches(0, 4)
    batch = next(batches)
    batches.close()
    return batch
