"""Memory told from shapes against what a real step keeps."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

sys.path.insert(0, str(Path(__file__).parent))
from finetune_models import METHODS, SD1, tables, written

import sfumato.training.finetune.task as task_module
from sfumato.errors import InputError
from sfumato.families import FAMILIES
from sfumato.training.config import TrainingConfig
from sfumato.training.finetune import FinetuneTask
from sfumato.training.finetune.memory import Saved, memory
from sfumato.training.run import make_task
from sfumato.training.settings_finetune import FinetuneConfig


@pytest.mark.parametrize("method", ["full", "lora", "controlnet"])
def test_what_the_backward_pass_keeps(
    method: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"text": False} if method == "full" else {"lora": {"rank": 2}} if method == "lora" else {}
    more |= {"control": {"preprocessor": "canny"}} if method == "controlnet" else {}
    model = written(tmp_path, SD1)
    values = tables(model, tmp_path / "run", pictures, **{**METHODS[method], **more})
    task = make_task(TrainingConfig.model_validate(values), torch.device("cpu"))
    assert isinstance(task, FinetuneTask)
    monkeypatch.setattr(task_module, "training_attention", lambda device: nullcontext())  # as on a GPU
    networks = (task.model.unet, *task.base.text_parts.values(), *task.modules.values())
    saved = Saved({p.untyped_storage()._cdata for each in networks for p in each.parameters()})
    batch = next(task.batches(0, 8))
    with saved_tensors_hooks(saved.keep, lambda tensor: tensor):
        list(task.losses(batch, 0))
    needed = memory(SD1, task.options, size=(8, 8), batch=8, half=False)
    assert needed.activations == pytest.approx(saved.bytes, rel=0.05)
    assert needed.parameters == sum(p.numel() for p in task.method.parameters())
    assert needed.trained == 20 * needed.parameters and needed.casts == 0


def test_what_saves_memory_saves_it() -> None:
    def needed(checkpointing: bool = False, **values: object) -> int:
        options = FinetuneConfig.model_validate(values)
        return memory(FAMILIES["sd1"], options, size=(512, 512), checkpointing=checkpointing).total

    plain = needed(method="lora")
    assert needed(method="lora", frozen_precision="bfloat16") < plain
    assert needed(True, method="lora") < plain < needed(method="lora", lora={"text": True})
    assert plain < needed(method="full")


def test_a_model_without_words_is_refused() -> None:
    with pytest.raises(InputError, match="no U-Net, CLIP"):
        memory(FAMILIES["ldm-unconditional"], FinetuneConfig(), size=(256, 256))
