"""`sfumato preprocess`: the picture that a control network would be shown, to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sfumato.errors import InputError


def preprocess(
    kind: Annotated[str, Parameter(help="One of those that --list shows.")] = "",
    source: Annotated[Path | None, Parameter(help="A picture: PNG, JPEG, WebP, GIF or BMP.")] = None,
    *,
    output: Annotated[Path | None, Parameter(alias="-o", help="PNG file to write, or a folder.")] = None,
    option: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            metavar="NAME=NUMBER",
            show_default=False,
            help="Options of the kind, such as low=50 high=150.",
        ),
    ] = None,
    list_: Annotated[
        bool, Parameter(name="--list", negative=(), help="List the kinds, their options and their networks.")
    ] = False,
) -> None:
    """Make a control picture, without any weights: edges, lines, tones.

    Without --output it lies beside the picture, with the kind in its name.
    """
    # These import numpy, which a help text can do without.
    from sfumato.checkpoints.files import write_atomically
    from sfumato.intake import open_picture
    from sfumato.preprocess import PREPROCESSORS
    from sfumato.preprocess import preprocess as made

    if list_:
        for name, row in PREPROCESSORS.items():
            options = " ".join(f"{key}={value:g}" for key, value in row.options.items())
            print(
                f"{name:<11} {row.title}; for {row.networks}" + (f"\n{'':<11} {options}" if options else "")
            )
        return
    if not kind or source is None:
        raise InputError("give a kind and a picture", "`sfumato preprocess --list` shows the kinds.")
    picture = made(kind, open_picture(source), _numbers(option or ()))
    name = f"{source.stem}-{kind}.png"
    path = source.parent / name if output is None else output / name if output.is_dir() else output
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} is no name of a PNG file", f"Call it {path.with_suffix('.png').name}.")
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
    print(f"{path}: {picture.width}x{picture.height}")


def _numbers(options: Sequence[str]) -> dict[str, float]:
    """The options by name; InputError for one that is no NAME=NUMBER."""
    numbers: dict[str, float] = {}
    for text in options:
        name, separator, number = text.partition("=")
        try:
            value = float(number) if separator else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{text!r} is no option", "Write NAME=NUMBER, as in low=50.")
        numbers[name] = value
    return numbers
