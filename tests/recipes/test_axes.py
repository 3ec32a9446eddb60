"""Axes of grids, the requests of their cells, and the sheets they are shown on."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import InputError
from sfumato.recipes.axes import Axis, cells, read_axis
from sfumato.recipes.sheet import GAP, Labels, captioned, check_size, labelled, wrapped
from sfumato.request import Request


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("guidance=4,7, 10", Axis("guidance", ("4", "7", "10"))),
        ("sampler=euler,DPM++ 2M Karras", Axis("sampler", ("euler", "DPM++ 2M Karras"))),
        ("negative-prompt=,dark", Axis("negative_prompt", ("", "dark"))),
        ("steps=10..30/3", Axis("steps", ("10", "20", "30"))),
        ("steps=1..4/3", Axis("steps", ("1", "2", "4"))),  # 2.5 to the even number
        ("seed=3..1", Axis("seed", ("3", "2", "1"))),
        ("seed=7..7", Axis("seed", ("7",))),
        ("guidance=1..2/5,9", Axis("guidance", ("1", "1.25", "1.5", "1.75", "2", "9"))),
        ("rescale=0..0.7/3", Axis("rescale", ("0", "0.35", "0.7"))),
        ('sigmas="10,1,0","5,0"', Axis("sigmas", ("10,1,0", "5,0"))),
        ("prompt:apple=pear,fox", Axis("prompt", ("pear", "fox"), "apple")),
        ("prompt:a: b=c", Axis("prompt", ("c",), "a: b")),
        ("sampler_options.s_churn=0,10", Axis("sampler_options", ("0", "10"), "s_churn")),
    ],
)
def test_an_axis(text: str, expected: Axis) -> None:
    assert read_axis(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidance", "'guidance' is no axis"),
        ("guidance=", "is no axis"),
        ("giudance=1", "there is no field 'giudance'"),
        ("num_images=1,2", "num_images is no axis"),
        ("steps=1..5000", "has 5,000 values"),
        ("guidance=1..2/0", "has 0 values"),
        ("width:a=1", "there is no field"),
    ],
)
def test_axes_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_axis(text)


def test_cells() -> None:
    base = Request(prompt="a red apple", steps=5)
    axes = [
        read_axis("prompt:apple=pear,fox"),
        read_axis("sampler_options.s_churn=0,2"),
        read_axis("seed=1..2"),
    ]
    found = list(cells(base, axes))
    assert [values for values, _ in found][:3] == [("pear", "0", "1"), ("pear", "0", "2"), ("pear", "2", "1")]
    assert len(found) == 8
    assert found[-1][1] == Request(prompt="a red fox", steps=5, seed=2, sampler_options={"s_churn": 2})


def test_a_word_is_replaced_in_the_prompt_of_the_other_axis() -> None:
    axes = [read_axis("prompt:apple=pear"), read_axis('prompt="an apple","two apples"')]
    assert [request.prompt for _, request in cells(Request(), axes)] == ["an pear", "two pears"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["steps=5,0"], "axis steps: steps is 0"),
        (["sampler=euler,nobody"], "axis sampler: there is no sampler 'nobody'"),
        (["prompt:pear=fox"], "axis prompt: pear: 'pear' is not in the prompt 'a red apple'"),
        (["seed=1,2", "seed=3,4"], "two axes are of seed"),
        (["seed=1..999", "steps=1..999"], "998,001 cells"),
    ],
)
def test_cells_that_are_refused(axes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(cells(Request(prompt="a red apple"), [read_axis(axis) for axis in axes]))


def test_options_of_an_axis_keep_the_others() -> None:
    base = Request(sampler="euler", sampler_options={"s_noise": 1.1})
    ((_, request),) = cells(base, [read_axis("sampler_options.s_churn=3")])
    assert request.sampler_options == {"s_noise": 1.1, "s_churn": 3}


# Sheets


def tiles(count: int, size: tuple[int, int] = (128, 128)) -> list[Image.Image]:
    return [Image.new("RGB", size, (10 + i, 0, 200)) for i in range(count)]


def placed(sheet: Image.Image, tile: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the area in which the sheet has the tile's colour."""
    same = (np.array(sheet) == np.array(tile.getpixel((0, 0)))).all(axis=2)
    rows, columns = np.flatnonzero(same.any(axis=1)), np.flatnonzero(same.any(axis=0))
    assert same.sum() == len(rows) * len(columns), "one whole rectangle"
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def test_every_picture_stands_whole_in_its_row_and_column() -> None:
    pictures = tiles(12)
    shape = (Labels("sampler", ("a", "b", "c")), Labels("guidance", ("4", "7")), Labels("seed", ("1", "2")))
    sheet = labelled(pictures, *shape, title="a fox")
    assert sheet.size == check_size((128, 128), *shape, title="a fox")
    boxes = [placed(sheet, picture) for picture in pictures]
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == (128, 128)
        assert left > 24 and right <= sheet.width - 24 and bottom <= sheet.height - 24
    assert boxes[1][0] - boxes[0][0] == 128 + GAP and boxes[3][1] - boxes[0][1] == 128 + GAP
    assert boxes[6][1] > boxes[3][3] + 40, "room for the second panel's labels"
    ink = np.array(sheet.convert("L")) < 128
    left, top, *_ = boxes[0]
    assert ink[:top].any() and ink[top : boxes[3][3], : left - GAP].any(), "titles above, labels beside"
    assert not ink[:, :20].any() and not ink[:20].any(), "nothing in the margin"


def test_small_pictures_are_shown_at_a_whole_multiple() -> None:
    sheet = labelled(tiles(2, (40, 30)), Labels("x", ("1", "2")), Labels())
    left, top, right, bottom = placed(sheet, tiles(1)[0])
    assert (right - left, bottom - top) == (160, 120)


def test_long_labels_stay_in_their_cells() -> None:
    long = "a very long prompt of many words that goes on and on " * 3
    pictures = tiles(4)
    sheet = labelled(pictures, Labels("prompt", (long, "W" * 90)), Labels("negative", (long, "")), title=long)
    ink = np.array(sheet.convert("L")) < 128
    boxes = [placed(sheet, picture) for picture in pictures]
    assert not ink[boxes[0][1] - 40 : boxes[0][1], boxes[0][2] + 1 : boxes[1][0] - 1].any()
    assert sheet.width < 600 and not ink[:, -20:].any()


def test_wrapping() -> None:
    assert wrapped("", 16, 100) == []
    assert wrapped("fox", 16, 100) == ["fox"]
    lines = wrapped("a fox in a snowy forest at night under stars", 16, 80)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert wrapped("x" * 5000, 16, 80)[0].endswith("x...")


def test_captioned_sheets() -> None:
    pictures = tiles(3)
    sheet = captioned(pictures, ["a fox", "a fox, in snow, at night, in a storm", ""])
    boxes = [placed(sheet, picture) for picture in pictures]
    assert boxes[0][1] == boxes[1][1] and boxes[2][0] == boxes[0][0] and boxes[2][1] > boxes[0][3]


def test_sheets_that_would_be_too_large() -> None:
    with pytest.raises(InputError, match="the sheet would have"):
        check_size((2000, 2000), Labels("x", tuple("abcdefghijklmnop")), Labels("y", tuple("abcdefghi")))
