"""`sfumato upscale`: a picture, or a folder of them, made larger by a network or by resampling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sfumato.errors import InputError

LANCZOS = "lanczos"


def upscale(
    source: Annotated[Path, Parameter(help="A picture: PNG, JPEG, WebP, GIF or BMP; or a folder of them.")],
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
    """Make pictures larger. Transparency stays; the recipe in a picture's texts does not.

    In a folder nothing is written over: names get a number where they are taken.
    """
    # These import torch, which a help text can do without.
    from sfumato.checkpoints.upscaler import load_upscaler
    from sfumato.cli.outputs import picture_place, write
    from sfumato.cli.progress import progress_line
    from sfumato.images import free_path
    from sfumato.intake import open_picture
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
            open_picture(path), upscaler, scale, tile=tile, overlap=overlap, show=progress_line(path.name)
        )
        target = output if where.stem is not None else free_path(where.folder, path.stem, ".png")
        write(larger, target, {"upscaler": LANCZOS if upscaler is None else upscaler.name}, where)
        print(f"{target}: {larger.width}x{larger.height}")


def _pictures(source: Path) -> list[Path]:
    """The file itself, or the pictures in a folder by name."""
    if not source.is_dir():
        return [source]
    from sfumato.intake import is_picture  # imports numpy, which a help text can do without

    found = sorted(path for path in source.iterdir() if is_picture(path))
    if not found:
        raise InputError(f"{source} holds no pictures", "Their names end in .png, .jpg, .webp, .gif or .bmp.")
    return found
