"""LoRA on a model: applied for a while and taken off bit-exactly, or merged into what is written."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.checkpoints.addons.embedding import Embedding, read_embedding
from sfumato.checkpoints.addons.fit import Change, Fit, checked, fit
from sfumato.checkpoints.addons.index import AddonIndex
from sfumato.checkpoints.addons.read import Lora, as_float, read_lora
from sfumato.checkpoints.layouts.tables import Pair, to_foreign
from sfumato.checkpoints.load import is_finite
from sfumato.checkpoints.opened import Opened, Part
from sfumato.errors import InputError, NumericalError
from sfumato.nn.lora import decomposed, magnitude_of
from sfumato.presets import ModelConfig

__all__ = [
    "AddonIndex", "Embedding", "Fit", "Lora", "Weighted", "apply_addons", "fit", "merged", "read_embedding",
    "read_lora", "read_weighted",
]  # fmt: skip

NUMBER = re.compile(r"[+-]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})")


class Weighted(NamedTuple):
    """A LoRA and how much of it the U-Net and the text encoders get."""

    lora: Lora
    unet: float = 1.0
    text: float = 1.0


@contextmanager
def apply_addons(
    config: ModelConfig, parts: Mapping[str, nn.Module], loras: Sequence[Weighted]
) -> Iterator[None]:
    """Add LoRA to a model's weights; on leaving, by an error too, they are what they were, bit by bit.

    config: the model's; parts: its networks by name, asked for only where something changes them. Changes are
    summed in float32, each relative to the weights that are there, so that their order does not matter. A
    weight of 0 leaves a part alone. It nests. Weights that lie in a mapped file are replaced, not written to.

    Raises `CheckpointError` for a LoRA made for another model, `InputError` for a weight that is no number,
    `NumericalError` for sums too large for the weights' number format; then nothing was changed.
    """
    changed: list[tuple[nn.Parameter, Tensor]] = []
    with torch.no_grad():
        for part, by_name in plan(config, loras).items():
            own = dict(parts[part].named_parameters())
            for native, changes in by_name.items():
                value = new_value(native, changes, lambda name, own=own: own[name].data)
                changed.append((own[native], value))
    saved = [(parameter, parameter.data) for parameter, _ in changed]
    try:
        for parameter, value in changed:
            parameter.data = value
        del changed
        yield
    finally:
        for parameter, original in saved:
            # The model may have been moved meanwhile; where it was not, this is the very same tensor.
            parameter.data = original.to(parameter.device, parameter.dtype)


def merged(opened: Opened, loras: Sequence[Weighted]) -> Opened:
    """A model with LoRA in its weights for good, to be written: made when they are read, its file untouched.

    Errors as `apply_addons`, `NumericalError` when a tensor is read.
    """
    parts = dict(opened.parts)
    for part, by_name in plan(opened.config, loras).items():
        parts[part] = _merged_part(parts[part], by_name)
    return dataclasses.replace(opened, parts=parts)


def read_weighted(text: str, folder: Path | None = None) -> Weighted:
    """A LoRA as a command line gives it: FILE, FILE:0.8, or FILE:0.8:0.5 for U-Net and text encoders.

    folder: where a name is looked for that is no file. Raises `InputError` for a name that is not there,
    otherwise as `read_lora`.
    """
    numbers: list[float] = []
    place = text
    while len(numbers) < 2 and not Path(place).is_file():
        front, _, number = place.rpartition(":")
        if not NUMBER.fullmatch(number):
            break
        place = front
        numbers.insert(0, float(number))
    path = Path(place)
    if not path.is_file():
        if folder is None:
            raise InputError(f"there is no file {place!r}", "Give a LoRA's file, or --lora-dir for names.")
        path = AddonIndex([folder]).find(place)
    return Weighted(read_lora(path), *(numbers * 2)[: 2 if numbers else 0])


def plan(config: ModelConfig, loras: Sequence[Weighted]) -> dict[str, dict[str, list[Change]]]:
    """part -> our tensor -> the changes to it, in an order that does not depend on that of the LoRA."""
    found: dict[str, dict[str, list[Change]]] = {}
    for lora, unet, text in sorted(loras, key=lambda each: (str(each.lora.path), each.unet, each.text)):
        if not (math.isfinite(unet) and math.isfinite(text)):
            raise InputError(f"the weights of {lora.name!r} are {unet} and {text}", "Give two numbers.")
        for change in checked(lora, config).changes:
            strength = unet if change.target.part == "unet" else text
            for pair in change.target.pairs if strength else ():
                own = dataclasses.replace(change, strength=strength)
                found.setdefault(change.target.part, {}).setdefault(pair.native, []).append(own)
    return found


def new_value(native: str, changes: Sequence[Change], base: Callable[[str], Tensor]) -> Tensor:
    """One of our tensors with its changes, in its own number format and memory layout.

    base: our tensors by name, of which those that the changes' layers are made of are asked for.
    """
    weight = base(native)
    total: Tensor | None = None
    for change in changes:
        given = _native(change, native, _delta(change, base))
        total = given if total is None else total.add_(given)
    assert total is not None
    value = total.add_(weight).to(weight.dtype)
    if not is_finite(value):
        raise NumericalError(
            f"{native} becomes too large for {weight.dtype} with the LoRA",
            "Give it less weight, or use float32.",
        )
    return value if value.stride() == weight.stride() else torch.empty_like(weight).copy_(value)


def _delta(change: Change, base: Callable[[str], Tensor]) -> Tensor:
    """The change of the target, in its shape and float32."""
    adapter, target = change.adapter, change.target
    device = base(target.pairs[0].native).device
    if change.is_bias:
        assert adapter.bias is not None
        return (as_float(adapter.bias, device) * change.strength).reshape(target.shape)
    assert adapter.kind is not None
    tensors = {slot: as_float(tensor, device) for slot, tensor in adapter.tensors.items()}
    if adapter.magnitude is None:
        return adapter.kind.change(tensors, adapter.scale * change.strength).reshape(target.shape)
    weight = to_foreign(target.pairs, {pair.native: base(pair.native) for pair in target.pairs})[target.name]
    weight = as_float(weight, device)
    magnitude = magnitude_of(as_float(adapter.magnitude, device), target.shape, of_outputs=adapter.of_outputs)
    whole = decomposed(weight, adapter.kind.change(tensors, adapter.scale).reshape(target.shape), magnitude)
    return (whole - weight).mul_(change.strength)


def _native(change: Change, native: str, delta: Tensor) -> Tensor:
    """The change of one of our tensors that a change of the target means: the rest of it stays."""
    pair = next(pair for pair in change.target.pairs if pair.native == native)
    shapes = zip(pair.foreign, pair.foreign_shapes(), strict=True)
    given = [delta if name == change.target.name else delta.new_zeros(shape) for name, shape in shapes]
    return pair.transform.to_native(given)


def _merged_part(part: Part, by_name: Mapping[str, Sequence[Change]]) -> Part:
    makers: dict[str, list[Pair]] = {}
    for pair in part.mapping:
        for name in pair.foreign:
            makers.setdefault(name, []).append(pair)
    own = {pair.native: pair for pair in part.mapping}
    touched = {name for name, table in makers.items() if any(pair.native in by_name for pair in table)}

    def base(native: str) -> Tensor:
        pair = own[native]
        return pair.transform.to_native([part.source.tensor(name) for name in pair.foreign])

    def value(native: str) -> Tensor:
        return new_value(native, by_name[native], base) if native in by_name else base(native)

    def read(name: str) -> Tensor:
        if name not in touched:
            return part.source.tensor(name)
        table = makers[name]
        return to_foreign(table, {pair.native: value(pair.native) for pair in table})[name]

    return dataclasses.replace(part, source=dataclasses.replace(part.source, read=read))
