"""The sheets of a diffusion run: what its model draws by default, with the same seeds each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sfumato import images
from sfumato.generation import draw, generate
from sfumato.model import StableDiffusion
from sfumato.request import Request
from sfumato.training.config import TrainingConfig
from sfumato.training.data import Dataset, Position, caption_rules, fixed_caption, to_tensor
from sfumato.training.sheets import save_sheet
from sfumato.training.tasks.conditions import Condition, Labelled
from sfumato.training.tasks.diffusion_parts import alike
from sfumato.training.tasks.shown import Inpainting, SmallPicture, StretchedPicture

SHOWN = 32  # pictures on a sheet where the recipe has no prompts
COLUMNS = 8
EACH = 4  # pictures of a class


def sheet(
    path: Path,
    model: StableDiffusion,
    config: TrainingConfig,
    held_out: Dataset,
    shown: Sequence[Condition],
    classes: tuple[str, ...] | None,
) -> Tensor:
    """A row of prompts or held-out captions; of each class; or held-out pictures in three rows.

    The three: what the network is shown, what it draws, and the picture itself. Returns what was drawn.
    """
    if shown:
        rows = [_three(model, config, held_out, shown[0], index) for index in _spread(held_out, COLUMNS)]
        seen, made, pictures = (torch.stack(row) for row in zip(*rows, strict=True))
        save_sheet(path, torch.cat([seen, made, pictures]), columns=len(rows))
        return made
    if classes is not None:
        labels = range(len(classes))[: SHOWN // EACH]
        rounds = [generate(model, Request(label=label, num_images=EACH, seed=0)).samples for label in labels]
        drawn = torch.cat(rounds)
    else:
        told = [_prompt(model, config, held_out, index) for index in _spread(held_out, SHOWN)]
        prompts = list(config.diffusion.prompts) or [prompt or "" for prompt in told]
        drawn = draw(model, prompts, seeds=range(len(prompts)))
    save_sheet(path, drawn, columns=COLUMNS)
    return drawn


def _prompt(model: StableDiffusion, config: TrainingConfig, held_out: Dataset, index: int) -> str | None:
    """A held-out caption as the recipe has captions; None for a model without text."""
    if model.config.text is None:
        return None
    return fixed_caption(held_out.captions(index), caption_rules(config.data.captions))


def _spread(dataset: Dataset, count: int) -> list[int]:
    """That many indices, spread over the data set; fewer where pictures are of several sizes."""
    indices = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    return next(alike(dataset, indices, count))


def _three(
    model: StableDiffusion, config: TrainingConfig, held_out: Dataset, shown: Condition, index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What is shown of a held-out picture, what is drawn from it, and the picture: (c, h, w) each."""
    given, mask = held_out.picture(index), None
    picture = to_tensor(given)
    seen = picture
    if isinstance(shown, Inpainting):
        place = Position(config.seed, -1, index, index)
        chosen = shown.masks([place], picture[None])[0]
        mask = Image.fromarray((chosen[0] * 255).byte().numpy())
        seen = picture * (1 - chosen)
    elif isinstance(shown, SmallPicture | StretchedPicture):
        given = images.preview(shown.small(picture[None])[0])
        seen = to_tensor(given.resize((picture.shape[2], picture.shape[1]), Image.Resampling.NEAREST))
    prompt = _prompt(model, config, held_out, index)
    label = (
        held_out.label(index)
        if config.diffusion.classes != "none" and isinstance(held_out, Labelled)
        else None
    )
    height, width = picture.shape[1:]
    request = Request(
        prompt=prompt, label=label, init=given, mask=mask, seed=index, width=width, height=height
    )
    return seen, generate(model, request).samples[0].cpu(), picture
