"""`sfumato upscale`: a picture, or a folder of them, made larger by a network or by resampling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sfumato.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.cli.outputs import Place

MAX_KEY = 79  # letters of the name of a PNG's text


def upscale(
    source: Annotated[Path, Parameter(help="A picture: PNG, JPEG, WebP, GIF or BMP; or a folder of them.")],
    *,
    output: Annotated[
        Path, Parameter(alias="-o", help="File to write, or a folder, as which a folder of pictures goes.")
    ],
    model: Annotated[
        str,
        Parameter(
            metavar="NAME",
            help="illustrations, the network that comes with it; lanczos, a filter; or a .pth or "
            ".safetensors file of ESRGAN, Real-ESRGAN or its compact networks.",
        ),
    ] = "illustrations",
    scale: Annotated[
        float | None, Parameter(help="How many times as large. Default: the network's own; lanczos 4.")
    ] = None,
    tile: Annotated[
        int, Parameter(help="Side of the tiles in pixels of the small picture; 0 for all of it at once.")
    ] = 192,
    overlap: Annotated[int, Parameter(help="How far tiles overlap.")] = 40,
    quality: Annotated[int, Parameter(help="Of JPEG and WebP, 1 to 100.")] = 95,
    device: Annotated[str, Parameter(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
) -> None:
    """Make pictures larger. Transparency stays, and so does the recipe of how a picture was drawn.

    In a folder nothing is written over: names get a number where they are taken.
    """
    # These import torch, which a help text can do without.
    from sfumato.cli.outputs import picture_place
    from sfumato.cli.progress import progress_line
    from sfumato.images import free_path
    from sfumato.intake import open_picture
    from sfumato.runtime import resolve_device
    from sfumato.upscale import enlarge, find_upscaler

    pictures = _pictures(source)
    upscaler = find_upscaler(model, resolve_device(device))
    many = source.is_dir()
    if many and output.suffix:
        raise InputError(f"{output} is no folder, and {source} is", "Give the name of a folder.")
    where = picture_place(output, quality=quality)
    for path in pictures:
        image = open_picture(path)
        larger = enlarge(image, upscaler, scale, tile=tile, overlap=overlap, show=progress_line(path.name))
        target = output if where.stem is not None else free_path(where.folder, path.stem, ".png")
        done = {
            "upscaler": model if upscaler is None else upscaler.name,
            "upscale": round(larger.width / image.width, 4),
            "upscaled_from": list(image.size),
        }
        _write(larger, target, path, done, where)
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


def _write(image: Image, target: Path, source: Path, done: Mapping[str, Any], where: Place) -> None:
    """Write a picture with what the file it comes from says of itself, and what was done.

    From PNG to PNG the texts of other tools stay letter by letter, and one of AUTOMATIC1111's kind is added.
    """
    from sfumato.cli.outputs import write
    from sfumato.recipes.containers import read_container
    from sfumato.recipes.embed import DIGEST
    from sfumato.recipes.read import from_texts

    try:
        container = read_container(source)
    except InputError:  # GIF and BMP; they hold no recipes, and what is damaged was refused before
        write(image, target, done, where)
        return
    recipe = from_texts(container.texts)
    if where.kind == container.format == "PNG" and recipe.tool not in ("", "sfumato"):
        line = f"Postprocess upscale by: {done['upscale']:g}, Postprocess upscaler: {done['upscaler']}"
        _write_texts(image, target, {**container.texts, "postprocessing": line})
        return
    values = {"upscaled_digest" if name == DIGEST else name: each for name, each in recipe.values.items()}
    write(image, target, {**values, **done}, where)


def _write_texts(image: Image, path: Path, texts: Mapping[str, str]) -> None:
    """Write a PNG with these texts; names that the format does not have are left out."""
    from PIL.PngImagePlugin import PngInfo

    from sfumato.checkpoints.files import write_atomically

    info = PngInfo()
    for name, text in texts.items():
        if 0 < len(name) <= MAX_KEY and all(32 <= ord(letter) < 127 for letter in name):
            info.add_text(name, text)
    write_atomically(path, lambda temporary: image.save(temporary, "PNG", pnginfo=info))
