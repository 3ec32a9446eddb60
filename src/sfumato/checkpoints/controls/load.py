"""Files and folders of control networks, adapters and CLIP's image tower: told apart, checked, loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints.clip import is_clip, load_clip
from sfumato.checkpoints.controls.adapters_detect import read_ip, read_t2i, read_vision
from sfumato.checkpoints.controls.adapters_layouts import ip_pairs, own_names, t2i_pairs, vision_pairs
from sfumato.checkpoints.controls.detect import read_controlnet, with_given
from sfumato.checkpoints.controls.layouts import control_pairs
from sfumato.checkpoints.files import open_file
from sfumato.checkpoints.folder import Folder
from sfumato.checkpoints.layouts.naming import weight_file
from sfumato.checkpoints.layouts.pair import Pair, Shape
from sfumato.checkpoints.load import load_part
from sfumato.checkpoints.open import locate
from sfumato.checkpoints.opened import Part
from sfumato.checkpoints.rules import rule_of
from sfumato.checkpoints.schema import read_json
from sfumato.checkpoints.source import Source, TensorInfo
from sfumato.errors import CheckpointError
from sfumato.nn.clip_vision import CLIPVisionEncoder
from sfumato.nn.controlnet import ControlNet
from sfumato.nn.ip_adapter import IPAdapter
from sfumato.nn.t2i_adapter import T2IAdapter
from sfumato.runtime import shapes_only

Loaded = ControlNet | T2IAdapter | IPAdapter | CLIPVisionEncoder
CONTROL = "control_model."
NAMED = 10  # tensors that an error names
SPARE = 1000  # pairs beyond the file's tensors after which its names are not believed
# Whatever damaged shapes lead to: widths of 0, heads that do not divide, groups of nothing.
IMPOSSIBLE = (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError)
# Of a file that holds the model a ControlNet was trained on too, as its authors first released them.
BESIDE = re.compile(r"(?:model\.diffusion_model|first_stage_model|cond_stage_model)\..+")
TEXT = re.compile(r"(?:text_model\..+|text_projection\.weight|logit_scale)")  # of a whole CLIP
SIGNS: Mapping[str, re.Pattern[str]] = {  # kind -> a name that tells it, with its layout as the group
    "ControlNet": re.compile(
        rf"(?:{re.escape(CONTROL)})?input_hint_block\.\d+\.|controlnet_cond_embedding\."
    ),
    "IP-Adapter": re.compile(r"ip_adapter\.\d+\."),
    "T2I-Adapter": re.compile(r"(?:adapter\.)?body\.\d+\.(?:in_conv|block1|resnets\.\d+)\."),
    "CLIP image tower": re.compile(r"vision_model\.embeddings\."),
}


@dataclass(frozen=True)
class Found:
    """What a file holds: its kind, its options, the table of its tensors by their full names."""

    kind: str
    config: Any
    pairs: tuple[Pair, ...]
    ignored: tuple[str, ...] = ()


NETWORKS: Mapping[str, Callable[[Any], Loaded]] = {
    "ControlNet": ControlNet,
    "IP-Adapter": IPAdapter,
    "T2I-Adapter": T2IAdapter,
    "CLIP image tower": CLIPVisionEncoder,
}


def load_control(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    offline: bool = False,
    mmap: bool = True,
) -> Loaded:
    """A ControlNet, T2I-Adapter, IP-Adapter or CLIP image tower, in evaluation mode and frozen.

    source: a file of any format that `open_file` reads, a folder of one component, or a name on the hub.
    dtype, device: what it is converted and moved to, None for what the file has. Raises `CheckpointError`
    for anything else, and naming the first ten tensors for a network that is not whole or has too many.
    """
    path = locate(source, offline=offline)
    values: Mapping[str, Any] = {}
    if path.is_dir():
        path, values = _component(path)
    if is_clip(path):  # of our own training: it says what shapes do not tell, such as the number of heads
        return load_clip(path, device, dtype or torch.float16).vision
    opened = open_file(path, mmap=mmap)
    found = find_control(opened, values)
    try:
        with shapes_only():
            network = NETWORKS[found.kind](found.config)
    except IMPOSSIBLE as error:
        raise CheckpointError(f"{path} has a {found.kind} that cannot be built: {error}", "") from error
    load_part(network, Part(found.config, found.pairs, opened), dtype, device)
    return network


def find_control(source: Source, values: Mapping[str, Any] | None = None) -> Found:
    """What a file is, and which of its tensors become which of ours; nothing of them is read.

    values: of the `config.json` beside it, for what shapes do not tell. Errors as `load_control`.
    """
    place, given = str(source.path), {} if values is None else values
    kind = kind_of(source.infos)
    if kind is None:
        first = ", ".join(sorted(source.infos)[:10])
        raise CheckpointError(
            f"{place} holds no network that controls another; its {len(source.infos)} tensors are {first}",
            "ControlNets, T2I-Adapters, IP-Adapters and CLIP image towers load here.",
        )
    prefix = CONTROL if any(name.startswith(CONTROL) for name in source.infos) else ""
    mine = [name for name in source.infos if name.startswith(prefix)]
    shapes = {name.removeprefix(prefix): source.infos[name].shape for name in mine}
    try:
        config, table = _described(kind, shapes, source.metadata, given, place)
        listed = tuple(islice(table, 2 * len(source.infos) + SPARE))
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error.message}", error.hint) from error
    except IMPOSSIBLE as error:
        raise CheckpointError(
            f"{place} has a {kind} that cannot be built: {error}", "Get it again."
        ) from error
    pairs = tuple(replace(pair, foreign=tuple(prefix + name for name in pair.foreign)) for pair in listed)
    wanted = {
        name: shape for pair in pairs for name, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True)
    }
    ignored = tuple(name for name in source.infos if name not in wanted and _left_out(name, kind, prefix))
    _check_whole(wanted, source.infos, set(ignored), f"{place} holds no whole {kind}")
    return Found(kind, config, pairs, ignored)


def kind_of(names: Iterable[str]) -> str | None:
    """Which of the kinds that are loaded here a file of tensors of these names is; None for none."""
    names = list(names)
    return next((kind for kind, sign in SIGNS.items() if any(sign.match(name) for name in names)), None)


def _described(
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    values: Mapping[str, Any],
    place: str,
) -> tuple[Any, Iterable[Pair]]:
    """(options, table of names) of a network of the kind with these tensors."""
    if kind == "ControlNet":
        layout = "ldm" if any(name.startswith("input_hint_block.") for name in shapes) else "diffusers"
        config = with_given(read_controlnet(shapes, layout, metadata), values, place)
        table = control_pairs(config)
        return config, own_names(table) if layout == "ldm" else table
    if kind == "T2I-Adapter":
        layout = "diffusers" if any(name.startswith("adapter.") for name in shapes) else "ldm"
        config = read_t2i(shapes, layout)
        table = t2i_pairs(config)
        return config, own_names(table) if layout == "ldm" else table
    if kind == "IP-Adapter":
        config = read_ip(shapes)
        return config, ip_pairs(config)
    config = read_vision(shapes, values)
    return config, vision_pairs(config)


def _left_out(name: str, kind: str, prefix: str) -> bool:
    if kind == "CLIP image tower":
        return bool(TEXT.fullmatch(name)) or name.endswith("position_ids")
    whole = bool(prefix) and BESIDE.fullmatch(name) is not None
    return whole or (rule_of(name) is not None and not name.startswith("vision"))


def _check_whole(
    wanted: Mapping[str, Shape], infos: Mapping[str, TensorInfo], ignored: Collection[str], failure: str
) -> None:
    """`CheckpointError` naming the first ten tensors that are missing, unexpected or of another shape."""
    names = (wanted.keys() | infos.keys()) - set(ignored)
    reasons = {name: _misfit(wanted.get(name), infos.get(name)) for name in names}
    wrong = sorted(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    if wrong:
        raise CheckpointError(
            f"{failure}, {len(wrong)} tensors differ: {'; '.join(wrong[:NAMED])}",
            "The file is incomplete, damaged, or of an architecture that is not built here.",
        )


def _misfit(wanted: Shape | None, given: TensorInfo | None) -> str:
    if given is None:
        return "missing"
    if wanted is None:
        return "unexpected"
    if wanted != given.shape:
        return f"shape {given.shape} for {wanted}"
    return "" if given.dtype.is_floating_point else f"{given.dtype} is not floating-point"


def _component(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """(the file of weights, the values of `config.json`) of a folder with one network."""
    folder = Folder(path)
    chosen = weight_file(folder.names(), None)
    weights = None if chosen is None else folder.file(chosen)
    if weights is None or weights.suffix == ".json":
        raise CheckpointError(f"{path} holds no weights in one file", "Give the file itself.")
    described = folder.file("config.json")
    return weights, {} if described is None else read_json(described)
