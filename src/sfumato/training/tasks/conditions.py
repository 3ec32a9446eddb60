"""What a denoiser is told while it is trained: captions or classes, of which some are left out for guidance.

Leaving them out is what classifier-free guidance needs (Ho and Salimans 2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sfumato.checkpoints.clip import TextTower
from sfumato.checkpoints.load import copy_into
from sfumato.conditioning import Conditioning
from sfumato.errors import DataError, InputError
from sfumato.nn.classes import ClassEmbedder, ClassEmbedderConfig
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.config import TrainingConfig
from sfumato.training.data import Dataset, Position, caption, caption_rules, every_caption, fixed_caption
from sfumato.training.texts import TextCache

REMEMBERED = 1 << 16  # captions whose tokens are kept


class Condition(Protocol):
    """One kind of condition: its networks, and what it makes of samples.

    pictures: the samples' own (b, c, h, w) in -1..1, for conditions that are made of them.
    """

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Networks by the names of a model's parts; those with `trained` are trained along."""
        ...

    @property
    def trained(self) -> bool: ...

    def training(self, places: Sequence[Position], pictures: Tensor | None) -> Conditioning:
        """The conditions of training samples, on the networks' device; chance is in the places."""
        ...

    def held_out(self, indices: Sequence[int], pictures: Tensor | None) -> Conditioning:
        """The conditions of held-out samples, with nothing left out, always the same."""
        ...


class Captions:
    """Captions as a context of tokens, by a text transformer that is trained along or stays as it is.

    start: the one whose tokenizer and weights it has, where there is one. Raises `InputError` for a recipe
    that does not say which text transformer.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: tuple[Dataset, Dataset],
        start: TextTower | None,
        device: torch.device,
    ) -> None:
        self.options, self.data, self.device = config.diffusion, data, device
        self.rules = caption_rules(config.data.captions)
        self.trained = config.diffusion.text_trainable
        if self.trained and self.options.text_cache:
            raise InputError(
                "diffusion.text_cache keeps what a text encoder makes of captions, and this one is trained",
                "Set diffusion.text_trainable = false, or leave out text_cache.",
            )
        if not self.trained and start is None:
            raise InputError(
                "diffusion.text_trainable is false, and the text encoder would be untrained",
                "Give the model to take it from as diffusion.text_from or diffusion.start_from.",
            )
        given = config.text or (start and start.config)
        assert given is not None, "no [text] table, and no model to take it from"
        self.tokenizer = self._tokenizer(start, given)
        self.layer, self.normed = (start.layer, start.normed) if start else (1, True)
        ends = {"eos_token_id": self.tokenizer.end_id, "pad_token_id": self.tokenizer.pad_id}
        self.network = CLIPTextEncoder(
            dataclasses.replace(given, vocab_size=self.tokenizer.vocab_size, **ends)
            if start is None
            else dataclasses.replace(given, vocab_size=start.config.vocab_size, **ends)
        )
        if start is not None:
            copy_into(self.network, start.encoder.state_dict(), f"{start.name} does not fit [text]")
        self.frozen = ""  # which network it is, where no state of the run holds it
        if not self.trained and start is not None:
            self.frozen = start.identity
            self.network.requires_grad_(False).eval()
        self.network.to(device)
        self.tokens: Callable[[str], Tensor] = lru_cache(REMEMBERED)(self._tokens)
        self.cache: TextCache | None = None
        if self.options.text_cache:
            self.cache = self._cached(config, self.frozen)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"text": self.network}

    def training(self, places: Sequence[Position], pictures: Tensor | None) -> Conditioning:
        return self.encoded([self.caption(place) for place in places])

    def held_out(self, indices: Sequence[int], pictures: Tensor | None) -> Conditioning:
        return self.encoded([fixed_caption(self.data[1].captions(index), self.rules) for index in indices])

    def caption(self, place: Position) -> str:
        """What the picture is called there, or the empty caption."""
        dropped = float(torch.rand((), generator=place.generator("caption dropout")))
        if dropped < self.options.caption_dropout:
            return ""
        return caption(self.data[0], place, self.rules)

    def encoded(self, captions: Sequence[str]) -> Conditioning:
        """The layer's states of every caption, cut where the encoder reads no further."""
        if self.cache is not None:
            return self.cache(captions).to(self.device, torch.float32)
        tokens = torch.stack([self.tokens(caption) for caption in captions]).to(self.device)
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            output = self.network(tokens)
            return Conditioning(context=self.network.hidden_state(output, -self.layer, self.normed))

    def _cached(self, config: TrainingConfig, digest: str) -> TextCache:
        """What is made of all captions, in files of the run's folder."""
        every = range(len(self.data[1]))
        held_out = [fixed_caption(self.data[1].captions(index), self.rules) for index in every]
        captions = [*every_caption(self.data[0], self.rules), *held_out]
        return TextCache(captions, self.encoded, config.out / "texts.safetensors", digest)

    def _tokens(self, caption: str) -> Tensor:
        return self.tokenizer.batch([caption], self.network.config.max_position_embeddings)[0][0]

    def _tokenizer(self, start: TextTower | None, text: CLIPTextConfig) -> Tokenizer:
        """That of the model to start from, CLIP's, or one learned from the captions."""
        vocabulary, dataset = self.options.vocabulary, self.data[0]
        if start is not None:
            return Tokenizer.clip() if start.tokenizer is None else Tokenizer.from_json(start.tokenizer)
        if vocabulary == "clip":
            return Tokenizer.clip()
        captions = sorted({text for index in range(len(dataset)) for text in dataset.captions(index)})
        return Tokenizer.train(captions, vocabulary, text.max_position_embeddings)


@runtime_checkable
class Labelled(Dataset, Protocol):
    """A data set whose pictures are of numbered classes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""
        ...

    def label(self, index: int) -> int | None:
        """The number of the picture's class, None for a picture of none."""
        ...


class Labels:
    """Classes as a context of one token, from a table that is trained along, or as the U-Net's own labels.

    The last of `count` is "no class": of what has none, and of the share that is left out. Raises `DataError`
    for pictures without classes.
    """

    trained = True

    def __init__(self, config: TrainingConfig, data: tuple[Dataset, Dataset], device: torch.device) -> None:
        self.options, self.device = config.diffusion, device
        self.dataset, self.held = (_labelled(each, config) for each in data)
        self.names = self.dataset.classes
        self.count = len(self.names) + 1
        context_dim = config.unet and config.unet.context_dim
        self.network: ClassEmbedder | None = None
        if config.diffusion.classes == "context":
            if not context_dim:
                raise InputError(
                    'diffusion.classes is "context", and unet.context_dim is not given',
                    "Set it, to 128 for instance: the width of a class's vector.",
                )
            self.network = ClassEmbedder(ClassEmbedderConfig(self.count, context_dim)).to(device)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {} if self.network is None else {"classes": self.network}

    def training(self, places: Sequence[Position], pictures: Tensor | None) -> Conditioning:
        return self.encoded([self.chosen(place) for place in places])

    def held_out(self, indices: Sequence[int], pictures: Tensor | None) -> Conditioning:
        return self.encoded([self.held.label(index) for index in indices])

    def chosen(self, place: Position) -> int | None:
        """The class of the picture, or none."""
        dropped = float(torch.rand((), generator=place.generator("label"))) < self.options.label_dropout
        return None if dropped else self.dataset.label(place.index)

    def encoded(self, labels: Sequence[int | None]) -> Conditioning:
        """Their rows of the table, or the labels as they are."""
        none = self.count - 1
        numbers = torch.tensor([none if label is None else label for label in labels], device=self.device)
        if self.network is None:
            return Conditioning(vector=numbers)
        return Conditioning(context=self.network(numbers))


def _labelled(dataset: Dataset, config: TrainingConfig) -> Labelled:
    if not isinstance(dataset, Labelled) or not dataset.classes:
        raise DataError(
            f"diffusion.classes is {config.diffusion.classes!r}, and {config.data.path} has no classes",
            "Put the pictures of each class into a sub-folder of its name.",
        )
    return dataset


def joined(conditions: Sequence[Conditioning]) -> Conditioning:
    """The conditions of several kinds in one; no two of them are of the same kind."""
    kinds = ("context", "vector", "concat")
    found = {kind: [t for each in conditions if (t := getattr(each, kind)) is not None] for kind in kinds}
    assert all(len(tensors) <= 1 for tensors in found.values()), "two conditions of one kind"
    context, vector, concat = (next(iter(found[kind]), None) for kind in kinds)
    return Conditioning(context, vector, concat)
