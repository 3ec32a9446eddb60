"""Released super-resolution networks by their names and shapes: ESRGAN old and new, Real-ESRGAN, compact."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sfumato.checkpoints.build import assign
from sfumato.checkpoints.files import converted, open_file, write_tensors
from sfumato.checkpoints.load import read_finite
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.esrgan import CompactConfig, CompactNet, RRDBConfig, RRDBNet
from sfumato.runtime import shapes_only

NESTINGS = ("params_ema.", "params.", "state_dict.", "model_state_dict.", "")  # the averaged weights first
WRAPPERS = ("module.", "generator.", "netG.")  # of parallel training and of whole networks
MAX_SCALE = 16
UPSCALER_KEY = "sfumato.upscaler"  # of the metadata, where a model file has "sfumato"
FORMAT_VERSION = 1
MAX_NAME = 100  # characters of a name that a file gives itself
TENSORS_IN_BLOCK = 30  # weight and bias of the 15 convolutions of an RRDB
# Names of ESRGAN's second code beside those of Real-ESRGAN, which are ours.
RENAMED = {"RRDB_trunk": "body", "trunk_conv": "conv_body", "HRconv": "conv_hr", "upconv": "conv_up"}
OLD_BLOCK = re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(weight|bias)")
OLD_TRUNK = re.compile(r"model\.1\.sub\.(\d+)\.(weight|bias)")
OLD_OUTER = re.compile(r"model\.(\d+)\.(weight|bias)")


@dataclass(frozen=True)
class Upscaler:
    """A network that enlarges pictures, (b, c, h, w) in 0..1 -> (b, c, scale * h, scale * w).

    name: what its file calls itself, or is called. kind: its architecture in words. scale: side of the result
    over side of the picture. multiple: what sides must be multiples of. channels: of the pictures. notices:
    credits and licences of what it learned from, where its file has them.
    """

    network: RRDBNet | CompactNet
    name: str
    kind: str
    scale: int
    multiple: int
    channels: int
    notices: str = ""


def save_upscaler(path: Path, network: RRDBNet | CompactNet, name: str, notices: str = "") -> None:
    """Write a network in half precision under the names of Real-ESRGAN's releases, with name and notices.

    Raises `NumericalError` before anything is written if a weight is not finite in float16.
    """
    tensors = converted(network.state_dict(), torch.float16)
    values = {"version": FORMAT_VERSION, "name": name, "notices": notices}
    write_tensors(path, tensors, {UPSCALER_KEY: json.dumps(values, ensure_ascii=False)})


def load_upscaler(
    path: Path | str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Upscaler:
    """The network in a .pth, .pt or .safetensors file of ESRGAN's kinds, in evaluation mode, frozen.

    Raises `CheckpointError` for a file that holds no such network, or is damaged.
    """
    source = open_file(Path(path))
    names = native_names(source.infos)
    shapes = {ours: source.infos[theirs].shape for ours, theirs in names.items()}
    config = upscaler_config(shapes, str(path))
    tensors = {ours: read_finite(source, theirs, device, dtype) for ours, theirs in names.items()}
    network = _empty(config, str(path))
    assign(network, tensors, str(path))
    rrdb = isinstance(config, RRDBConfig)
    kind = f"RRDB, {config.num_blocks} blocks" if rrdb else f"compact, {config.num_convs} layers"
    channels = config.out_channels if rrdb else config.channels
    name, notices = _described(source.metadata.get(UPSCALER_KEY, ""))
    return Upscaler(network, name or Path(path).stem, kind, config.scale, config.unshuffle, channels, notices)


def native_names(infos: Iterable[str]) -> dict[str, str]:
    """Our name -> the file's, for every tensor of the network; of weights and their averages the averages.

    Names that no release has stay as they are.
    """
    every = list(infos)
    nesting = next(start for start in NESTINGS if any(name.startswith(start) for name in every))
    inner = {name.removeprefix(nesting): name for name in every if name.startswith(nesting)}
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in inner):
            inner = {name.removeprefix(wrapper): theirs for name, theirs in inner.items()}
    old = {int(found[1]) for name in inner if (found := OLD_OUTER.fullmatch(name))}
    outer = _old_outer(sorted(old))
    return {_native(name, outer): theirs for name, theirs in inner.items()}


def upscaler_config(
    shapes: Mapping[str, tuple[int, ...]], place: str = "the file"
) -> RRDBConfig | CompactConfig:
    """The options of the network whose tensors have our names and these shapes.

    Raises `CheckpointError` for none that is known here.
    """
    try:
        if "conv_first.weight" in shapes:
            return _enlarging(_rrdb(shapes))
        if "body.0.weight" in shapes:
            return _enlarging(_compact(shapes))
    except (InputError, ArithmeticError, LookupError, ValueError) as error:
        raise CheckpointError(
            f"{place} is no upscaler that is known here: {error}", "Give an ESRGAN or Real-ESRGAN file."
        ) from error
    first = ", ".join(sorted(shapes)[:3])
    raise CheckpointError(
        f"{place} holds no upscaler that is known here; its {len(shapes)} tensors are {first} ...",
        "Give a file of ESRGAN, Real-ESRGAN, or its compact networks.",
    )


def _described(text: str) -> tuple[str, str]:
    """(name, notices) that a file of `save_upscaler` gives itself; empty where it says nothing of use.

    The network needs none of it, so what is damaged here is left out.
    """
    try:
        values = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return "", ""
    if not isinstance(values, dict):
        return "", ""
    name, notices = values.get("name"), values.get("notices")
    if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
        name = ""
    return name, notices if isinstance(notices, str) else ""


def _empty(config: RRDBConfig | CompactConfig, place: str) -> RRDBNet | CompactNet:
    try:
        with shapes_only():
            return RRDBNet(config) if isinstance(config, RRDBConfig) else CompactNet(config)
    except (RuntimeError, ArithmeticError, ValueError) as error:  # torch's, for impossible widths
        raise CheckpointError(f"the upscaler in {place} cannot be built: {error}", "Get it again.") from error


def _old_outer(numbers: list[int]) -> dict[int, str]:
    """ESRGAN's first code numbers its layers: 0, one for each doubling (3, 6, ...), and two at the end."""
    if len(numbers) < 3 or numbers[0] != 0:
        return {}
    ups = {number: f"conv_up{index + 1}" for index, number in enumerate(numbers[1:-2])}
    return {0: "conv_first", **ups, numbers[-2]: "conv_hr", numbers[-1]: "conv_last"}


def _native(name: str, outer: Mapping[int, str]) -> str:
    if outer and (found := OLD_BLOCK.fullmatch(name)):
        return f"body.{found[1]}.rdb{found[2]}.conv{found[3]}.{found[4]}"
    if outer and (found := OLD_TRUNK.fullmatch(name)):
        return f"conv_body.{found[2]}"
    if (found := OLD_OUTER.fullmatch(name)) and int(found[1]) in outer:
        return f"{outer[int(found[1])]}.{found[2]}"
    first, dot, rest = name.partition(".")
    stem = first.rstrip("0123456789")
    renamed = RENAMED.get(stem, stem) + first[len(stem) :]
    return renamed + dot + (rest.replace(".RDB", ".rdb") if renamed == "body" else rest)


def _rrdb(shapes: Mapping[str, tuple[int, ...]]) -> RRDBConfig:
    width, joined, *_ = shapes["conv_first.weight"]
    out_channels = shapes["conv_last.weight"][0]
    blocks = {int(name.split(".")[1]) for name in shapes if re.match(r"body\.\d{1,4}\.", name)}
    ups = {int(name[7]) for name in shapes if re.match(r"conv_up\d\.", name)}
    if blocks != set(range(len(blocks))) or ups != set(range(1, len(ups) + 1)):
        raise ValueError("its blocks are not numbered one after the other")
    unshuffle = math.isqrt(joined // out_channels)
    if out_channels * unshuffle**2 != joined:
        raise ValueError(f"it takes {joined} channels and gives {out_channels}")
    growth = shapes["body.0.rdb1.conv1.weight"][0]
    if TENSORS_IN_BLOCK * len(blocks) > len(shapes):
        raise ValueError(f"it names {len(blocks)} blocks and holds {len(shapes)} tensors")
    return RRDBConfig(out_channels, out_channels, width, len(blocks), growth, len(ups), unshuffle)


def _compact(shapes: Mapping[str, tuple[int, ...]]) -> CompactConfig:
    numbers = {int(name.split(".")[1]) for name in shapes if re.fullmatch(r"body\.\d{1,4}\.\w+", name)}
    layers = sorted(numbers)
    if layers != list(range(len(layers))) or len(layers) % 2 == 0:
        raise ValueError("its layers are not convolutions and learned rectifiers in turn")
    width, channels, *_ = shapes["body.0.weight"]
    last = shapes[f"body.{layers[-1]}.weight"][0]
    scale = math.isqrt(last // channels)
    if channels * scale**2 != last:
        raise ValueError(f"its last layer has {last} channels for pictures of {channels}")
    return CompactConfig(channels, width, len(layers) // 2 - 1, scale)


def _enlarging(config: RRDBConfig | CompactConfig) -> RRDBConfig | CompactConfig:
    if config.scale > MAX_SCALE:
        raise ValueError(f"it enlarges {config.scale} times, at most {MAX_SCALE} times is taken")
    return config
