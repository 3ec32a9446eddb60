"""Captions to conditions: encoded once where text encoders are frozen, with gradients where they learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from sfumato.conditioning import Conditioning, concatenate
from sfumato.errors import InputError
from sfumato.model import StableDiffusion
from sfumato.text import encode
from sfumato.text.tokenizer import Tokenizer
from sfumato.text.wordpiece import WordPiece
from sfumato.training.data import Dataset, Placed, Position

KEPT = 4096  # captions whose conditions are kept: 1 GB for Stable Diffusion 1 in float32


class Captions:
    """The conditions of captions; None is no caption, which the model may know as all zeros.

    size: (height, width) of the pictures, which SDXL is told. learned: the text encoders change, so that
    nothing is kept, and gradients reach them.
    """

    def __init__(self, model: StableDiffusion, size: tuple[int, int], *, learned: bool) -> None:
        self.model, self.size, self.learned = model, size, learned
        self.kept: dict[str | None, Conditioning] = {}

    def __call__(self, captions: Sequence[str | None]) -> Conditioning:
        """One row for each caption. A frozen encoder sees each alone: so a row does not hang on its batch."""
        if not self.learned:
            return concatenate([self._frozen(caption) for caption in captions])
        found = encoded(self.model, [caption or "" for caption in captions], self.size)
        return blanked(self.model, found, [caption is None for caption in captions], self.size)

    @torch.no_grad()
    def _frozen(self, caption: str | None) -> Conditioning:
        if caption not in self.kept:
            if len(self.kept) == KEPT:
                self.kept.pop(next(iter(self.kept)))
            found = encoded(self.model, [caption or ""], self.size)
            self.kept[caption] = blanked(self.model, found, [caption is None], self.size)
        return self.kept[caption]


def encoded(model: StableDiffusion, texts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    """The conditions of texts as they stand, as `model.encode_prompt`, but for gradients."""
    config, tokenizer, first = model.config, model.tokenizer, model.text_encoder
    if config.bert is not None and isinstance(tokenizer, WordPiece) and model.bert is not None:
        return encode.encode_wordpieces(texts, tokenizer, model.bert).conditioning
    if first is None or not isinstance(tokenizer, Tokenizer):
        return Conditioning()
    second, skip, normed = model.text_encoder2, config.clip_skip, config.text_normed
    if second is None:
        return encode.encode_prompts(texts, tokenizer, first, skip, normed).conditioning
    sizes = encode.Sizes(size)
    return encode.encode_two_towers(texts, tokenizer, (first, second), sizes, skip, normed).conditioning


def blanked(
    model: StableDiffusion, found: Conditioning, none: Sequence[bool], size: tuple[int, int]
) -> Conditioning:
    """The rows without a caption as the model draws unconditionally, where that is all zeros."""
    if found.context is None or not model.config.zeros_for_empty or not any(none):
        return found
    blank = model.uncondition(1, size=size).to(found.context.device, found.context.dtype)
    where = torch.tensor(list(none), device=found.context.device)
    context = torch.where(where[:, None, None], cast(Tensor, blank.context), found.context)
    if found.vector is None:
        return replace(found, context=context)
    vector = torch.where(where[:, None], cast(Tensor, blank.vector).to(found.vector), found.vector)
    return replace(found, context=context, vector=vector)


def sized(
    model: StableDiffusion, cond: Conditioning, dataset: Dataset, places: Sequence[Position]
) -> Conditioning:
    """The conditions with how each picture was cut, which SDXL is told (Podell et al. 2023, section 2.2)."""
    if model.config.text2 is None or cond.vector is None or not isinstance(dataset, Placed):
        return cond
    views = [dataset.view(place) for place in places]
    rows = [encode.Sizes(view.size, view.original, view.crop).vector() for view in views]
    pooled = cond.vector[:, : -encode.SIZES_WIDTH]
    return replace(cond, vector=torch.cat([pooled, torch.cat(rows).to(pooled)], dim=1))


def check_conditions(model: StableDiffusion, prompts: Sequence[str]) -> None:
    """`InputError` for a model whose conditions captions cannot make."""
    config = model.config
    if config.classes is not None or (config.unet is not None and isinstance(config.unet.num_classes, int)):
        raise InputError(f"{model.name!r} draws numbered classes, not captions", "Give a model with text.")
    model.check_pictures(Conditioning())
    if any(prompts) and config.text is None and config.bert is None:
        raise InputError(f"{model.name!r} has no text encoder", "Leave the prompts out.")
