"""Training pictures: their order, their split, and what becomes of odd and broken files."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.errors import DataError, InputError
from sfumato.training.data import (
    Dataset,
    Position,
    Share,
    batches,
    groups,
    held_out,
    open_dataset,
    positions,
    to_tensor,
)

ORDER = [0, 1, 1, 2, 3, 3, 3]


def test_every_epoch_is_another_permutation() -> None:
    stream = list(islice(positions(ORDER, 5, 0), 4 * len(ORDER)))
    epochs = [stream[i : i + len(ORDER)] for i in range(0, len(stream), len(ORDER))]
    for number, epoch in enumerate(epochs):
        assert {position.epoch for position in epoch} == {number}
        assert sorted(position.place for position in epoch) == list(range(len(ORDER)))
        assert Counter(position.index for position in epoch) == Counter(ORDER)
    assert len({tuple(position.place for position in epoch) for epoch in epochs}) == len(epochs)
    assert stream != list(islice(positions(ORDER, 6, 0), len(stream)))


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 40), seed=st.integers(0, 2**63 - 1))
def test_the_stream_is_the_same_from_any_image_on(start: int, seed: int) -> None:
    whole = list(islice(positions(ORDER, seed, 0), 60))
    assert list(islice(positions(ORDER, seed, start), 60 - start)) == whole[start:]


def test_random_numbers_hang_on_the_place_alone() -> None:
    def draw(position: Position, purpose: str = "noise") -> float:
        return float(torch.rand((), generator=position.generator(purpose)))

    here = Position(1, 2, 3, 4)
    assert draw(here) == draw(Position(1, 2, 3, 99))
    others = [Position(0, 2, 3), Position(1, 0, 3), Position(1, 2, 0), Position(12, 3, 0), Position(1, 23, 0)]
    assert len({draw(here), draw(here, "caption"), *(draw(other) for other in others)}) == 7
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(here)
    assert torch.equal(before, torch.get_rng_state())


class Numbers:
    """Pictures of one pixel, each the grey of its index."""

    digest = "numbers"
    order = range(100)

    def __len__(self) -> int:
        return len(self.order)

    def picture(self, index: int) -> Image.Image:
        if index == 77:
            raise DataError("picture 77 is broken")
        return Image.new("L", (1, 1), index)

    def captions(self, index: int) -> list[str]:
        return []


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("start", [0, 12])
def test_batches_hang_on_the_order_alone(workers: int, start: int) -> None:
    data: Dataset = Numbers()
    order = (
        [Position(0, 0, place, place % 70) for place in range(i, i + 4)] for i in range(start, 10_000, 4)
    )
    stream = batches(data, order, workers)
    threads = threading.active_count()
    for number, (group, pixels) in enumerate(islice(stream, 12)):
        places = list(range(start + 4 * number, start + 4 * number + 4))
        assert [position.place for position in group] == places
        expected = torch.tensor([place % 70 for place in places]) / 127.5 - 1
        assert pixels.shape == (4, 1, 1, 1) and torch.allclose(pixels.flatten(), expected)
    stream.close()
    assert threading.active_count() <= threads


def test_shares_make_up_the_batches() -> None:
    data: Dataset = Numbers()
    whole = list(islice(groups(data, 3, 12, 6), 30))
    shares = [list(islice(groups(data, 3, 12, 6, Share(rank, 3)), 30)) for rank in range(3)]
    for number, batch in enumerate(whole):
        own = [share[number] for share in shares]
        assert [len(part) for part in own] == [2, 2, 2]
        assert sorted(chain(*own), key=batch.index) == batch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_stops_the_batches(workers: int) -> None:
    order = ([Position(0, 0, place, place) for place in range(i, i + 4)] for i in range(0, 100, 4))
    with pytest.raises(DataError, match="picture 77"):
        for _ in batches(Numbers(), order, workers):
            pass


def test_pixels_run_from_minus_one_to_one() -> None:
    rgb = to_tensor(Image.fromarray(np.array([[[0, 255, 51]]], np.uint8)))
    assert rgb.shape == (3, 1, 1) and torch.allclose(rgb.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
    assert to_tensor(Image.new("L", (3, 2))).shape == (1, 2, 3)


def test_the_split_survives_additions() -> None:
    names = [f"{index}.png" for index in range(4000)]
    held = {name for name in names if held_out(name)}
    assert 0.04 < len(held) / len(names) < 0.06
    assert [name for name in names if name in held][:3] == ["6.png", "33.png", "40.png"]  # in every version


def folder_of(root: Path, files: dict[str, Image.Image | str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def opened(root: Path, size: tuple[int, int] = (4, 4), channels: int = 3) -> Dataset:
    return open_dataset(root, size, channels, "train")


def picture_of(tmp_path: Path, name: str, image: Image.Image, channels: int = 3) -> np.ndarray:
    width, height = image.size
    data = opened(folder_of(tmp_path, {name: image}), (height, width), channels)
    return np.asarray(data.picture(0))


def test_a_folder_with_captions(tmp_path: Path) -> None:
    red = Image.new("RGB", (6, 8), "red")
    root = folder_of(
        tmp_path,
        {
            "a.png": red, "a.txt": "\ufeffa red one\n", "b/c.JPG": red, "b/d.webp": red, "b/d.txt": " grün ",
            "e.bmp": red, "notes.md": "no picture", ".hidden.png": b"junk", "__MACOSX/._a.png": b"junk",
            ".cache/f.png": b"junk",
        },
    )  # fmt: skip
    (root / "folder.png").mkdir()
    data = opened(root)
    assert len(data) == 4 and list(data.order) == [0, 1, 2, 3]
    assert [data.captions(index) for index in range(4)] == [["a red one"], [], ["grün"], []]
    assert all(data.picture(index).size == (4, 4) for index in range(4))


def test_the_digest_changes_with_what_training_would_notice(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": Image.new("RGB", (4, 4), "red"), "a.txt": "red"})
    first = opened(root).digest
    assert opened(root).digest == first
    folder_of(root, {"a.txt": "ruby"})
    second = opened(root).digest
    folder_of(root, {"b.png": Image.new("RGB", (4, 4), "red")})
    assert len({first, second, opened(root).digest}) == 3


def test_the_splits_of_a_folder_do_not_overlap(tmp_path: Path) -> None:
    grey = Image.new("L", (2, 2))
    root = folder_of(tmp_path, {f"{index}.png": grey for index in range(200)})
    train, test = (open_dataset(root, (2, 2), 1, split) for split in ("train", "test"))
    assert len(train) + len(test) == 200 and 2 <= len(test) <= 25
    alone = open_dataset(folder_of(tmp_path / "one", {"1.png": grey}), (2, 2), 1, "test")
    assert len(alone) == 1  # too few for a held-out picture


def test_pictures_are_cut_around_their_middle(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255
    data = opened(folder_of(tmp_path, {"a.png": Image.fromarray(pixels)}))
    assert np.asarray(data.picture(0)).min() == 255


def test_a_turned_photograph_stands_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), "black")
    image.paste("white", (0, 0, 1, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    data = opened(folder_of(tmp_path, {"a.png": buffer.getvalue()}), (4, 2))
    pixels = np.asarray(data.picture(0))[..., 0]
    assert pixels.shape == (4, 2) and (pixels[0] == 255).all() and (pixels[1:] == 0).all()


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    assert picture_of(tmp_path, "a.png", image).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    assert picture_of(tmp_path, "a.png", image).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_and_colour_are_what_was_asked_for(tmp_path: Path) -> None:
    grey = picture_of(tmp_path / "g", "a.png", Image.new("L", (1, 1), 77))
    assert grey.tolist() == [[[77, 77, 77]]]
    colour = picture_of(tmp_path / "c", "a.png", Image.new("RGB", (1, 1), (90, 90, 90)), channels=1)
    assert colour.tolist() == [[90]]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert picture_of(tmp_path, "a.png", image, channels=1).tolist() == [[0, 128, 255]]


def png() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = {
    "empty": b"",
    "text": b"no picture at all",
    "cut short": png()[:2000],
    "flipped": png()[:60] + bytes(100) + png()[160:],
    "another format": b"GIF89a" + bytes(40),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    data = opened(folder_of(tmp_path, {"broken.png": content}))
    with pytest.raises(DataError, match=r"cannot read .*broken\.png"):
        data.picture(0)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 5000), value=st.binary(min_size=1, max_size=8))
def test_damage_is_a_picture_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: bytes
) -> None:
    content = bytearray(png())
    start = place % len(content)
    content[start : start + len(value)] = value
    data = opened(folder_of(tmp_path_factory.mktemp("damaged"), {"a.png": bytes(content)}))
    try:
        assert data.picture(0).size == (4, 4)
    except DataError as error:
        assert "a.png" in error.message


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(folder_of(tmp_path, {"a.png": png()}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a\.png"):
        data.picture(0)


def test_a_caption_that_is_no_text(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": Image.new("L", (1, 1)), "a.txt": b"\xff\xfe\x00"})
    with pytest.raises(DataError, match=r"a\.txt"):
        opened(root)


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_pictures(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no pictures in|not a folder"):
        opened(tmp_path / name)


@pytest.fixture
def illustrations(tmp_path: Path) -> Path:
    """A built set: two drawings and a scene to train on, one drawing held out."""
    with tarfile.open(tmp_path / "pictures-00000.tar", "w") as archive:
        buffer = io.BytesIO()
        Image.new("RGBA", (4, 4), (0, 0, 255, 255)).save(buffer, "PNG")
        info = tarfile.TarInfo("blue.png")
        info.size = len(buffer.getvalue())
        archive.addfile(info, io.BytesIO(buffer.getvalue()))
    rows = [
        {
            "id": name, "captions": [f"a {name}", "something"], "split": split, "kind": kind,
            "background": [255, 0, 0], "layers": [{"picture": "blue", "box": [0, 0, 0.5, 1]}],
            "attributes": {"style": "flat"} if name == "dog" else {},
        }
        for name, split, kind in [
            ("cat", "train", "drawing"), ("dog", "train", "drawing"), ("park", "train", "scene"),
            ("fox", "test", "drawing"),
        ]
    ]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_repeats_set_how_often_an_epoch_shows_a_kind(illustrations: Path) -> None:
    data = open_dataset(illustrations, (4, 4), 3, "train", {"drawing": 3})
    assert Counter(data.order) == {0: 3, 1: 3, 2: 1}
    assert data.captions(2) == ["a park", "something"]
    without = open_dataset(illustrations, (4, 4), 3, "train", {"scene": 0})
    assert Counter(without.order) == {0: 1, 1: 1} and len(without) == 2
    assert len({data.digest, without.digest}) == 2
    assert len(open_dataset(illustrations, (4, 4), 3, "test", {"drawing": 3})) == 1
    fewer = open_dataset(illustrations, (4, 4), 3, "train", {"drawing": 3, "drawing/flat": 0})
    assert Counter(fewer.order) == {0: 3, 1: 1}
    assert [fewer.captions(index)[0] for index in (0, 1)] == ["a cat", "a park"]


def test_an_illustration_of_another_shape(illustrations: Path) -> None:
    wide = np.asarray(open_dataset(illustrations, (4, 8), 3, "train").picture(0))
    assert wide.shape == (4, 8, 3)
    assert wide[0, 0].tolist() == [0, 0, 255] and wide[0, -1].tolist() == [255, 0, 0]
    assert np.asarray(open_dataset(illustrations, (4, 4), 1, "train").picture(0)).shape == (4, 4)


def test_repeats_of_what_is_not_there(illustrations: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)'drawings', a kind that .*Did you mean 'drawing'"):
        open_dataset(illustrations, (4, 4), 3, "train", {"drawings": 3})
    with pytest.raises(DataError, match="no test rows"):
        open_dataset(illustrations, (4, 4), 3, "test", {"drawing": 0})
    folder = folder_of(tmp_path / "folder", {"a.png": Image.new("L", (1, 1))})
    with pytest.raises(InputError, match="repeats is for illustration sets"):
        open_dataset(folder, (4, 4), 3, "train", {"drawing": 3})
