"""Rows of composed scenes: one thing in a place, a few of them, or two different ones in relation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sfumato.data.drawings import Drawings, background_is_held_out
from sfumato.data.objects import Thing
from sfumato.data.pictures import Layer, Row, Split
from sfumato.data.split import is_held_out, pick
from sfumato.data.words import BACKGROUNDS, NUMBERS, sentence, with_article

HELD_OUT_PAIRS = 0.20
ATTEMPTS = 200

Box = tuple[float, float, float, float]
SIZES = {"small": 0.42, "big": 0.66}
EDGE = 0.03
PLACES: dict[str, tuple[float, float, str]] = {
    "left": (0, 0.5, "on the left"),
    "right": (1, 0.5, "on the right"),
    "top": (0.5, 0, "at the top"),
    "bottom": (0.5, 1, "at the bottom"),
    "center": (0.5, 0.5, "in the middle"),
}
COUNTS: dict[int, tuple[Box, ...]] = {
    2: ((0.02, 0.26, 0.48, 0.48), (0.50, 0.26, 0.48, 0.48)),
    3: ((0.27, 0.04, 0.46, 0.46), (0.03, 0.50, 0.46, 0.46), (0.51, 0.50, 0.46, 0.46)),
    4: (
        (0.04, 0.04, 0.45, 0.45),
        (0.51, 0.04, 0.45, 0.45),
        (0.04, 0.51, 0.45, 0.45),
        (0.51, 0.51, 0.45, 0.45),
    ),
}
# relation -> (its words, the same seen from the other thing, box of the first, box of the second)
RELATIONS: dict[str, tuple[str, str, Box, Box]] = {
    "left": ("to the left of", "to the right of", (0.02, 0.27, 0.46, 0.46), (0.52, 0.27, 0.46, 0.46)),
    "right": ("to the right of", "to the left of", (0.52, 0.27, 0.46, 0.46), (0.02, 0.27, 0.46, 0.46)),
    "above": ("above", "below", (0.27, 0.02, 0.46, 0.46), (0.27, 0.52, 0.46, 0.46)),
    "below": ("below", "above", (0.27, 0.52, 0.46, 0.46), (0.27, 0.02, 0.46, 0.46)),
}


@dataclass(frozen=True)
class Setting:
    """What every scene has: the things in it, one style for all, and a background colour."""

    things: tuple[Thing, ...]
    style: str
    colour: str

    @property
    def ground(self) -> str:
        """ "on a blue background"; "" for white, which is what a prompt without a background means."""
        return "" if self.colour == "white" else f"on {with_article(self.colour)} background"

    def told(self, *parts: str, comma: bool = False) -> str:
        """The parts and the background, set off by a comma if asked for or where there are several parts."""
        comma = comma or len(parts) > 1
        return sentence(", ".join(parts), "," if comma and self.ground else "", self.ground)


def pair_is_held_out(first: Thing, second: Thing) -> bool:
    """Whether training must not show these two things together, in any order."""
    return is_held_out(HELD_OUT_PAIRS, "pair", *sorted((first.label.code, second.label.code)))


def split_of(setting: Setting) -> Split | None:
    """ "train" where nothing is held out, "test" where exactly one thing is held out, None otherwise."""
    held = sum(background_is_held_out(thing, setting.colour) for thing in setting.things)
    if len(setting.things) == 1:
        return "test" if held else "train"
    together = pair_is_held_out(*setting.things)
    return None if held else "test" if together else "train"


def scene_rows(drawings: Drawings, styles: Sequence[str], seed: int, train: int, test: int) -> Iterator[Row]:
    """`train` and `test` rows of each of the three forms; only drawings that training shows are used.

    `styles` are those that scenes may be drawn in. Fewer rows come where the objects do not give as many
    different scenes.
    """
    splits: tuple[tuple[Split, int], ...] = (("train", train), ("test", test))
    for form in FORMS:
        for split, wanted in splits:
            seen: set[str] = set()
            for number in range(wanted):
                row = next_row(drawings, styles, form, split, seed, number, seen)
                if row is not None:
                    seen.add(row["id"])
                    yield row


def next_row(
    drawings: Drawings, styles: Sequence[str], form: str, split: Split, seed: int, number: int, seen: set[str]
) -> Row | None:
    """The first of a row's own sequence of attempts that is in `split` and new; None if there is none."""
    for attempt in range(ATTEMPTS):
        names = ("scene", seed, form, split, number, attempt)
        setting = draw_setting(drawings, styles, form, *names)
        if setting is None or split_of(setting) != split:
            continue
        row = FORMS[form](setting, drawings, names)
        if row["id"] not in seen:
            row["split"] = split
            return row
    return None


def draw_setting(drawings: Drawings, styles: Sequence[str], form: str, *names: object) -> Setting | None:
    """One or two different things, a style in which training shows all of them, and a colour."""
    first = pick(drawings.things, *names, "first")
    things: tuple[Thing, ...] = (first,)
    if form == "count" and first.plural is None:
        return None
    if form == "pair":
        second = pick(drawings.things, *names, "second")
        if second is first:
            return None
        things = (first, second)
    shared = [
        style
        for style in styles
        if all(
            style in drawings.styles(thing) and drawings.split(thing, style) == "train" for thing in things
        )
    ]
    if not shared:
        return None
    return Setting(things, pick(shared, *names, "style"), pick(tuple(BACKGROUNDS), *names, "colour"))


def styled(thing: Thing, style: str, size: str = "") -> str:
    """ "a small noto drawing of a fox"."""
    return f"{with_article(sentence(size, style, 'drawing'))} of {thing.phrase}"


def sized(thing: Thing, size: str) -> str:
    """ "a small fox", "small grapes", "the small sun"."""
    article, _, rest = thing.phrase.partition(" ")
    if article in ("a", "an"):
        return f"a {size} {rest}"
    return f"the {size} {rest}" if article == "the" else f"{size} {thing.phrase}"


def single(setting: Setting, drawings: Drawings, names: Sequence[object]) -> Row:
    """One thing, small or big, in one of five places."""
    size, place = pick(tuple(SIZES), *names, "size"), pick(tuple(PLACES), *names, "place")
    across, down, words = PLACES[place]
    side, thing = SIZES[size], setting.things[0]
    room = 1 - side - 2 * EDGE
    box = (round(EDGE + across * room, 4), round(EDGE + down * room, 4), side, side)
    texts = [
        setting.told(f"{sized(thing, size)} {words}", comma=True),
        setting.told(f"{styled(thing, setting.style, size)} {words}", comma=True),
    ]
    if place == "center":
        texts.append(sentence(sized(thing, size), setting.ground))
    return scene(setting, drawings, texts, (box,), {"form": "single", "size": size, "position": place})


def count(setting: Setting, drawings: Drawings, names: Sequence[object]) -> Row:
    """Two, three or four of the same drawing."""
    number = pick(tuple(COUNTS), *names, "number")
    thing = setting.things[0]
    texts = [
        setting.told(f"{NUMBERS[number]} {thing.plural}"),
        setting.told(f"{NUMBERS[number]} {thing.plural}", f"{setting.style} style"),
    ]
    return scene(setting, drawings, texts, COUNTS[number], {"form": "count", "count": number})


def pair(setting: Setting, drawings: Drawings, names: Sequence[object]) -> Row:
    """Two different things, side by side or one above the other."""
    relation = pick(tuple(RELATIONS), *names, "relation")
    words, reverse, *boxes = RELATIONS[relation]
    first, second = setting.things
    texts = [
        setting.told(f"{first.phrase} {words} {second.phrase}"),
        setting.told(f"{second.phrase} {reverse} {first.phrase}"),
        setting.told(f"{first.phrase} {words} {second.phrase}", f"{setting.style} style"),
    ]
    extra = {"form": "pair", "relation": relation, "second": second.name}
    return scene(setting, drawings, texts, boxes, extra)


def scene(
    setting: Setting, drawings: Drawings, texts: list[str], boxes: Sequence[Box], extra: Mapping[str, object]
) -> Row:
    """The row of a scene; its id tells all that is in it, so equal scenes have equal ids."""
    things = setting.things if len(setting.things) == len(boxes) else setting.things * len(boxes)
    keys = [drawings.keys[thing.label.code, setting.style] for thing in things]
    layers: list[Layer] = [{"picture": key, "box": box} for key, box in zip(keys, boxes, strict=True)]
    codes = [thing.label.code.lower() for thing in setting.things]
    told = [str(extra[name]) for name in ("form", "size", "position", "count", "relation") if name in extra]
    return Row(
        id="-".join(["scene", *told, *codes, setting.style, setting.colour]),
        captions=texts,
        split="train",
        kind="scene",
        background=BACKGROUNDS[setting.colour],
        layers=layers,
        attributes={
            "object": setting.things[0].name,
            "style": setting.style,
            "background": setting.colour,
            "code": setting.things[0].label.code,
            **extra,
        },
    )


FORMS: dict[str, Callable[[Setting, Drawings, Sequence[object]], Row]] = {
    "single": single,
    "count": count,
    "pair": pair,
}
