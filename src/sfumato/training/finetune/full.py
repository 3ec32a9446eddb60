"""Fine-tuning of the networks themselves: the U-Net, and the text encoders where asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from sfumato.checkpoints.save import save_file
from sfumato.conditioning import Conditioning
from sfumato.errors import InputError
from sfumato.generation import draw
from sfumato.training.finetune.captions import Captions
from sfumato.training.finetune.method import Base, owned, trained_parameters


class Full:
    """All weights of the U-Net, and of the text encoders with `finetune.text`."""

    def __init__(self, base: Base) -> None:
        learned = base.options.text
        if learned and not base.text_parts:
            raise InputError(
                f"finetune.text is set, {base.model.name!r} has no text encoder", "Leave it out."
            )
        self.base = base
        self.captions = Captions(base.model, base.size, learned=learned)
        parts = {"unet": base.model.unet, **(base.text_parts if learned else {})}
        self.modules: Mapping[str, nn.Module] = {name: owned(module) for name, module in parts.items()}

    def parameters(self) -> list[nn.Parameter]:
        return trained_parameters(self.modules)

    def condition(self, captions: Sequence[str | None]) -> Conditioning:
        return self.captions(captions)

    def network(self, x: Tensor, t: Tensor, cond: Conditioning, hints: Tensor | None) -> Tensor:
        return self.base.network(x, t, cond)

    def draw(self, prompts: Sequence[str], hints: Tensor | None) -> Tensor:
        return draw(self.base.model, prompts, seeds=range(len(prompts)))

    def write(self, out: Path, tail: str = "") -> Path:
        """A whole model; the networks that were not trained are those of the file it came from."""
        base, path = self.base, out / f"model{tail}.safetensors"
        untouched = base.reopened()
        parts = {
            part: (self.modules[part] if part in self.modules else untouched.module(part)).state_dict()
            for part in untouched.modules
        }
        notices = "\n\n".join(filter(None, (base.model.config.notices, base.config.notices)))
        config = dataclasses.replace(base.model.config, name=base.config.name, notices=notices)
        save_file(path, config, parts, base.save_dtype(base.own_dtype))
        return path
