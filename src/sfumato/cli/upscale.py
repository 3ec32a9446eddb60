"""`sfumato upscale`: a picture, or a folder of them, made larger by a network or by resampling."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from PIL import Image, ImageOps

from sfumato.errors import InputError

LANCZOS = "lanczos"
FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_READ = 2**26  # pixels of a picture to enlarge


def upscale(
    source: Annotated[Path, Parameter(help="A picture: PNG, JPEG or WebP; or a folder of pictures.")],
    *,
    output: Annotated[
        Path, Parameter(alias="-o", help="File to write, or a folder, as which a folder of pictures goes.")
    ],
    model: Annotated[
        str,
        Parameter(
            metavar="FILE",
            help="A .pth or .safetensors file of ESRGAN, Real-ESRGAN or its compact networks; or lanczos.",
        ),
    ] = LANCZOS,
    scale: Annotated[
        float | None, Parameter(help="How many times as large. Default: the network's own; lanczos 4.")
    ] = None,
    tile: Annotated[
        int, Parameter(help="Side of the tiles in pixels of the small picture; 0 for all of it at once.")
    ] = 192,
    overlap: Annotated[int, Parameter(help="How far tiles overlap.")] = 32,
    quality: Annotated[int, Parameter(help="Of JPEG and WebP, 1 to 100.")] = 95,
    device: Annotated[str, Parameter(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
) -> None:
    """Make pictures larger. Transparency and grey stay; the recipe in a picture's texts does not."""
    # These import torch, which a help text can do without.
    from sfumato.checkpoints.upscaler import load_upscaler
    from sfumato.cli.outputs import picture_place, write
    from sfumato.cli.progress import progress_line
    from sfumato.runtime import resolve_device
    from sfumato.upscale import enlarge

    pictures = _pictures(source)
    upscaler = None if model == LANCZOS else load_upscaler(model, resolve_device(device))
    many = source.is_dir()
    if many and output.suffix:
        raise InputError(f"{output} is no folder, and {source} is", "Give the name of a folder.")
    where = picture_place(output, quality=quality)
    for path in pictures:
        larger = enlarge(
            _read(path), upscaler, scale, tile=tile, overlap=overlap, show=progress_line(path.name)
        )
        target = output if output.suffix and not output.is_dir() else where.folder / f"{path.stem}.png"
        write(larger, target, {"upscaler": LANCZOS if upscaler is None else upscaler.name}, where)
        print(f"{target}: {larger.width}x{larger.height}")


def _pictures(source: Path) -> list[Path]:
    """The file itself, or the pictures in a folder by name."""
    if not source.is_dir():
        return [source]
    found = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{source} holds no pictures", f"They end in {', '.join(SUFFIXES)}.")
    return found


def _read(path: Path) -> Image.Image:
    """The first picture of a file, upright; its size is limited before it is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_READ:
                    raise InputError(
                        f"{path} has {opened.width}x{opened.height} pixels; at most {MAX_READ} are read"
                    )
                opened.load()
                return ImageOps.exif_transpose(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {error}", "Give a PNG, JPEG or WebP file.") from error
