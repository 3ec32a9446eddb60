"""The pictures of controls made ready: preprocessed, at the drawing's size, and shown to their networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import InputError
from sfumato.generation.canvas import Box, as_tuple, fitted, resized_mask
from sfumato.generation.control import Control, Shown, clip_pixels, shown
from sfumato.intake import open_mask, open_picture
from sfumato.model import StableDiffusion
from sfumato.nn.clip_vision import CLIPVisionEncoder
from sfumato.nn.controlnet import ControlNet
from sfumato.nn.ip_adapter import IPAdapter
from sfumato.nn.t2i_adapter import T2IAdapter
from sfumato.preprocess import PREPROCESSORS, preprocess
from sfumato.request import ControlPicture, Request
from sfumato.request.control import AS_IT_IS


def control_pictures(
    asked: ControlPicture, request: Request, init: Sequence[Image.Image], box: Box | None
) -> list[Image.Image]:
    """The pictures of a control as its network is shown them, RGB, at the drawing's size."""
    assert request.width is not None and request.height is not None
    size = (request.width, request.height)
    if asked.kind != AS_IT_IS and asked.kind not in PREPROCESSORS:
        preprocess(asked.kind, Image.new("RGB", (1, 1)))  # whose error names the kinds
    given = (
        [open_picture(one) for one in as_tuple(asked.picture)] if asked.picture is not None else list(init)
    )
    if not given:
        raise InputError(
            f"the control {asked.kind} has no picture, and there is none to start from",
            f"Name one: {asked.kind}:picture.png.",
        )
    whole = None if box is None else open_picture(as_tuple(request.init)[0]).size
    cut = [each.crop(box) if each.size == whole and box is not None else each for each in given]
    ready = [fitted(each, size, asked.resize) for each in cut]
    kind = asked.kind if asked.kind != AS_IT_IS else ""
    options = cast(dict[str, float], asked.options)
    return [preprocess(kind, each, options) if kind else each.convert("RGB") for each in ready]


def seen_by(
    control: Control,
    asked: ControlPicture,
    request: Request,
    pictures: list[Image.Image],
    model: StableDiffusion,
    encoder: CLIPVisionEncoder | None,
) -> Shown:
    """What the network makes of its pictures; `InputError` for too many of them, or another size of U-Net."""
    network = control.network
    if isinstance(network, IPAdapter):
        if encoder is None:
            raise InputError(
                "an IP-Adapter has no image encoder",
                "Give the CLIP image tower of its release: image_encoder.",
            )
        return shown(control, clip_pixels(pictures, encoder.config.image_size), image_encoder=encoder)
    if len(pictures) not in (1, request.num_images):
        raise InputError(
            f"the control {asked.kind} has {len(pictures)} pictures for {request.num_images}",
            "Give one, or as many.",
        )
    assert request.height is not None and request.width is not None
    _check_fit(network, model, asked)
    size = (request.width, request.height)
    if isinstance(network, ControlNet):
        height, width = (side * network.config.hint_scale for side in model.latent_shape(*size[::-1])[1:])
        size, channels = (width, height), network.config.hint_channels
    else:
        channels = network.config.in_channels
    hint = _tensor([each.resize(size, Image.Resampling.LANCZOS) for each in pictures], channels)
    mask = None
    if asked.mask is not None:
        grey = np.array(open_mask(as_tuple(asked.mask)[0]), dtype=np.float32)
        mask = resized_mask(torch.from_numpy(grey)[None, None] / 255, size[::-1])
    return shown(control, hint, mask=mask)


def _check_fit(network: ControlNet | T2IAdapter, model: StableDiffusion, asked: ControlPicture) -> None:
    own = model.unet.config
    if isinstance(network, ControlNet):
        theirs = network.config.encoder
        same = ("model_channels", "channel_mult", "context_dim")
        wrong = [name for name in same if getattr(theirs, name) != getattr(own, name)]
        if wrong:
            raise InputError(
                f"the ControlNet of {asked.kind} is of another model: its {wrong[0]} is "
                f"{getattr(theirs, wrong[0])}, {model.name!r} has {getattr(own, wrong[0])}",
                "Take one that was trained for this family.",
            )
        return
    widths = tuple(own.model_channels * multiple for multiple in own.channel_mult)
    if network.config.channels[0] != widths[0] or network.config.channels[-1] != widths[-1]:
        raise InputError(
            f"the T2I-Adapter of {asked.kind} is of another model: it adds to {network.config.channels} "
            f"channels, {model.name!r} has {widths}",
            "Take one that was trained for this family.",
        )


def _tensor(pictures: Sequence[Image.Image], channels: int) -> Tensor:
    """(n, channels, h, w) in 0..1; channels: 3, or 1 for their lightness."""
    rows = [np.array(each.convert("L" if channels == 1 else "RGB"), dtype=np.float32) for each in pictures]
    pixels = torch.from_numpy(np.stack(rows)) / 255
    return pixels[:, None] if channels == 1 else pixels.movedim(-1, 1)
