"""Fine-tuning of the networks themselves: the U-Net, and the text encoders where asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sfumato.checkpoints.save import save_file
from sfumato.errors import InputError
from sfumato.training.finetune.as_it_is import AsItIs
from sfumato.training.finetune.captions import Captions
from sfumato.training.finetune.method import Base, owned


class Full(AsItIs):
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
