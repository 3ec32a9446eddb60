"""Where generated pictures go: folders, file names, and the files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sfumato import images
from sfumato.checkpoints.files import disk_errors
from sfumato.errors import InputError
from sfumato.generation import Result


def place(output: Path | None) -> tuple[Path, str | None]:
    """(folder, stem or None for one made of the prompt) to write to, after trying whether it can be written.

    Raises `ResourceError` where it cannot, `InputError` for a name that no PNG file has.
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
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder, stem


def save(result: Result, folder: Path, stem: str | None, grid: bool) -> list[Path]:
    """Write every picture (a sample that is none as .npy, with a preview) and the sheet; returns their paths.

    A stem of one's own overwrites; made of prompt and seed, it never does.
    """
    paths = []
    for index, (image, values) in enumerate(zip(result.images, result.parameters, strict=True)):
        own = stem if stem is None or len(result.images) == 1 else f"{stem}-{index}"
        path = _path(folder, own, values, "" if result.are_pictures else "-preview", ".png")
        images.save_png(image, path, values)
        paths.append(path)
        if not result.are_pictures:
            path = _path(folder, own, values, "", ".npy")
            images.save_array(result.samples[index], path)
            paths.append(path)
    if grid:
        path = _path(folder, stem, result.parameters[0], "-grid", ".png")
        images.save_png(
            images.grid(result.images), path, {**result.parameters[0], "grid": len(result.images)}
        )
        paths.append(path)
    return paths


def _path(folder: Path, stem: str | None, values: dict[str, Any], ending: str, suffix: str) -> Path:
    if stem is not None:
        return folder / f"{stem}{ending}{suffix}"
    return images.free_path(folder, images.file_stem(values["prompt"], values["seed"]) + ending, suffix)
