"""Emoji art: which drawing of a style shows which code point, and its picture with transparency."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from sfumato.data.packages import ART, INSTALL_DATA, LABELS, obtain
from sfumato.errors import ResourceError

# The two Fluent styles share their drawings and differ in shading: one family when drawings are held out.
FAMILIES = {"fluent": "fluent", "flat": "fluent", "noto": "noto", "blob": "blob", "twemoji": "twemoji"}
STYLES = tuple(FAMILIES)
MARGIN = 3 / 64  # on each side of a drawing


@dataclass(frozen=True)
class Label:
    """One object of Unicode CLDR: its code points ("1F98A"), short name ("fox") and group number."""

    code: str
    label: str
    group: int


class IconSet:
    """The drawings of one style, found by code point or by name."""

    def __init__(self, icons: Mapping[str, Any], codes: Mapping[str, str]) -> None:
        self.icons = icons["icons"]
        self.aliases = icons.get("aliases", {})
        self.side = (icons.get("width", 16), icons.get("height", 16))
        self.codes = {normal(code): name for code, name in codes.items()}

    def find(self, name: str) -> str | None:
        """The SVG of the drawing called `name`, square and with a margin; None if the style has none."""
        alias = self.aliases.get(name, {})
        if set(alias) - {"parent", "hFlip", "hidden"}:
            return None
        icon = self.icons.get(alias.get("parent", name))
        if icon is None:
            return None
        width, height = icon.get("width", self.side[0]), icon.get("height", self.side[1])
        side = max(width, height) / (1 - 2 * MARGIN)
        box = f"{(width - side) / 2:.4f} {(height - side) / 2:.4f} {side:.4f} {side:.4f}"
        body = icon["body"]
        if alias.get("hFlip"):
            body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{side:.4f}" height="{side:.4f}" viewBox="{box}">{body}</svg>'
        )


def normal(code: str) -> str:
    """Code points in capitals without leading zeros and without the emoji presentation selector."""
    parts = (part.lstrip("0") for part in code.upper().split("-"))
    return "-".join(part for part in parts if part != "FE0F")


def slug(label: str) -> str:
    """ "snow-capped mountain" -> "snow-capped-mountain", the form of icon names."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "")).strip("-")


def read_labels(npm_dir: Path) -> list[Label]:
    """Every CLDR object with a group (no components), in the order of the data file; names without tones."""
    entries = obtain(LABELS, npm_dir).json("package/en/data.json")
    return [
        Label(normal(entry["hexcode"]), entry["label"], entry["group"])
        for entry in entries
        if "group" in entry
    ]


class Art:
    """All chosen styles: `svg(label, style)` is the drawing of an object in a style."""

    def __init__(self, sets: Mapping[str, IconSet]) -> None:
        self.sets = dict(sets)

    def svg(self, label: Label, style: str) -> str | None:
        """The SVG text, or None where the style has no drawing of it.

        Fluent has no code points, its names are those of the flat set; blob has none either and is matched
        exactly by the CLDR name or by Noto's name.
        """
        icons = self.sets[style]
        if style == "fluent":
            names = [self.sets["flat"].codes.get(label.code)]
        elif style == "blob":
            names = [slug(label.label), self.sets["noto"].codes.get(label.code)]
        else:
            names = [icons.codes.get(label.code)]
        return next((svg for name in names if name and (svg := icons.find(name))), None)


def read_art(styles: tuple[str, ...], npm_dir: Path) -> Art:
    """The icon sets of `styles`, with those whose names they need."""
    needed = (
        set(styles) | ({"flat"} if "fluent" in styles else set()) | ({"noto"} if "blob" in styles else set())
    )
    sets = {}
    for style in (style for style in STYLES if style in needed):
        tarball = obtain(ART[style], npm_dir)
        codes = tarball.json("package/chars.json") if style in ("flat", "noto", "twemoji") else {}
        sets[style] = IconSet(tarball.json("package/icons.json"), codes)
    return Art(sets)


def rasterise(svg: str, size: int) -> Image.Image:
    """The RGBA picture of (size, size) pixels of a square SVG, drawn at twice the size and reduced."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise ResourceError("resvg_py is needed to draw the pictures", INSTALL_DATA) from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png)), formats=["PNG"]) as opened:
        return ImageOps.contain(opened.convert("RGBA"), (size, size), Image.Resampling.LANCZOS)
