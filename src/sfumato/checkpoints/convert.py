"""From any model that opens to another layout, tensor by tensor: what both hold stays bit-equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.layouts.naming import WEIGHT_SUFFIXES
from sfumato.checkpoints.layouts.tables import LAYOUTS, Pair, pairs, prefix
from sfumato.checkpoints.load import check_parts, is_finite
from sfumato.checkpoints.metadata import describe
from sfumato.checkpoints.opened import Opened, Part
from sfumato.checkpoints.rules import NOT_AVERAGED, UNUSED_LAYER, UNUSED_PROJECTION
from sfumato.checkpoints.source import TensorInfo
from sfumato.checkpoints.stream import write_stream
from sfumato.checkpoints.write_folder import write_folder
from sfumato.errors import CheckpointError, InputError, NumericalError, nearest
from sfumato.presets import ModelConfig

ONLY = {"unet": ("unet",), "vae": ("autoencoder",), "text": ("text", "text2", "bert", "classes")}
NOT_KEPT = ("ema", NOT_AVERAGED, "training state", "autoencoder loss", "safety checker")
BARE = ("autoencoder", "text")  # written alone, they have no prefix: other tools know them so


@dataclass(frozen=True)
class Conversion:
    """What was written, and what of the source was not, by the reason for it."""

    path: Path
    layout: str
    parts: Mapping[str, int]
    left_out: Mapping[str, tuple[str, ...]]
    size: int


@dataclass(frozen=True)
class Target:
    """The tensors of one file to be: what each is, and a way to make it."""

    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(info.shape) * info.dtype.itemsize for info in self.infos.values())


def convert(
    opened: Opened,
    out: Path,
    *,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    only: str | None = None,
    force: bool = False,
) -> Conversion:
    """Write the model as one .safetensors file (layout "ldm") or as a diffusers folder ("diffusers").

    layout None goes by the name: a file for .safetensors, else a folder. dtype None keeps every tensor's own.
    only: "unet", "vae" or "text" alone. Raises `CheckpointError` for a model that is not whole or that the
    layout cannot hold, `InputError` for an `out` that is there already (without force) or is the source,
    `ResourceError` where the disk has no room.
    """
    layout = check_out(out, layout, force)
    check_not_source(opened, out)
    check_parts(opened)
    chosen = _chosen(opened, only)
    left_out = dict(opened.ignored)
    if layout == "diffusers":
        if "preview" in chosen:  # diffusers' small decoders are models of their own
            left_out["preview decoder"] = tuple(opened.parts["preview"].names)
            chosen.remove("preview")
        targets = {part: target(opened, {part: ""}, layout, dtype) for part in chosen}
        write_folder(out, opened.config, targets, alone=only is not None)
        size = sum(made.size for made in targets.values())
    else:
        bare = only is not None and len(chosen) == 1 and chosen[0] in BARE
        prefixes = {part: "" if bare else prefix(part, layout, opened.config) for part in chosen}
        made = target(opened, prefixes, layout, dtype)
        if opened.layout == layout and only is None:
            made, left_out = with_ignored(opened, made, dtype)
        if "unet" in chosen:
            made = with_flags(opened.config, made)
        write_stream(out, made.infos, made.read, describe(opened.config, opened.family, chosen))
        size = made.size
    if only is not None:
        gone = [part for part in opened.parts if part not in chosen]
        left_out |= {f"{part}, not asked for": tuple(opened.parts[part].names) for part in gone}
    counts = {part: len(opened.parts[part].mapping) for part in chosen}
    return Conversion(out, layout, counts, left_out, size)


def target(opened: Opened, prefixes: Mapping[str, str], layout: str, dtype: torch.dtype | None) -> Target:
    """The tensors of some parts under the names of a layout, each part's behind its prefix."""
    makers: dict[str, list[tuple[Part, Pair, Pair, str]]] = {}
    infos: dict[str, TensorInfo] = {}
    for name, start in prefixes.items():
        part = opened.parts[name]
        sources = {pair.native: pair for pair in part.mapping}
        for pair in pairs(name, part.config, layout):
            source = sources[pair.native]
            own = part.info(source.foreign[0]).dtype
            wanted = dtype if dtype is not None and own.is_floating_point else own
            for key, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True):
                full = start + key
                makers.setdefault(full, []).append((part, source, pair, key))
                known = infos.get(full)
                wide = wanted if known is None else torch.promote_types(wanted, known.dtype)
                infos[full] = TensorInfo(wide, tuple(shape))

    def read(name: str) -> Tensor:
        pieces: dict[int, Tensor] = {}
        for part, source, pair, key in makers[name]:
            own = source.transform.to_native([part.source.tensor(given) for given in source.foreign])
            made = pair.transform.to_foreign(own)[pair.foreign.index(key)]
            pieces[pair.transform.piece[0]] = cast(made, infos[name].dtype, name)
        ordered = [pieces[index] for index in sorted(pieces)]
        return ordered[0] if len(ordered) == 1 else torch.cat(ordered)

    return Target(infos, read)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another number format; `NumericalError` for finite values that it cannot hold."""
    given = tensor.to(dtype)
    if dtype != tensor.dtype and not is_finite(given) and is_finite(tensor):
        raise NumericalError(
            f"{name} holds values too large for {dtype}; nothing was written", "Ask for bfloat16 or float32."
        )
    return given


def with_ignored(
    opened: Opened, made: Target, dtype: torch.dtype | None
) -> tuple[Target, dict[str, tuple[str, ...]]]:
    """The same file with what no part uses but the layout can hold, such as an unused last layer."""
    source = next(iter(opened.parts.values())).source
    kept: dict[str, TensorInfo] = {}
    for rule, names in opened.ignored.items():
        for name in names if rule not in NOT_KEPT else ():
            info = source.infos[name]
            changed = rule in (UNUSED_LAYER, UNUSED_PROJECTION) and info.dtype.is_floating_point
            kept[name] = TensorInfo(dtype if changed and dtype else info.dtype, info.shape)

    def read(name: str) -> Tensor:
        return made.read(name) if name in made.infos else cast(source.tensor(name), kept[name].dtype, name)

    left = {rule: names for rule, names in opened.ignored.items() if rule in NOT_KEPT}
    return Target({**kept, **made.infos}, read), left


def with_flags(config: ModelConfig, made: Target) -> Target:
    """The same file with the empty tensors by which other tools know an SDXL that predicts v."""
    flags = {"v_pred": config.prediction == "v", "ztsnr": config.schedule.zero_terminal_snr}
    names = [name for name, there in flags.items() if there and config.text2 is not None]
    new = {name: TensorInfo(torch.float32, (0,)) for name in names if name not in made.infos}
    return Target({**made.infos, **new}, lambda name: torch.empty(0) if name in new else made.read(name))


def check_out(out: Path, layout: str | None, force: bool) -> str:
    """The layout to write at that place; `InputError` where it has another name, or is taken without `force`.

    None goes by the name: one file for .safetensors, else a folder.
    """
    layout = layout or ("diffusers" if out.suffix not in WEIGHT_SUFFIXES else "ldm")
    if layout not in LAYOUTS:
        raise InputError(f"there is no layout {layout!r}", nearest(layout, LAYOUTS))
    if layout == "ldm" and out.suffix != ".safetensors":
        raise InputError(
            f"a single file is written as .safetensors, not as {out.name!r}",
            f"Call it {out.with_suffix('.safetensors').name}, or ask for --layout diffusers.",
        )
    if out.exists() and not force:
        raise InputError(f"{out} is there already", "Choose another name, or replace it with --force.")
    if out.exists() and out.is_dir() != (layout == "diffusers"):
        raise InputError(
            f"{out} is no {'folder' if layout == 'diffusers' else 'file'}", "Choose another name."
        )
    return layout


def check_not_source(opened: Opened, out: Path) -> None:
    """`InputError` where what is read is, or lies in, what would be written."""
    place = out.resolve()
    for file in opened.files:
        own = file.resolve()
        if place == own or place in own.parents:
            raise InputError(f"{out} is what is read, or holds it", "Choose another place to write to.")


def _chosen(opened: Opened, only: str | None) -> list[str]:
    if only is not None and only not in ONLY:
        raise InputError(f"there is no part {only!r}", nearest(only, ONLY))
    chosen = [part for part in opened.parts if only is None or part in ONLY[only]]
    if not chosen:
        raise CheckpointError(f"{opened.place} holds no {only}, only {', '.join(opened.parts)}", "")
    return chosen
