"""DiceBear avatars: the word tables fit the styles, captions read well, held-out pairs stay held out."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from sfumato.data.avatar_styles import CRITTERS
from sfumato.data.avatar_styles_full import FULL_STYLES
from sfumato.data.avatars import Artist, AvatarStyle, avatar_rows, definition, held_out_values
from sfumato.errors import DataError, ResourceError

BAD_GRAMMAR = re.compile(
    r"  |\ba [aeio]|\ba un[^i]|\ban [^aeiouhx]|,,| ,|^[ ,]|[ ,]$|\bwith (,|on|in)\b|\band (,|$)|[{}]|None"
)
each_style = pytest.mark.parametrize("style", FULL_STYLES, ids=lambda style: style.name)


@each_style
def test_tables_name_what_the_style_has(style: AvatarStyle) -> None:
    source = definition(style.name)
    options = [option for feature in style.features.values() for option in feature.options.values()]
    for values in [*options, style.fixed]:
        for name, value in values.items():
            component = re.sub(r"(Variant|Probability|Color)$", "", name)
            if name.endswith("Variant"):
                assert set(value) <= set(source["components"][component]["variants"]), name
            elif name.endswith("Probability"):
                assert component in source["components"], name
            else:
                assert component in {*source["colors"], "background"}, name
                assert all(re.fullmatch("#[0-9a-f]{6}", code) for code in value)


@each_style
def test_rows_hold_out_pairs_and_read_well(style: AvatarStyle) -> None:
    rows = [row for row, _ in avatar_rows(style, seed=0, train=300, test=30)]
    held = held_out_values(style)
    assert held
    first, second = style.held_out
    for row in rows:
        pair = (row["attributes"][first], row["attributes"][second])
        assert (pair in held) == (row["split"] == "test")
        assert len(set(row["captions"])) == len(row["captions"])
        for caption in row["captions"]:
            assert not BAD_GRAMMAR.search(caption), caption
            assert len(caption.split()) <= 20
    train = [row for row in rows if row["split"] == "train"]
    for name in style.held_out:
        seen = {row["attributes"][name] for row in train}
        assert seen == set(style.features[name].options)
    assert len(train) == 300 and len(rows) == 330


def test_rows_are_a_function_of_the_seed() -> None:
    def values(seed: int) -> list[object]:
        return [drawn for _, drawn in avatar_rows(CRITTERS, seed=seed, train=20, test=5)]

    assert values(3) == values(3)
    assert values(3) != values(4)


def test_an_avatar_is_drawn_as_captioned() -> None:
    artist = Artist(CRITTERS)
    values = {
        "shape": "square",
        "body": "green",
        "top": "",
        "eyes": "one eye",
        "mouth": "a smile",
        "background": "red",
    }
    picture = artist.picture(values, "seed", 32)
    pixels = np.asarray(picture).astype(int)
    assert picture.mode == "RGBA" and picture.size == (32, 32)
    assert (pixels[..., 3] == 255).all()
    assert np.abs(pixels[1, 1, :3] - [0xB3, 0x20, 0x2C]).max() <= 2
    green = pixels[26, 16, :3]
    assert green[1] > green[0] + 30 and green[1] > green[2] + 30
    assert picture.tobytes() == artist.picture(values, "seed", 32).tobytes()


def test_styles_that_are_not_cc0_are_refused() -> None:
    with pytest.raises(DataError, match="CC0"):
        definition("adventurer")
    with pytest.raises(ResourceError, match="no style 'nothing'"):
        definition("nothing")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dicebear", None)
    with pytest.raises(ResourceError, match="dicebear-core") as caught:
        Artist(CRITTERS)
    assert "sfumato[data]" in caught.value.hint
