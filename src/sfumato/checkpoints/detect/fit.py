"""A table of names against what a file holds: every tensor there, in its shape, or an error that names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sfumato.checkpoints.layouts.pair import Shape, reshaped
from sfumato.checkpoints.layouts.tables import Pair, generate
from sfumato.checkpoints.source import TensorInfo
from sfumato.errors import CheckpointError

NAMED = 10  # tensors that an error names
SPARE = 1000  # pairs beyond the file's tensors after which a description is not believed


@dataclass(frozen=True)
class PartPlan:
    """One network of a file: its configuration, and which of the file's tensors are its, by full names."""

    config: Any
    mapping: tuple[Pair, ...]

    @property
    def names(self) -> list[str]:
        """The file's tensors that it is made of, each once."""
        return list(dict.fromkeys(name for pair in self.mapping for name in pair.foreign))


def fit_part(
    part: str,
    config: Any,
    layout: str,
    infos: Mapping[str, TensorInfo],
    *,
    prefix: str = "",
    place: str = "the file",
) -> PartPlan:
    """Find every tensor of a part of known configuration among `infos`, where its names begin with `prefix`.

    Older spellings of the layout's names are tried, and 1-wide convolutions stored as matrices are taken.
    Raises `CheckpointError` naming the first ten tensors that are missing or of another shape.
    """
    best: list[str] | None = None
    missing = 0
    for variant in _variants(part, layout):
        found: list[Pair] = []
        wrong: list[str] = []
        absent = 0
        for pair in _bounded(part, config, layout, variant, 2 * len(infos) + SPARE, place):
            full = tuple(prefix + name for name in pair.foreign)
            shapes = pair.foreign_shapes()
            for name, shape in zip(full, shapes, strict=True):
                info = infos.get(name)
                if info is not None and info.shape == shape and info.dtype.is_floating_point:
                    continue
                known = info is not None and info.dtype.is_floating_point and len(full) == 1
                if info is not None and known and _squeezed(info.shape) == _squeezed(pair.shape):
                    pair = replace(pair, transform=reshaped(pair.shape, info.shape))
                    continue
                absent += info is None
                wrong.append(_misfit(name, info, shape))
            found.append(Pair(pair.native, full, pair.transform, pair.shape))
        if not wrong:
            return PartPlan(config, tuple(found))
        wrong = list(dict.fromkeys(wrong))
        if best is None or len(wrong) < len(best):
            best, missing = wrong, absent
    assert best is not None
    raise CheckpointError(
        f"{place} does not hold a whole {part}; what is missing or of another shape ({len(best)} in all): "
        f"{'; '.join(best[:NAMED])}",
        "The file is incomplete: get it again, or one with all of the model in it."
        if missing
        else "The file is damaged, or of an architecture that is not built here.",
    )


def _variants(part: str, layout: str) -> tuple[str, ...]:
    if part in ("text", "text2"):
        return ("", "bare")
    return ("", "old") if layout == "diffusers" and part in ("unet", "autoencoder") else ("",)


def _bounded(part: str, config: Any, layout: str, variant: str, limit: int, place: str) -> Iterator[Pair]:
    """The table, as long as it is no longer than a file of this many tensors can fill."""
    try:
        for count, pair in enumerate(generate(part, config, layout, variant)):
            if count > limit:
                raise CheckpointError(
                    f"{place} describes more layers of its {part} than it holds", "Get it again."
                )
            yield pair
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # whatever such options lead to
        raise CheckpointError(
            f"{place} has a {part} that cannot be built: {error}", "Get it again."
        ) from error


def _squeezed(shape: Shape) -> Shape:
    """A shape without the 1-wide sides after its first two."""
    return shape[:2] if all(length == 1 for length in shape[2:]) else shape


def _misfit(name: str, info: TensorInfo | None, shape: Shape) -> str:
    if info is None:
        return f"{name}: missing"
    if info.shape != shape:
        return f"{name}: shape {info.shape} for {shape}"
    return f"{name}: {info.dtype} is not floating-point"
