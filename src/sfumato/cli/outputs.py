"""Where generated pictures go: folders, file names, and the files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato import images
from sfumato.checkpoints.files import disk_errors
from sfumato.errors import InputError
from sfumato.generation import Result
from sfumato.recipes import embed
from sfumato.recipes.recipe import PATHS
from sfumato.recipes.sheet import captioned
from sfumato.request import Request


@dataclass(frozen=True)
class Place:
    """Where to write: a folder, the stem of the names or None for one made of the prompt, and the format."""

    folder: Path
    stem: str | None
    suffix: str
    quality: int = embed.QUALITY

    @property
    def kind(self) -> str:
        """The format, as PIL calls it."""
        return embed.format_of(self.suffix)

    def numbered(self, index: int, count: int) -> Place:
        """The place of one of several drawings: a stem of one's own gets its number."""
        if self.stem is None:
            return self
        return replace(self, stem=f"{self.stem}-{index:0{len(str(count - 1))}}")

    def after(self, picture: Path) -> Place:
        """The place of what was drawn from a picture: its name, if that is free, where none was given."""
        if self.stem is not None:
            return self
        return replace(self, stem=images.free_path(self.folder, picture.stem, self.suffix).stem)


def place(output: Path | None) -> tuple[Path, str | None]:
    """(folder, stem or None for one of the caller's own) of a PNG file to write, after trying to.

    Raises `ResourceError` where it cannot be written, `InputError` for a name that no PNG file has.
    """
    folder, stem = Path(), None
    if output is not None and (output.is_dir() or not output.suffix):
        folder = output
    elif output is not None:
        if output.suffix.lower() not in {".png", ".npy"}:
            raise InputError(
                f"{output} is no name of a PNG file",
                f"Call it {output.with_suffix('.png').name}, or give a folder.",
            )
        folder, stem = output.parent, output.stem
    _try_to_write(folder)
    return folder, stem


def picture_place(output: Path | None, format: str | None = None, quality: int = embed.QUALITY) -> Place:
    """Where pictures go that are asked for by a file's or folder's name, or a format, or both.

    Raises `ResourceError` where that cannot be written, `InputError` for a name that no picture has.
    """
    if not 1 <= quality <= 100:
        raise InputError(f"quality is {quality}; it should be 1 to 100")
    kind = None if format is None else embed.format_of(format)
    folder, stem, suffix = output or Path(), None, f".{format or 'png'}".lower()
    if output is not None and output.suffix and not output.is_dir():
        folder, stem, suffix = output.parent, output.stem, output.suffix
        if suffix.lower() != ".npy" and suffix.lower().removeprefix(".") not in embed.FORMATS:
            raise InputError(
                f"{output} is no name of a picture",
                f"Call it {output.with_suffix('.png').name} (or .jpg, .webp), or give a folder.",
            )
        suffix = ".png" if suffix.lower() == ".npy" else suffix
        if kind not in (None, embed.format_of(suffix)):
            raise InputError(f"{output} is no {format} file", "Leave --format out, or change the name.")
    _try_to_write(folder)
    return Place(folder, stem, suffix, quality)


def _try_to_write(folder: Path) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def save(result: Result, where: Place, grid: bool = False) -> list[Path]:
    """Write every picture (a sample that is none as .npy, with a preview) and the sheet; returns their paths.

    A stem of one's own overwrites; made of prompt and seed, it never does.
    """
    paths = []
    for index, (image, values) in enumerate(zip(result.images, result.parameters, strict=True)):
        own = where.stem if where.stem is None or len(result.images) == 1 else f"{where.stem}-{index}"
        path = _path(where, own, values, "" if result.are_pictures else "-preview", where.suffix)
        write(image, path, values, where)
        paths.append(path)
        if not result.are_pictures:
            path = _path(where, own, values, "", ".npy")
            images.save_array(result.samples[index], path)
            paths.append(path)
    if grid:
        path = _path(where, where.stem, result.parameters[0], "-grid", where.suffix)
        write(images.grid(result.images), path, {**result.parameters[0], "grid": len(result.images)}, where)
        paths.append(path)
    return paths


def save_sheet(results: Sequence[Result], where: Place, prompt: str | None) -> Path:
    """Write one sheet of the pictures of several drawings, each under its prompt; returns its path.

    prompt: what they were all made of, if they were. `InputError` for pictures of different sizes.
    """
    shown = [image for result in results for image in result.images]
    if len({image.size for image in shown}) > 1:
        raise InputError("pictures of different sizes make no sheet", "Leave --grid out.")
    every = [values for result in results for values in result.parameters]
    values = {**every[0], "prompt": every[0]["prompt"] if prompt is None else prompt, "grid": len(shown)}
    path = _path(where, where.stem, values, "-grid", where.suffix)
    write(captioned(shown, [_prompt(each) or "" for each in every]), path, values, where)
    return path


def check_recipe(request: Request, where: Place) -> None:
    """`InputError` where the recipe of a request would not fit into a file there."""
    embed.check_room(request.model_dump(exclude=set(PATHS)), where.kind)


def write(image: Image.Image, path: Path, values: Mapping[str, Any], where: Place) -> None:
    """Write one picture with its recipe, and how it was packed where that loses something."""
    lossy = {} if where.kind == "PNG" else {"quality": where.quality}
    embed.save(image, path, {**values, **lossy}, where.quality)


def _prompt(values: Mapping[str, Any]) -> str | None:
    """A picture's prompt as it was drawn."""
    return values.get("drawn_prompt", values["prompt"])


def _path(where: Place, stem: str | None, values: Mapping[str, Any], ending: str, suffix: str) -> Path:
    if stem is not None:
        return where.folder / f"{stem}{ending}{suffix}"
    named = images.file_stem(_prompt(values), values["seed"])
    return images.free_path(where.folder, named + ending, suffix)
