"""Rows of single drawings: an object in a style on a plain background; some drawings are held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sfumato.data.emoji import FAMILIES
from sfumato.data.objects import Thing, held_out_family
from sfumato.data.pictures import Row, Split
from sfumato.data.split import is_held_out, unit
from sfumato.data.words import BACKGROUNDS, COLOURS, sentence

HELD_OUT_BACKGROUNDS = 0.10
WHITE_ROWS = 4  # white is what a prompt without a background means
COLOUR_ROWS = 4


@dataclass(frozen=True)
class Drawings:
    """The drawings that exist: keys of pictures by (code point, style), and which of them are held out."""

    things: tuple[Thing, ...]
    keys: Mapping[tuple[str, str], str]

    @classmethod
    def of(cls, things: Iterable[Thing], pictures: Mapping[tuple[str, str], tuple[str, bytes]]) -> Drawings:
        """Those of `things` that at least one of the encoded pictures shows."""
        keys = {place: key for place, (key, _) in pictures.items()}
        drawn = {code for code, _ in keys}
        return cls(tuple(thing for thing in things if thing.label.code in drawn), keys)

    def styles(self, thing: Thing) -> list[str]:
        """Styles that draw `thing`, in the order of the style table."""
        return [style for style in FAMILIES if (thing.label.code, style) in self.keys]

    def split(self, thing: Thing, style: str) -> Split:
        """Where the drawing of `thing` in `style` belongs."""
        held = held_out_family(thing.label.code, self.styles(thing))
        return "test" if FAMILIES[style] == held else "train"


def background_is_held_out(thing: Thing, colour: str) -> bool:
    """Whether training must not show `thing` on a background of `colour`; white is never held out."""
    return colour != "white" and is_held_out(HELD_OUT_BACKGROUNDS, "background", thing.label.code, colour)


def training_colours(thing: Thing) -> list[str]:
    """The background colours, without white, on which training may show `thing`."""
    return [colour for colour in COLOURS if not background_is_held_out(thing, colour)] or [COLOURS[0]]


def captions(thing: Thing, style: str, colour: str) -> list[str]:
    """The canonical caption, then variants; a background is named unless it is white."""
    on = "" if colour == "white" else f"on {'an' if colour == 'orange' else 'a'} {colour} background"
    return [
        sentence(f"a {style} drawing of {thing.phrase}", on),
        sentence(f"{thing.phrase}, {style} style", f", {on}" if on else ""),
        sentence(thing.phrase, on),
    ]


def drawing_rows(drawings: Drawings, seed: int) -> Iterator[Row]:
    """Every drawing: in training four rows on white and four on colours, in the test each background once."""
    for thing in drawings.things:
        for style in drawings.styles(thing):
            split = drawings.split(thing, style)
            order = sorted(
                training_colours(thing), key=lambda colour: unit(seed, thing.label.code, style, colour)
            )
            colours = ["white"] * WHITE_ROWS + order[:COLOUR_ROWS] if split == "train" else ["white", *order]
            for number, colour in enumerate(colours):
                yield Row(
                    id=f"drawing-{thing.label.code.lower()}-{style}-{number}-{colour}",
                    captions=captions(thing, style, colour),
                    split=split,
                    kind="drawing",
                    background=BACKGROUNDS[colour],
                    layers=[{"picture": drawings.keys[thing.label.code, style], "box": (0, 0, 1, 1)}],
                    attributes={
                        "object": thing.name,
                        "style": style,
                        "background": colour,
                        "code": thing.label.code,
                    },
                )
