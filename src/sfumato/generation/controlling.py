"""The controls of a request: their networks loaded, their pictures made ready and shown to them."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sfumato.checkpoints.controls.load import load_control
from sfumato.checkpoints.files import sha256
from sfumato.diffusion.control import Influence, timed
from sfumato.diffusion.prediction import ConditionalDenoiser, Predictor
from sfumato.errors import InputError
from sfumato.generation.canvas import Box
from sfumato.generation.conditions import Conditions
from sfumato.generation.control import Control, Controlled, Shown, with_shown
from sfumato.generation.control_pictures import control_pictures, seen_by
from sfumato.generation.recipe import picture_digest
from sfumato.model import StableDiffusion
from sfumato.nn.clip_vision import CLIPVisionEncoder
from sfumato.nn.deep_shrink import deep_shrink
from sfumato.nn.patches import combine_patches
from sfumato.nn.unet import Patch
from sfumato.preprocess import PREPROCESSORS
from sfumato.request import ControlPicture, Request

KEPT = 4  # networks that stay loaded between requests


@dataclass(frozen=True)
class Controls:
    """What controls a run: networks, what each makes of its picture, and what a recipe says of them."""

    networks: tuple[Control, ...] = ()
    seen: tuple[Shown, ...] = ()
    told: tuple[dict[str, Any], ...] = ()

    def conditioned(self, conds: Conditions, rows: int) -> Conditions:
        """The conditions, of `rows` samples in each branch, with what the controls were shown."""
        return conds.map(lambda branches: with_shown(branches, self.seen, rows)) if self.networks else conds

    @property
    def digest(self) -> str | None:
        """sha256 of networks, pictures and numbers; None without controls."""
        return hashlib.sha256(repr(self.told).encode()).hexdigest() if self.told else None


NONE = Controls()


def controls(
    model: StableDiffusion, request: Request, init: Sequence[Image.Image], box: Box | None
) -> Controls:
    """The controls of a request from `complete`.

    init: the pictures to start from, at the drawing's size, for controls without a picture. box: the part of
    a whole picture that is drawn, which controls of its size are cut to. Errors as `load_control` and
    `preprocess`, `InputError` for what does not fit together.
    """
    if not request.control:
        return NONE
    networks, seen, told = [], [], []
    encoder = None if request.image_encoder is None else _loaded(request.image_encoder, model)
    for asked in request.control:
        source = asked.model if asked.model is not None else _by_kind(asked, request.control_dir)
        network = _loaded(source, model)
        if isinstance(network, CLIPVisionEncoder):
            raise InputError(f"{source} is an image encoder, no control", "Give it as image_encoder.")
        control = Control(network, Influence(asked.weight, asked.start, asked.end, asked.mode))
        pictures = control_pictures(asked, request, init, box)
        networks.append(control)
        seen.append(seen_by(control, asked, request, pictures, model, encoder))
        told.append(_told(asked, source, pictures))
    return Controls(tuple(networks), tuple(seen), tuple(told))


def predictors(
    model: StableDiffusion, request: Request, found: Controls, sigmas: Sequence[float]
) -> Callable[[Patch], ConditionalDenoiser]:
    """Makes the model's P(x, sigma, cond) -> x0 with a patch, under the controls and deep shrink of a run.

    sigmas: its noise levels, by which controls start and end.
    """
    shrink = Patch()
    if request.deep_shrink is not None:
        shrink = deep_shrink(model.unet.config, request.deep_shrink_block, request.deep_shrink)
    elif not found.networks:
        return model.predictor
    networks = tuple(_as_wide(control, model.dtype) for control in found.networks)
    shrinking = Influence(float(request.deep_shrink is not None), end=request.deep_shrink_end)

    def make(patch: Patch) -> ConditionalDenoiser:
        def with_active(active: tuple[bool, ...]) -> ConditionalDenoiser:
            *on, small = active
            whole = combine_patches(shrink, patch) if small else patch
            network = Controlled(model.network, model.unet, networks, tuple(on), whole)
            return Predictor(network, model.schedule, model.prediction, model.dtype)

        return timed(with_active, [*(control.influence for control in networks), shrinking], sigmas)

    return make


def _as_wide(control: Control, dtype: torch.dtype) -> Control:
    """The control in float32 where the model was taken there, having left the finite numbers."""
    narrow = next(control.network.parameters()).dtype
    if dtype != torch.float32 or narrow == torch.float32:
        return control
    return replace(control, network=copy.deepcopy(control.network).float())


def _by_kind(asked: ControlPicture, folder: str | None) -> Path:
    """The network of a folder whose name holds the kind, or what networks for it are called."""
    if folder is None:
        raise InputError(
            f"the control {asked.kind} has no network",
            f"Give one: {asked.kind}:picture.png model=FILE, or a folder of them as control_dir.",
        )
    files = sorted(each for each in Path(folder).iterdir() if not each.name.startswith("."))
    row = PREPROCESSORS.get(asked.kind)
    called = [] if row is None else [each.split()[-1] for each in row.networks.split(", ")]
    named = ([each for each in files if _holds(each, words)] for words in ([asked.kind], called))
    found = next(filter(None, named), [])
    if len(found) != 1:
        names = ", ".join(each.name for each in found or files[:20])
        raise InputError(
            f"{folder} has {len(found)} networks named after {asked.kind!r}: {names}",
            f"Say which: {asked.kind}:picture.png model=FILE.",
        )
    return found[0]


def _holds(file: Path, words: Sequence[str]) -> bool:
    return any(word.casefold() in file.name.casefold() for word in words)


def _loaded(source: Any, model: StableDiffusion) -> Any:
    """A network by its path or name, or as it was given, on the model's device."""
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    return _kept(os.fspath(source), stamp, model.device, model.dtype)


@lru_cache(maxsize=KEPT)
def _kept(source: str, _: int, device: torch.device, dtype: torch.dtype) -> Any:
    return load_control(source, device=device, dtype=dtype)


def _told(asked: ControlPicture, source: Any, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """What a recipe says of a control."""
    path = Path(source) if isinstance(source, str | Path) else None
    common = asked.model_dump(include={"kind", "weight", "start", "end", "mode", "resize", "options"})
    found = {**common, "picture_sha256": picture_digest(tuple(pictures))}
    if asked.mask is not None:
        found["mask_sha256"] = picture_digest(asked.mask)
    if path is not None:
        found["model"] = path.name
        found |= {"model_sha256": _digest(path, path.stat().st_mtime_ns)} if path.is_file() else {}
    return found


@lru_cache(maxsize=64)
def _digest(path: Path, _: int) -> str:
    return sha256(path)
