"""`sfumato data`: builds sets of captioned pictures to train on, and looks through one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sfumato.cli.progress import progress_line

Out = Annotated[Path, Parameter(help="Folder to write to.")]
Size = Annotated[int, Parameter(help="Side of the pictures in pixels.")]
Seed = Annotated[int, Parameter(help="Seed of everything that is drawn by chance.")]


def illustrations(
    *,
    out: Out,
    size: Size = 64,
    domain: Annotated[str, Parameter(help="small (120 objects) or full.")] = "small",
    styles: Annotated[
        list[str] | None, Parameter(help="Drawing style; may be repeated. Default: all.")
    ] = None,
    npm_dir: Annotated[
        Path | None, Parameter(help="Folder with the packages' tarballs; missing ones are fetched into it.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Drawings in several styles, avatars and composed scenes."""
    from sfumato.data.illustrations import build

    build(out, size=size, domain=domain, styles=styles, npm_dir=npm_dir, seed=seed, progress=_stages())
    print(out)


def shapes(
    *,
    out: Out,
    size: Size = 64,
    copies: Annotated[int, Parameter(help="How often each of the 120 captions is drawn.")] = 10,
    seed: Seed = 0,
) -> None:
    """Coloured shapes, made without any download."""
    from sfumato.data.shapes import write_shapes

    write_shapes(out, size=size, copies=copies, seed=seed)
    print(out)


def check(
    folder: Annotated[Path, Parameter(help="Folder of pictures, tars, tables or Parquet files.")],
    /,
    *,
    size: Annotated[
        int | None, Parameter(help="Also show which buckets the pictures go to at this data.size.")
    ] = None,
    extension: Annotated[str, Parameter(help="Of caption files.")] = ".txt",
    conditions: Annotated[Path | None, Parameter(help="Folder of control pictures, named alike.")] = None,
    masks: Annotated[Path | None, Parameter(help="Folder of masks, named alike.")] = None,
    workers: Annotated[int, Parameter(help="Threads that decode.")] = 2,
    json: Annotated[bool, Parameter(negative=(), show_default=False, help="Print JSON.")] = False,
) -> int:
    """Decode every picture and name each that is unusable or odd; the exit code is 4 if any is unusable."""
    from sfumato.errors import DataError
    from sfumato.training.data.records import Reading
    from sfumato.training.data.report import as_json, as_text  # these import torch
    from sfumato.training.data.scan import scan

    reading = Reading(extension=extension, conditions=conditions, masks=masks)
    found = scan(folder, reading, workers, progress_line("pictures"))
    print(as_json(found, size) if json else as_text(found, size))
    return DataError.exit_status if found.unusable else 0


def _stages() -> Callable[[str, int, int], None]:
    """A progress line for each stage in turn."""
    stage, show = "", progress_line("")

    def progress(what: str, done: int, of: int) -> None:
        nonlocal stage, show
        if what != stage:
            stage, show = what, progress_line(what)
        show(done, of)

    return progress
