"""`sfumato data build`: sets of captioned pictures to train on."""

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


def _stages() -> Callable[[str, int, int], None]:
    """A progress line for each stage in turn."""
    stage, show = "", progress_line("")

    def progress(what: str, done: int, of: int) -> None:
        nonlocal stage, show
        if what != stage:
            stage, show = what, progress_line(what)
        show(done, of)

    return progress
