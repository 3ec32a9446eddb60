"""Pictures made larger: by a super-resolution network in tiles, or by resampling with Lanczos' filter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sfumato.checkpoints.upscaler import Upscaler, load_upscaler
from sfumato.errors import InputError, NumericalError, nearest
from sfumato.nn.tiles import Tiling, tile_rows

LANCZOS, ILLUSTRATIONS = "lanczos", "illustrations"
NAMES = (ILLUSTRATIONS, LANCZOS)
EMBEDDED = Path(__file__).parent / "assets" / "upscaler.safetensors"
FILES = (".pth", ".pt", ".safetensors")
TILE, OVERLAP = 192, 40  # pixels of the small picture; half the overlap is more than our network sees
MAX_PIXELS = 2**28  # of a result: 16,384 x 16,384
MAX_SCALE = 64.0
LANCZOS_SCALE = 4.0  # where neither a network nor anybody says
LOADED = 4  # networks that are kept
GREY = ("1", "L", "LA")

Show = Callable[[int, int], object]
"""show(done, all): rows of pixels that the network has made."""


def enlarge(
    image: Image.Image,
    upscaler: Upscaler | Path | str | None = ILLUSTRATIONS,
    to: float | tuple[int, int] | None = None,
    *,
    device: torch.device | None = None,
    tile: int = TILE,
    overlap: int = OVERLAP,
    show: Show | None = None,
) -> Image.Image:
    """The picture `to` times as large, or of the size (width, height): "L" or "RGB", with "A" if it had it.

    upscaler: "illustrations", the network that comes with the package; a file of another; one that is loaded;
    "lanczos" or None for resampling alone. A network is applied as often as it takes, and what it made too
    large is averaged; nothing is shrunk by it. to: a scale above 0 and at most 64, or a size, which is filled
    whatever its shape; None is the network's own scale, 4 without one. device: of a network that is not
    loaded yet. tile, overlap: see `nn.tiles.Tiling`, in pixels of the picture; a tile of 0 is the whole
    picture. Transparency is enlarged by the network too, and colours that nobody sees give way to those
    around them. Raises `InputError` for results beyond 16,384 x 16,384 pixels and for names of nothing,
    `CheckpointError` for files of something else, `NumericalError` where a network left the finite numbers.
    """
    network = upscaler if isinstance(upscaler, Upscaler | None) else find_upscaler(upscaler, device)
    size, times = _planned(image, network, to)
    colours, alpha = _split(image)
    for _ in range(times):
        assert network is not None
        colours = _by_network(colours, network, tile, overlap, show)
        if alpha is not None:
            alpha = _by_network(alpha, network, tile, overlap, None)
    colours = _resampled(colours, size)
    if alpha is not None:
        colours.putalpha(_resampled(alpha, size))
    return colours


def find_upscaler(name: Path | str, device: torch.device | None = None) -> Upscaler | None:
    """The network of a name or a file; None for "lanczos". The last four are kept, until their files change.

    Raises `InputError` for a name of nothing, `CheckpointError` for a file of something else.
    """
    if name == LANCZOS:
        return None
    path = EMBEDDED if name == ILLUSTRATIONS else Path(name)
    if path.suffix.lower() not in FILES and not path.exists():
        raise InputError(
            f"there is no upscaler {str(name)!r}",
            f"{nearest(str(name), NAMES)} Or give a file: {', '.join(FILES)}.",
        )
    # What changes with a file; of one that is absent or a folder, loading it tells.
    status = path.stat() if path.is_file() else None
    return _loaded(path, status and (status.st_mtime_ns, status.st_size), device)


@lru_cache(maxsize=LOADED)
def _loaded(path: Path, changes: tuple[int, int] | None, device: torch.device | None) -> Upscaler:
    return load_upscaler(path, device)


def upscaled(picture: Tensor, upscaler: Upscaler, *, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """Pictures (b, c, h, w) in 0..1 -> (b, c, scale * h, scale * w), not clamped, on the CPU; any size.

    c is the network's. Equal to the network's answer for the whole picture where half the overlap is as far
    as it sees: 1 pixel for each of a compact network's layers.
    """
    return torch.cat(list(upscaled_rows(picture, upscaler, tile=tile, overlap=overlap)), dim=-2)


@torch.no_grad()
def upscaled_rows(
    picture: Tensor, upscaler: Upscaler, *, tile: int = TILE, overlap: int = OVERLAP
) -> Iterator[Tensor]:
    """The rows of `upscaled`, some at a time from the top, so that no more than a row of tiles is held."""
    height, width = picture.shape[-2:]
    multiple = upscaler.multiple
    # Repeated pixels, as a reflection needs more of them than a picture may have.
    padding = (0, -width % multiple, 0, -height % multiple)
    padded = F.pad(picture, padding, mode="replicate")
    whole = max(padded.shape[-2:])
    side = -(-tile // multiple) * multiple if 0 < tile < whole else whole
    tiling = Tiling(side, min(-(-overlap // multiple) * multiple, side), multiple)
    parameter = next(upscaler.network.parameters())

    def made(part: Tensor) -> Tensor:
        return upscaler.network(part.to(parameter.device, parameter.dtype)).float().cpu()

    left = height * upscaler.scale
    for rows in tile_rows(made, padded, tiling, up=upscaler.scale):
        yield rows[..., :left, : width * upscaler.scale]
        left -= min(left, rows.shape[-2])


def _planned(
    image: Image.Image, upscaler: Upscaler | None, to: float | tuple[int, int] | None
) -> tuple[tuple[int, int], int]:
    """((width, height) of the result, how often the network is applied); `InputError` if too large."""
    own = 1 if upscaler is None else upscaler.scale
    if to is None:
        to = LANCZOS_SCALE if upscaler is None else float(own)
    scale = max(to[0] / image.width, to[1] / image.height) if isinstance(to, tuple) else to
    if not 0 < scale <= MAX_SCALE:
        raise InputError(f"the scale is {scale:g}; it must be above 0 and at most {MAX_SCALE:g}")
    size = to if isinstance(to, tuple) else (round(image.width * scale), round(image.height * scale))
    size = (max(1, size[0]), max(1, size[1]))
    times = 0 if upscaler is None else _times(own, scale)
    largest = max(size[0] * size[1], image.width * image.height * own ** (2 * times))
    if largest > MAX_PIXELS:
        raise InputError(
            f"a picture of {image.width}x{image.height} would become {largest} pixels on its way to "
            f"{size[0]}x{size[1]}; at most {MAX_PIXELS} are made",
            "Choose a smaller scale, or a network of a smaller one.",
        )
    return size, times


def _times(own: int, wanted: float) -> int:
    """How often a network that enlarges `own` times is applied for `wanted`: none where that shrinks."""
    if own == 1:
        return 1
    return max(0, math.ceil(math.log(wanted) / math.log(own) - 1e-9))


def _resampled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at a size: smaller by averages, or near them, that leave no rims; larger by Lanczos."""
    if image.size == size:
        return image
    if image.width < size[0] or image.height < size[1]:
        return image.resize(size, Image.Resampling.LANCZOS)
    whole = not (image.width % size[0] or image.height % size[1])
    return image.resize(size, Image.Resampling.BOX if whole else Image.Resampling.HAMMING)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(colours, alpha or None) of a picture of any mode."""
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in GREY else "RGBA")
        alpha = image.getchannel("A")
        colours = image.convert("L" if image.mode == "LA" else "RGB")
        return (colours, None) if alpha.getextrema() == (255, 255) else (_covered(colours, alpha), alpha)
    return image.convert("L" if image.mode in GREY else "RGB"), None


def _covered(colours: Image.Image, alpha: Image.Image) -> Image.Image:
    """The colours, with those of fully transparent pixels made of the nearest visible ones.

    Pull and push: averages of the visible pixels over squares of doubling side fill what is still open.
    """
    values = torch.from_numpy(np.array(colours, dtype=np.float32)).reshape(alpha.height, alpha.width, -1)
    values = values.movedim(-1, 0)[None]  # (1, c, h, w)
    seen = (torch.from_numpy(np.array(alpha)) > 0).float()[None, None]
    levels = [(values * seen, seen)]
    while max(levels[-1][1].shape[-2:]) > 1:
        total, weight = levels[-1]
        levels.append((F.avg_pool2d(total, 2, ceil_mode=True), F.avg_pool2d(weight, 2, ceil_mode=True)))
    filled: Tensor | None = None
    for total, weight in reversed(levels):
        mean = total / weight.clamp_min(1e-12)
        if filled is not None:
            filled = F.interpolate(filled, size=mean.shape[-2:], mode="nearest")
            mean = torch.where(weight > 0, mean, filled)
        filled = mean
    assert filled is not None
    rows = torch.where(seen > 0, values, filled).round().clamp(0, 255).to(torch.uint8)[0].movedim(0, -1)
    return Image.fromarray(rows.numpy() if rows.shape[-1] == 3 else rows[..., 0].numpy())


def _by_network(
    colours: Image.Image, upscaler: Upscaler, tile: int, overlap: int, show: Show | None
) -> Image.Image:
    """The picture through the network once; one of a single channel takes colours one by one."""
    if upscaler.channels not in (1, 3):
        raise InputError(
            f"{upscaler.name} is made for {upscaler.channels} channels", "Take one for grey or colour."
        )
    grey = colours.mode == "L"
    shown = colours if upscaler.channels == 1 or not grey else colours.convert("RGB")
    values = np.array(shown, dtype=np.float32).reshape(shown.height, shown.width, -1) / 255
    picture = torch.from_numpy(values).movedim(-1, 0)[None]  # (1, c, h, w)
    picture = picture.reshape(-1, upscaler.channels, *picture.shape[-2:])
    height, width = (side * upscaler.scale for side in picture.shape[-2:])
    result = np.empty((height, width, values.shape[-1]), dtype=np.uint8)
    top = 0
    for rows in upscaled_rows(picture, upscaler, tile=tile, overlap=overlap):
        if not bool(torch.isfinite(rows).all()):
            raise NumericalError(f"{upscaler.name} left the finite numbers", "Use it in float32.")
        pixels = (rows.flatten(0, 1) * 255).round().clamp(0, 255).to(torch.uint8).movedim(0, -1)
        result[top : top + pixels.shape[0]] = pixels.numpy()
        top += pixels.shape[0]
        if show is not None:
            show(top, height)
    made = Image.fromarray(result if result.shape[-1] == 3 else result[..., 0])
    return made.convert("L") if grey else made
