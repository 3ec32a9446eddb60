"""Training CLIP's two towers on pictures and their own captions (Radford et al. 2021, section 2.3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from sfumato.checkpoints.clip import CLIPDescription, normalized, resized, save_clip
from sfumato.errors import DataError, InputError
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.nn.clip_vision import CLIPVisionConfig, CLIPVisionEncoder
from sfumato.runtime import training_attention
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.config import TrainingConfig
from sfumato.training.data import (
    WHOLE,
    CaptionRules,
    Dataset,
    Position,
    Share,
    batches,
    caption_rules,
    fixed_caption,
    groups,
    to_tensor,
    varied,
)
from sfumato.training.loop import Loss
from sfumato.training.masks import refuse_masks
from sfumato.training.settings_clip import CLIPTaskConfig
from sfumato.training.sheets import save_sheet

REMEMBERED = 1 << 16  # captions whose tokens are kept
CANDIDATES = 64  # among so many the right picture, or caption, has to be found
EVALUATED = 8  # such groups of held-out pairs that a score is the mean of
ROWS, COLUMNS = 8, 8  # captions, and pictures found for each, on a sheet
MOST_SCALE = 100.0  # of the cosines, as in the paper, section 2.5

Batch = tuple[list[Position], Tensor]


class Temperature(nn.Module):
    """What cosines are multiplied by, learned as its logarithm."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self) -> Tensor:
        """The scale, (); a logarithm that a step took beyond ln 100 is put back there first."""
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(MOST_SCALE))
        return self.log_scale.exp()


class CLIPTask:
    """An image and a text transformer whose vectors agree for a picture and its caption, and for no other.

    Pictures without a caption are left out. Raises `InputError` for a recipe whose parts do not fit together,
    `DataError` for pictures without captions.
    """

    def __init__(
        self, config: TrainingConfig, dataset: Dataset, held_out: Dataset, device: torch.device
    ) -> None:
        self.config, self.options, self.device = config, config.clip or CLIPTaskConfig(), device
        self.dataset, self.held_out = dataset, held_out
        self.order = [index for index in dataset.order if any(dataset.captions(index))]
        if not self.order:
            raise DataError(
                f"no picture in {config.data.path} has a caption", "Put a .txt beside each picture."
            )
        if config.loop.gradient_checkpointing:
            raise InputError("a clip run has no gradient_checkpointing", "Leave it out.")
        text, vision = _checked(config, self.options)
        self.rules = _rules(config)
        # In sorted order, so that each caption has a number that all processes know, whatever is made of it.
        self.captions = sorted(
            {text for index in range(len(dataset)) for text in dataset.captions(index) if text}
        )
        self.tokenizer = _tokenizer(self.options, self.captions, text.max_position_embeddings)
        self.length = text.max_position_embeddings
        self.tokens = lru_cache(REMEMBERED)(self._tokens)
        self.numbers = {caption: number for number, caption in enumerate(self.captions)}
        self.text = CLIPTextEncoder(_fitted(text, self.tokenizer))
        self.vision = CLIPVisionEncoder(vision)
        initialize(self.vision)
        self.temperature = Temperature(1 / self.options.temperature)
        self.modules: dict[str, nn.Module] = {
            "text": self.text, "vision": self.vision, "temperature": self.temperature,
        }  # fmt: skip
        for module in self.modules.values():
            module.to(device)
        self.see = torch.compile(self.vision) if config.loop.compile else self.vision
        self.read = torch.compile(self.text) if config.loop.compile else self.text
        self.digest = dataset.digest

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"clip": [p for module in self.modules.values() for p in module.parameters()]}

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Batch, None, None]:
        order = groups(self.dataset, self.config.seed, seen, size, share, self.order)
        return batches(self.dataset, order, self.config.data.workers)

    def losses(self, batch: Batch, seen: int) -> Iterator[Loss]:
        order, pictures = batch
        pictures = torch.stack(
            [self._augmented(picture, place) for place, picture in zip(order, pictures, strict=True)]
        )
        numbers, said = zip(*(self._caption(place) for place in order), strict=True)
        chosen = torch.tensor(numbers)
        with training_attention(self.device):
            # Every process compares the pairs of all, so the mean of their gradients is that of one process.
            images = gathered(self._image_vectors(pictures))
            texts = gathered(self._text_vectors(said))
            indices = gathered(torch.tensor([place.index for place in order], device=self.device))
            chosen = gathered(chosen.to(self.device))
            right = self._right(indices.tolist(), chosen.tolist())
            scale = self.temperature()
            loss, accuracy = contrast(images, texts, scale, right)
            yield "clip", loss, {"loss": loss, "accuracy": accuracy, "scale": scale}

    def evaluate(self) -> dict[str, float]:
        """How often the right one of up to 64 held-out captions, or pictures, comes first; and the loss.

        The captions of a group differ, and each picture's own is its first.
        """
        totals: dict[str, list[float]] = {}
        for group in self._held_out_groups():
            images, texts = self._held_out_vectors(group)
            cosines = images @ texts.T
            truth = torch.arange(len(group), device=cosines.device)
            loss, _ = contrast(images, texts, self.temperature(), torch.eye(len(group), dtype=torch.bool))
            scores = {
                "held_out_loss": loss,
                "held_out_caption_found": (cosines.argmax(dim=1) == truth).float().mean(),
                "held_out_picture_found": (cosines.argmax(dim=0) == truth).float().mean(),
                "held_out_candidates": len(group),
            }
            for name, value in scores.items():
                totals.setdefault(name, []).append(float(value))
        return {name: sum(values) / len(values) for name, values in totals.items()}

    def preview(self, path: Path) -> None:
        """A row for each of eight held-out captions: its own picture, then those that it finds first."""
        group = self._held_out_groups()[0]
        images, texts = self._held_out_vectors(group)
        pictures = [to_tensor(self.held_out.picture(index)) for index in group]
        blank = torch.ones_like(pictures[0])
        sheet: list[Tensor] = []
        for number, found in enumerate((texts @ images.T).argsort(dim=1, descending=True)[:ROWS].tolist()):
            row = [pictures[number], *(pictures[index] for index in found[: COLUMNS - 1])]
            sheet += row + [blank] * (COLUMNS - len(row))
        save_sheet(path, torch.stack(sheet), COLUMNS)

    def finish(self, path: Path) -> None:
        description = CLIPDescription(
            name=self.config.name,
            text=self.text.config,
            vision=self.vision.config,
            tokenizer=self.tokenizer.to_json(),
            notices=self.config.notices,
        )
        scale = float(self.temperature())
        save_clip(path, description, self.text.state_dict(), self.vision.state_dict(), scale)

    def _augmented(self, picture: Tensor, place: Position) -> Tensor:
        """A square part of the picture (c, h, w) at its old size, mirrored or not, by the place's chance."""
        generator = place.generator("augment")
        share, top, left, mirrored = torch.rand(4, generator=generator).tolist()
        whole = picture.shape[-1]
        side = round(whole * (self.options.crop + (1 - self.options.crop) * share))
        y, x = (round(at * (whole - side)) for at in (top, left))
        cut = resized(picture[None, :, y : y + side, x : x + side], whole)[0]
        return cut.flip(-1) if self.options.flip and mirrored < 0.5 else cut

    def _caption(self, place: Position) -> tuple[int, str]:
        """The number of one of the picture's captions, and what is made of it there."""
        choices = [text for text in self.dataset.captions(place.index) if text]
        taken, said = varied(choices, place, self.rules)
        return self.numbers[taken], said

    def _tokens(self, caption: str) -> Tensor:
        return self.tokenizer.batch([caption], self.length)[0][0]

    def _right(self, indices: Sequence[int], chosen: Sequence[int]) -> Tensor:
        """(b, b) bool: whether caption j of the batch is one of picture i's own."""
        own = [{self.numbers[text] for text in self.dataset.captions(index) if text} for index in indices]
        return torch.tensor([[number in numbers for number in chosen] for numbers in own])

    def _image_vectors(self, pictures: Tensor) -> Tensor:
        return F.normalize(self.see(normalized(pictures.to(self.device))).embeds.float(), dim=1)

    def _text_vectors(self, captions: Sequence[str]) -> Tensor:
        tokens = torch.stack([self.tokens(caption) for caption in captions])
        return F.normalize(self.read(tokens.to(self.device)).pooled.float(), dim=1)

    def _held_out_groups(self) -> list[list[int]]:
        """Indices of held-out pictures, in groups of 64 whose first captions all differ."""
        first = {}
        for index in range(len(self.held_out)):
            caption = (self.held_out.captions(index) or [""])[0]
            first.setdefault(caption, index)
        first.pop("", None)
        indices = list(first.values())
        count = max(1, min(EVALUATED, len(indices) // CANDIDATES))
        return [indices[start::count][:CANDIDATES] for start in range(count)]

    def _held_out_vectors(self, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        pictures = torch.stack([to_tensor(self.held_out.picture(index)) for index in group])
        captions = [fixed_caption(self.held_out.captions(index), self.rules) for index in group]
        return self._image_vectors(pictures), self._text_vectors(captions)


def contrast(images: Tensor, texts: Tensor, scale: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, accuracy) of unit vectors (b, d) of pictures and captions; accuracy is over both directions.

    right: (b, b) bool, whether caption j belongs to picture i. Where several do, as equal captions in a
    batch, the target is spread over them evenly.
    """
    logits = scale * images @ texts.T
    wanted = right.to(logits)
    losses, found = [], []
    for table, target in ((logits, wanted), (logits.T, wanted.T)):
        shares = target / target.sum(dim=1, keepdim=True)
        losses.append(F.cross_entropy(table, shares))
        found.append(target.gather(1, table.argmax(dim=1, keepdim=True)).mean())
    return (losses[0] + losses[1]) / 2, (found[0] + found[1]) / 2


def gathered(values: Tensor) -> Tensor:
    """The rows of all processes, with gradients where they have them; the rows themselves for one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    if not values.requires_grad:
        parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, values)
        return torch.cat(parts)
    return torch.cat(all_gather(values))


def initialize(encoder: CLIPVisionEncoder) -> None:
    """Draw the start weights of an image tower by the rule of the text tower (`nn.clip.initialize`)."""
    config = encoder.config
    width = config.hidden_size**-0.5
    residual = width * (2 * config.num_hidden_layers) ** -0.5
    deviations = {"fc1": width * 2**-0.5, "fc2": residual, "out_proj": residual}
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviations.get(name.rpartition(".")[2], width))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _tokenizer(options: CLIPTaskConfig, captions: list[str], length: int) -> Tokenizer:
    if options.vocabulary == "clip":
        return Tokenizer.clip()
    return Tokenizer.train(captions, options.vocabulary, length)


def _rules(config: TrainingConfig) -> CaptionRules:
    """How captions are varied; `InputError` where none of them would be left."""
    rules = caption_rules(config.data.captions)
    if rules.templates and rules.word:
        raise InputError(
            f"data.captions.word is {rules.word!r}, which would be the caption of every picture alike",
            "Leave it out; templates are filled with the captions.",
        )
    return rules


def _fitted(text: CLIPTextConfig, tokenizer: Tokenizer) -> CLIPTextConfig:
    """The text tower's options for the tokens of its tokenizer."""
    return dataclasses.replace(
        text,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
    )


def _checked(config: TrainingConfig, options: CLIPTaskConfig) -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    """The towers of a recipe."""
    if config.text is None:
        raise InputError("a clip run needs a [text] table", "See configs/illustrations-clip.toml for one.")
    refuse_masks(config.data)
    if config.data.buckets is not None:
        raise InputError(
            "data.buckets is given; the image tower takes squares of data.size alone",
            "Leave out data.buckets.",
        )
    height, width = config.data.shape
    patch = options.vision.patch_size
    if height != width or width % patch:
        nearest = max(1, round(max(height, width) / patch)) * patch
        raise InputError(
            f"data.size is {height}x{width}; the image tower takes squares of whole patches of {patch}",
            f"Set data.size = {nearest}.",
        )
    text = dataclasses.replace(config.text, projection_dim=options.embed_dim)
    table = options.vision.model_dump()
    return text, CLIPVisionConfig(**table, image_size=width, projection_dim=options.embed_dim)
