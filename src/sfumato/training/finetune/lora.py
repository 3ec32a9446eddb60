"""Fine-tuning by low-rank changes of a frozen model (Hu et al. 2021), written for every other program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sfumato.checkpoints.addons.write import Dialect, LowRank, write_lora
from sfumato.errors import InputError
from sfumato.training.finetune.as_it_is import AsItIs
from sfumato.training.finetune.captions import Captions
from sfumato.training.finetune.low_rank import Factors, adapt
from sfumato.training.finetune.method import Base


class Lora(AsItIs):
    """Changes beside the layers that the recipe names; the model's own weights stay as they are."""

    def __init__(self, base: Base) -> None:
        options = base.options.lora
        self.base = base
        self.captions = Captions(base.model, base.size, learned=options.text)
        self.factors: dict[tuple[str, str], Factors] = {}
        modules: dict[str, nn.Module] = {}  # a network's changes by its name, for `optimizer.learning_rates`
        texts = {part: module for part, module in base.text_parts.items() if part != "bert"}
        if options.text and not texts:
            raise InputError(
                f"{base.model.name!r} has no CLIP to train with", "Leave out finetune.lora.text."
            )
        for part, network in {"unet": base.model.unet, **(texts if options.text else {})}.items():
            made = adapt(
                network, options.targets, options.rank, options.alpha or options.rank, options.dropout,
                f"{base.config.seed}/{part}",
            )  # fmt: skip
            self.factors |= {(part, name): factors for name, factors in made.items()}
            named = {name.replace(".", "_"): factors for name, factors in made.items()}
            modules[part] = nn.ModuleDict(named).train()
        self.modules: Mapping[str, nn.Module] = modules

    def write(self, out: Path, tail: str = "") -> Path:
        """Kohya's dialect under the run's name, which is the one most programs read, and PEFT's beside it."""
        layers = [
            LowRank(part, name, factors.down.detach(), factors.up.detach(), factors.alpha)
            for (part, name), factors in self.factors.items()
        ]
        name, dtype = self.base.config.name, self.base.save_dtype(torch.float32)
        more = {"notices": self.base.config.notices} if self.base.config.notices else {}
        path = out / f"{name}{tail}.safetensors"
        dialects: dict[Path, Dialect] = {path: "kohya", out / f"{name}{tail}-peft.safetensors": "peft"}
        for place, dialect in dialects.items():
            write_lora(place, self.base.model.config, layers, dialect, dtype, {"title": name, **more})
        return path
