"""Edges against scipy's filters and a plain reference of Canny's steps, on drawn pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from sfumato.errors import InputError
from sfumato.preprocess.edges import canny, lines, scribble, soft_edges
from sfumato.preprocess.filters import gaussian, sobel, widened

Array = NDArray[Any]


def drawn(size: tuple[int, int] = (80, 60)) -> Image.Image:
    """A disc, a slanted box and a line on a grey ground."""
    picture = Image.new("RGB", size, (90, 100, 110))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((8, 10, 36, 40), fill=(220, 60, 40))
    pen.polygon([(45, 8), (74, 16), (66, 46), (40, 38)], fill=(30, 40, 200))
    pen.line((4, 55, 76, 50), fill=(240, 240, 240), width=2)
    return picture


def noisy() -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (31, 42, 3), dtype=np.uint8)
    return Image.fromarray(values).filter(ImageFilter.GaussianBlur(1.5))


def ramp() -> Image.Image:
    return Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (20, 1))).convert("RGB")


PICTURES = {"drawn": drawn(), "noisy": noisy(), "ramp": ramp(), "point": Image.new("RGB", (1, 1), "white")}


def reference_canny(picture: Image.Image, low: float, high: float) -> Array:
    """Canny's edges by the textbook, a pixel at a time, with scipy's derivatives and components."""
    pixels = np.asarray(picture, dtype=np.int64)
    dx = np.stack([ndimage.sobel(pixels[..., c], axis=1, mode="nearest") for c in range(3)], axis=-1)
    dy = np.stack([ndimage.sobel(pixels[..., c], axis=0, mode="nearest") for c in range(3)], axis=-1)
    height, width = pixels.shape[:2]
    size, angle = np.zeros((height, width)), np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            sums = [abs(dx[y, x, c]) + abs(dy[y, x, c]) for c in range(3)]
            best = sums.index(max(sums))
            size[y, x] = sums[best]
            angle[y, x] = np.degrees(np.arctan2(dy[y, x, best], dx[y, x, best])) % 180

    def at(y: int, x: int) -> float:
        return size[y, x] if 0 <= y < height and 0 <= x < width else 0.0

    thin = np.zeros((height, width), dtype=bool)
    for y in range(height):
        for x in range(width):
            here, turn = size[y, x], angle[y, x]
            if turn < 22.5 or turn > 157.5:
                thin[y, x] = here > at(y, x - 1) and here >= at(y, x + 1)
            elif 67.5 <= turn <= 112.5:
                thin[y, x] = here > at(y - 1, x) and here >= at(y + 1, x)
            elif turn < 67.5:
                thin[y, x] = here > at(y - 1, x - 1) and here > at(y + 1, x + 1)
            else:
                thin[y, x] = here > at(y - 1, x + 1) and here > at(y + 1, x - 1)
    weak = thin & (size > low)
    labels, _ = ndimage.label(weak, structure=np.ones((3, 3)))  # type: ignore[misc]
    begun = np.unique(labels[weak & (size > high)])
    return np.isin(labels, begun[begun > 0])


def marked(picture: Image.Image) -> Array:
    values = np.asarray(picture)
    assert set(np.unique(values)) <= {0, 255}
    assert (values == values[..., :1]).all()
    return values[..., 0] > 0


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(("low", "high"), [(100, 200), (10, 300), (30, 31), (0, 0), (400, 900)])
def test_canny_is_the_textbooks(name: str, low: float, high: float) -> None:
    found, expected = (
        marked(canny(PICTURES[name], low=low, high=high)),
        reference_canny(PICTURES[name], low, high),
    )
    assert np.array_equal(found, expected)


def test_hysteresis_keeps_faint_ends_of_strong_edges_and_nothing_else() -> None:
    values = np.zeros((40, 60), dtype=np.uint8)
    values[:, 20:] = np.linspace(20, 120, 40, dtype=np.uint8)[:, None]  # an edge that fades upwards
    values[:, 50:] += 20  # a faint one that is strong nowhere
    picture = Image.fromarray(values).convert("RGB")
    edges = marked(canny(picture, low=60, high=300))
    assert edges[2:, 17:23].any(axis=1).all()
    assert not edges[:, 45:].any()
    assert not marked(canny(picture, low=300, high=300))[:10].any()


def test_an_edge_is_one_pixel_wide() -> None:
    values = np.zeros((30, 30, 3), dtype=np.uint8)
    values[:, 15:] = 255
    edges = marked(canny(Image.fromarray(values)))
    assert (edges.sum(axis=1) == 1).all()


def test_colours_of_equal_lightness_have_edges() -> None:
    values = np.zeros((20, 20, 3), dtype=np.uint8)
    values[:, :10] = (200, 0, 0)
    values[:, 10:] = (0, 102, 0)
    assert marked(canny(Image.fromarray(values))).any()


def test_the_filters_are_those_of_scipy() -> None:
    values = np.random.default_rng(0).random((23, 31)).astype(np.float32)
    for sigma in (0.5, 1.7, 9.0):
        expected = ndimage.gaussian_filter(values, sigma, mode="reflect", radius=int(np.ceil(4 * sigma)))
        assert np.abs(gaussian(values, sigma) - expected).max() <= 1e-5
    for found, axis in zip(sobel(values), (1, 0), strict=True):
        assert np.abs(found - ndimage.sobel(values, axis=axis, mode="nearest")).max() <= 1e-5
    assert gaussian(values, 0) is values


def test_widened_is_a_disc() -> None:
    point = np.zeros((15, 15), dtype=bool)
    point[7, 7] = True
    disc = widened(point, 3)
    assert disc[7, 4:11].all() and disc[4:11, 7].all()
    assert not disc[4, 4] and disc.sum() == disc.T.sum() and np.array_equal(disc, disc[::-1, ::-1])


def test_soft_edges_are_broad_and_graded() -> None:
    values = np.asarray(soft_edges(drawn()))[..., 0].astype(float)
    assert values[25, 8:12].max() > 120  # the disc's left side
    assert values[25, 20:24].max() < values[25, 8:12].max() / 2  # its middle
    assert len(np.unique(values)) > 50


def test_a_flat_picture_has_no_edges_of_any_kind() -> None:
    noise = np.random.default_rng(0).integers(120, 123, (40, 40, 3), dtype=np.uint8)
    for picture in (Image.new("RGB", (40, 40), "teal"), Image.fromarray(noise)):
        for made in (canny(picture), scribble(picture)):
            assert np.asarray(made).max() == 0
        assert np.asarray(lines(picture)).max() < 32 and np.asarray(soft_edges(picture)).max() < 160
    assert np.asarray(soft_edges(Image.new("RGB", (40, 40), "teal"))).max() == 0


def test_scribbles_are_strokes_along_the_outlines() -> None:
    strokes = marked(scribble(drawn()))
    outline = widened(marked(canny(drawn())), 5)
    assert 0.01 < strokes.mean() < 0.4
    assert (strokes & ~outline).sum() <= 0.02 * strokes.sum()
    wide, faint = marked(scribble(drawn(), width=9)), marked(scribble(drawn(), detail=0.9))
    assert wide.sum() > 1.5 * strokes.sum() and faint.sum() >= strokes.sum()


def test_lines_are_bright_where_the_drawing_is_dark() -> None:
    picture = Image.new("RGB", (60, 40), "white")
    ImageDraw.Draw(picture).line((10, 5, 50, 35), fill="black", width=2)
    values = np.asarray(lines(picture))[..., 0]
    assert values[20, 30] > 200
    assert values[35, 5] == 0


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (canny, {"low": 201.0}), (canny, {"high": -1.0}), (canny, {"high": 3000.0}),
        (canny, {"low": float("nan")}), (soft_edges, {"sigma": 0.0}), (soft_edges, {"gamma": 9.0}),
        (scribble, {"detail": 1.5}), (scribble, {"width": 0.0}), (lines, {"gain": 0.0}),
        (lines, {"sigma": 1e9}),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(function: Any, options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        function(drawn(), **options)
