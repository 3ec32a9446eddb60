"""What control networks are shown, made out of pictures without any weights: one table of preprocessors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

from sfumato.errors import InputError, nearest
from sfumato.preprocess.edges import canny, lines, scribble, soft_edges
from sfumato.preprocess.tones import blur, grey, invert, palette, threshold, tile

__all__ = ["PREPROCESSORS", "Preprocessor", "preprocess"]


@dataclass(frozen=True)
class Preprocessor:
    """One way to make a control picture.

    function: takes an RGB picture, and options by name, and gives an RGB picture of the same size. title: in
    a few words. networks: the released control networks that were trained on its like.
    """

    function: Callable[..., Image.Image]
    title: str
    networks: str

    @property
    def options(self) -> dict[str, float]:
        """Its options and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


PREPROCESSORS: Mapping[str, Preprocessor] = {
    "canny": Preprocessor(canny, "thin edges, with hysteresis (Canny 1986)", "canny"),
    "soft_edges": Preprocessor(
        soft_edges, "edges at several scales, faint ones too", "softedge, hed, pidinet"
    ),
    "scribble": Preprocessor(scribble, "a few broad strokes", "scribble"),
    "lines": Preprocessor(lines, "dark lines of a drawing, bright on black", "lineart, lineart_anime"),
    "threshold": Preprocessor(threshold, "black or white", "scribble, qrcode"),
    "blur": Preprocessor(blur, "the picture without its detail", "blur"),
    "tile": Preprocessor(tile, "the picture made small and large again", "tile"),
    "palette": Preprocessor(palette, "patches of colour", "T2I-Adapter color"),
    "grey": Preprocessor(grey, "lightness, or a depth map as it is", "depth, recolor"),
    "invert": Preprocessor(invert, "negative: drawings in black on white", "lineart, scribble"),
}


def preprocess(kind: str, picture: Image.Image, options: Mapping[str, float] | None = None) -> Image.Image:
    """The control picture of a kind, RGB, of the picture's size; what is transparent lies on white.

    kind: a name in PREPROCESSORS. Raises InputError for an unknown kind or option, or a value that is not
    allowed.
    """
    if kind not in PREPROCESSORS:
        raise InputError(f"there is no preprocessor {kind!r}", nearest(kind, PREPROCESSORS))
    row, given = PREPROCESSORS[kind], dict(options or {})
    for name in given:
        if name not in row.options:
            allowed = nearest(name, row.options) if row.options else "It has none."
            raise InputError(f"the preprocessor {kind} has no option {name!r}", allowed)
    return row.function(_on_white(picture), **given)


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    whole = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
