"""The original's `ldm.modules.encoders.modules` around the encoders of a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.conditioning import Conditioning
from sfumato.errors import InputError, nearest
from sfumato.model import StableDiffusion
from sfumato.nn import classes
from sfumato.nn.classes import ClassEmbedderConfig


class PromptEncoder(nn.Module):
    """Prompts to what the network of a loaded model is conditioned on; the base of the text encoders here."""

    def __init__(self, model: StableDiffusion, transformer: nn.Module, max_length: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.max_length = max_length
        self._encode: Callable[[list[str]], Conditioning] = model.encode_prompt

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.transformer.parameters()).device

    def forward(self, text: str | Sequence[str]) -> Any:
        """One prompt or several -> token-wise features (b, tokens, width), of the layer the model reads.

        For SDXL a condition with its vector as well: {"c_crossattn": [features], "c_adm": (b, width)}.
        """
        cond = self._encode(prompts(text))
        if cond.vector is None:
            return cond.context
        return {"c_crossattn": [cond.context], "c_adm": cond.vector}

    def encode(self, text: str | Sequence[str]) -> Any:
        """The same as a call."""
        return self(text)

    def freeze(self) -> None:
        """Does nothing: a loaded model's text encoder is frozen."""


class FrozenCLIPEmbedder(PromptEncoder):
    """CLIP's text transformer in `model`, as `transformer`, and SDXL's second one as `transformer2`.

    The original's FrozenOpenCLIPEmbedder is this class for Stable Diffusion 2. `InputError` for a model
    without one.
    """

    def __init__(self, model: StableDiffusion) -> None:
        encoder, second = model.text_encoder, model.text_encoder2
        if encoder is None:
            raise InputError(f"{model.name!r} has no text encoder", "Give a model that was trained on text.")
        super().__init__(model, encoder, encoder.config.max_position_embeddings)
        if second is not None:
            self.transformer2 = second
        self.tokenizer = model.tokenizer


class BERTEmbedder(PromptEncoder):
    """The text transformer of LDM's 1.45 B model; `InputError` for a model without it."""

    def __init__(self, model: StableDiffusion) -> None:
        if model.bert is None:
            raise InputError(f"{model.name!r} has no BERTEmbedder", "Give LDM's 1.45 B text-to-image model.")
        super().__init__(model, model.bert.transformer, model.bert.config.max_seq_len)
        self.tknz_fn = model.tokenizer

    def forward(self, text: str | Sequence[str] | Tensor) -> Any:
        """Prompts, or (b, n) long token ids where there is no tokenizer -> features (b, n, width)."""
        return self.transformer(text.to(self.device)) if isinstance(text, Tensor) else super().forward(text)

    def encode(self, text: str | Sequence[str] | Tensor) -> Any:
        """The same as a call."""
        return self(text)


class ClassEmbedder(classes.ClassEmbedder):
    """`ldm.modules.encoders.modules.ClassEmbedder`: labels in a batch, as contexts of one token."""

    key = "class_label"

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__(ClassEmbedderConfig(n_classes=n_classes, embed_dim=embed_dim))
        self.key = key

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a batch, in the original
        self, batch: Mapping[str, Tensor], key: str | None = None
    ) -> Tensor:
        """Labels (b,) long -> (b, 1, embed_dim); `InputError` naming the keys that there are."""
        return super().forward(
            labels(batch, self.key if key is None else key).to(self.embedding.weight.device)
        )


def prompts(text: str | Sequence[str]) -> list[str]:
    """A list of prompts of one prompt or of several; `InputError` for anything else."""
    found = [text] if isinstance(text, str) else list(text)
    for one in found:
        if not isinstance(one, str):
            raise InputError(f"a prompt is a {type(one).__name__}", "Give a text, or a list of texts.")
    return found


def labels(batch: Mapping[str, Tensor], key: str) -> Tensor:
    """The labels (b,) under `key`; `InputError` naming the keys that there are."""
    if not isinstance(batch, Mapping):
        raise InputError(f"labels are a {type(batch).__name__}", f"Give {{{key!r}: labels}}.")
    if key not in batch:
        raise InputError(f"there is no {key!r} in the batch", nearest(key, batch))
    return batch[key]
