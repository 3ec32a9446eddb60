"""What the ways of fine-tuning have in common: the model they start from, and what each has to tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sfumato.checkpoints.load import ModelFile, open_model
from sfumato.conditioning import Conditioning
from sfumato.model import EMBEDDED, StableDiffusion
from sfumato.request import Request
from sfumato.training.config import TrainingConfig
from sfumato.training.settings_finetune import FinetuneConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TEXT_PARTS = ("text", "text2", "bert")


@dataclass(frozen=True)
class Base:
    """The model that is fine-tuned, its networks frozen, and the recipe.

    denoise: the U-Net, or it compiled.
    """

    config: TrainingConfig
    options: FinetuneConfig
    file: ModelFile
    model: StableDiffusion
    denoise: Callable[..., Tensor]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        return self.config.data.shape

    @property
    def request(self) -> Request:
        """What drawings ask for beside their prompts: the size that is trained, not the model's."""
        height, width = self.size
        return Request(width=width, height=height)

    @property
    def text_parts(self) -> dict[str, nn.Module]:
        """The model's text encoders by name."""
        found = {part: self.model.part(part) for part in TEXT_PARTS}
        return {part: module for part, module in found.items() if module is not None}

    def network(self, x: Tensor, t: Tensor, cond: Conditioning, residuals: Sequence[Tensor] = ()) -> Tensor:
        """The raw prediction in the U-Net's own number format; residuals: a control network's."""
        device, dtype = self.model.device, self.model.dtype
        cond = cond.to(device, dtype)
        return self.denoise(
            x.to(dtype), t.to(device).float(), context=cond.context, vector=cond.vector,
            residuals=[residual.to(dtype) for residual in residuals],
        )  # fmt: skip

    def reopened(self) -> ModelFile:
        """The model as it lies in its file, in the file's own number formats."""
        return open_model(self.options.model or EMBEDDED)

    def save_dtype(self, auto: torch.dtype) -> torch.dtype:
        """The number format of what is written."""
        wanted = self.options.save_precision
        return auto if wanted == "auto" else DTYPES[wanted]

    @property
    def own_dtype(self) -> torch.dtype:
        """That of the U-Net in the model's file, or float16 where that is none to train in."""
        part = self.file.opened.parts["unet"]
        found = part.info(part.names[0]).dtype
        return found if found in DTYPES.values() else torch.float16


class Method(Protocol):
    """A way of fine-tuning: what it trains, how the model then answers, and what is written of it."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """What is trained, and nothing else of the model."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps."""
        ...

    def condition(self, captions: Sequence[str | None]) -> Conditioning:
        """The conditions of captions, a row each; None is a caption that was left out."""
        ...

    def network(self, x: Tensor, t: Tensor, cond: Conditioning, hints: Tensor | None) -> Tensor:
        """The raw prediction for samples x (b, c, h, w); hints: (b, 3, H, W) in 0..1 for a ControlNet."""
        ...

    def draw(self, prompts: Sequence[str], hints: Tensor | None) -> Tensor:
        """Pictures (n, c, h, w), about -1..1, the i-th with seed i, of the size that is trained."""
        ...

    def write(self, out: Path, tail: str = "") -> Path:
        """Write what was trained into the folder of the run; returns the file that is used first.

        tail: of the files' names, for other averages of the weights.
        """
        ...


def owned(module: nn.Module) -> nn.Module:
    """The network made to be trained: in float32, and no longer in the file that it was mapped from."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return module.requires_grad_(True).train()


def trained_parameters(modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """All of them, in the order of the modules."""
    return [parameter for module in modules.values() for parameter in module.parameters()]
