"""Rows of DiceBear avatars: options are forced from word tables, so the captions say what is drawn."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sfumato.data.emoji import rasterise
from sfumato.data.packages import INSTALL_DATA, check_python_packages
from sfumato.data.pictures import Row, Split
from sfumato.data.split import held_out_pairs, pick
from sfumato.errors import DataError, ResourceError

HELD_OUT_PAIRS = 0.15
ATTEMPTS = 200
CC0 = "https://creativecommons.org/publicdomain/zero/1.0/"

Options = dict[str, Any]
Values = Mapping[str, str]  # attribute -> its value as a word of the table


@dataclass(frozen=True)
class Feature:
    """One named property of an avatar: word -> the style's options that draw it."""

    options: Mapping[str, Options]
    needs: tuple[str, frozenset[str]] | None = None  # drawn only if that attribute has one of these values


@dataclass(frozen=True)
class AvatarStyle:
    """A DiceBear style: its features, what never changes, its words, and the pair of features held out."""

    name: str
    features: Mapping[str, Feature]
    held_out: tuple[str, str]
    captions: Callable[[Values], list[str]]
    fixed: Options = field(default_factory=dict)

    @property
    def thing(self) -> str:
        """The style's name in the singular, which is what its avatars show."""
        return self.name.removesuffix("s")


def variants(
    component: str, words: Mapping[str, str], needs: tuple[str, frozenset[str]] | None = None
) -> Feature:
    """A component whose variant is named by a word; the variant "" is the component's absence."""

    def options(variant: str) -> Options:
        if variant == "":
            return {f"{component}Probability": 0}
        return {f"{component}Variant": [variant], f"{component}Probability": 100}

    return Feature({word: options(variant) for word, variant in words.items()}, needs)


def colours(
    component: str, words: Mapping[str, str], needs: tuple[str, frozenset[str]] | None = None
) -> Feature:
    """A colour by name: word -> "#rrggbb"."""
    return Feature({word: {f"{component}Color": [code]} for word, code in words.items()}, needs)


def definition(name: str) -> Any:
    """The JSON of a style out of dicebear-styles, which must be CC0 by its own statement."""
    check_python_packages()
    try:
        text = (
            importlib.resources.files("dicebear_styles").joinpath(f"{name}.json").read_text(encoding="utf-8")
        )
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ResourceError(f"dicebear-styles has no style {name!r}", INSTALL_DATA) from error
    style = json.loads(text)
    licence = style["meta"]["license"]
    if licence["url"] != CC0:
        raise DataError(
            f"the style {name!r} is licensed {licence['name']!r}", "Only CC0 1.0 styles are used."
        )
    return style


class Artist:
    """Draws avatars of one style."""

    def __init__(self, style: AvatarStyle) -> None:
        try:
            from dicebear import Avatar, Style
        except ModuleNotFoundError as error:
            raise ResourceError("dicebear-core is needed to draw avatars", INSTALL_DATA) from error
        self.style = style
        self._avatar = Avatar
        self._definition = Style(definition(style.name))

    def svg(self, values: Values, seed: str) -> str:
        """The SVG of an avatar with these values; what is not named follows from `seed`."""
        options: Options = {"seed": seed, "animationVariant": ["none"], **self.style.fixed}
        for name, value in values.items():
            options |= self.style.features[name].options[value]
        return str(self._avatar(self._definition, options))

    def picture(self, values: Values, seed: str, size: int) -> Image.Image:
        """The avatar as an RGBA picture of (size, size) pixels."""
        return rasterise(self.svg(values, seed), size)


def held_out_values(style: AvatarStyle) -> frozenset[tuple[str, str]]:
    """Pairs of values of the style's two held-out features that training never shows together."""
    first, second = style.held_out
    features = style.features
    return held_out_pairs(
        f"{style.name} {first} {second}", features[first].options, features[second].options, HELD_OUT_PAIRS
    )


def draw_values(style: AvatarStyle, *names: object) -> Values:
    """One value for each feature that applies, chosen by the hash of the names."""
    values: dict[str, str] = {}
    for name, feature in style.features.items():
        if feature.needs is None or values.get(feature.needs[0]) in feature.needs[1]:
            values[name] = pick(tuple(feature.options), *names, name)
    return values


def avatar_rows(style: AvatarStyle, seed: int, train: int, test: int) -> Iterator[tuple[Row, Values]]:
    """`train` and `test` rows with the values to draw; test rows show held-out pairs, training rows none."""
    held = held_out_values(style)
    first, second = style.held_out
    background: tuple[int, int, int] = (255, 255, 255)  # covered: an avatar brings its own background
    splits: tuple[tuple[Split, int], ...] = (("train", train), ("test", test if held else 0))
    for split, wanted in splits:
        for number in range(wanted):
            for attempt in range(ATTEMPTS):
                values = draw_values(style, "avatar", style.name, seed, split, number, attempt)
                if ((values[first], values[second]) in held) == (split == "test"):
                    break
            else:
                continue
            key = f"{style.name}-{split}-{number:05d}"
            row = Row(
                id=f"avatar-{key}",
                captions=style.captions(values),
                split=split,
                kind="avatar",
                background=background,
                layers=[{"picture": key, "box": (0, 0, 1, 1)}],
                attributes={"style": style.name, "object": style.thing, **values},
            )
            yield row, values
