"""LoRA and textual inversions that a request names, and the prompts' tags with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from sfumato.checkpoints.addons.apply import (
    AddonIndex,
    Weighted,
    apply_addons,
    read_embedding,
    read_lora,
    read_weighted,
)
from sfumato.errors import InputError
from sfumato.generation.conditions import Vectors
from sfumato.generation.written import Written
from sfumato.model import StableDiffusion
from sfumato.presets import PARTS
from sfumato.request import Request


def loras(request: Request, prompts: Sequence[Written]) -> list[Weighted]:
    """The LoRA of the request and of its prompts' tags; errors as `read_lora`, `InputError` for a name."""
    folder = None if request.lora_dir is None else Path(request.lora_dir)
    found = [read_weighted(text, folder) for text in request.lora]
    tags = {one.loras for one in prompts}
    if len(tags) > 1:
        raise InputError("the prompts drawn for these pictures have other LoRA", "Draw them one at a time.")
    names = tags.pop()
    if names and folder is None:
        raise InputError(
            f"the prompt asks for the LoRA {names[0][0]!r}", "Give the folder it is in: lora_dir."
        )
    index = AddonIndex([folder] if names and folder is not None else [])
    return found + [Weighted(read_lora(index.find(name)), unet, text) for name, unet, text in names]


def embeddings(
    model: StableDiffusion, request: Request, prompts: Sequence[Written]
) -> tuple[Vectors, list[Path]]:
    """The textual inversions that the prompts name, and their files; errors as `read_embedding`."""
    if request.embedding_dir is None or request.emphasis == "plain":
        return {}, []
    index = AddonIndex([Path(request.embedding_dir)])
    texts = "\n".join(f"{one.prompt or ''}\n{one.negative_prompt}" for one in prompts).casefold()
    paths = {name: index.find(name) for name in index.names if name.casefold() in texts}
    vectors = {name: read_embedding(path, model.config).vectors for name, path in paths.items()}
    return vectors, list(paths.values())


@contextmanager
def applied(model: StableDiffusion, found: Sequence[Weighted]) -> Iterator[None]:
    """While it lasts the model's weights are changed by LoRA; then they are what they were, bit by bit.

    Errors as `apply_addons`.
    """
    with apply_addons(model.config, _Parts(model), found):
        yield


class _Parts(Mapping[str, nn.Module]):
    """A model's networks by name, loaded when they are asked for."""

    def __init__(self, model: StableDiffusion) -> None:
        self._model = model

    def __getitem__(self, name: str) -> nn.Module:
        if (part := self._model.part(name)) is None:
            raise KeyError(name)
        return part

    def __iter__(self) -> Iterator[str]:
        return (name for name in PARTS if getattr(self._model.config, name) is not None)

    def __len__(self) -> int:
        return len(list(iter(self)))
