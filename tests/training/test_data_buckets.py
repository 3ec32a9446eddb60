"""Buckets: which size a picture goes to, and batches of one size that show every place once."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.errors import InputError
from sfumato.training.data import PictureSet, Position, Share, bucket_rules, groups, load, open_data
from sfumato.training.data.batches import bucketed
from sfumato.training.data.buckets import Buckets, assigned, nearest_size, sizes
from sfumato.training.settings_data import BucketConfig, DataConfig

SD = Buckets(256, 1024, 64, 512 * 512)


def test_sizes_have_one_area_and_both_orientations() -> None:
    found = sizes(SD)
    assert (512, 512) in found and (384, 640) in found and (640, 384) in found and (256, 1024) in found
    for height, width in found:
        assert height % 64 == width % 64 == 0 and 256 <= min(height, width) <= max(height, width) <= 1024
        assert 512 * 512 * 0.7 < height * width <= 512 * 512 and (width, height) in found
    assert nearest_size((3000, 2000), found) == nearest_size((300, 200), found) == (640, 384)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_a_picture_goes_to_the_most_similar_shape(height: int, width: int) -> None:
    (size,) = assigned([(height, width)], SD)
    assert size is not None

    def distance(other: tuple[int, int]) -> float:
        return abs(math.log(height / width * other[1] / other[0]))

    assert distance(size) == pytest.approx(min(map(distance, sizes(SD))))
    (turned,) = assigned([(width, height)], SD)
    assert turned is not None and distance(turned[::-1]) == pytest.approx(distance(size))  # type: ignore[arg-type]


def test_small_pictures_are_not_enlarged_if_one_asks() -> None:
    strict = Buckets(256, 1024, 64, 512 * 512, enlarge=False)
    assert assigned([(300, 400), (200, 900), (5000, 5000), (512, 512)], strict) == [
        (256, 384), None, (512, 512), (512, 512),
    ]  # fmt: skip


def test_rare_sizes_are_given_up() -> None:
    originals: list[tuple[int, int] | None] = [(512, 512)] * 9 + [(640, 384)] * 2 + [(1024, 256)] + [None]
    counts = Counter(assigned(originals, Buckets(256, 1024, 64, 512 * 512, rarest=3)))
    assert counts == {(512, 512): 10, (640, 384): 3}
    assert set(assigned(originals, Buckets(256, 1024, 64, 512 * 512, rarest=100))) == {(512, 512)}


def test_what_a_recipe_leaves_open() -> None:
    def rules(size: int | tuple[int, int], **keys: Any) -> Buckets | None:
        config = DataConfig(path=Path(), size=size, buckets=BucketConfig(**keys))
        return bucket_rules(config)

    assert rules(512) == Buckets(256, 1024, 64, 512 * 512, rarest=16)
    assert rules(64) == Buckets(32, 128, 8, 64 * 64, rarest=16)
    assert rules((256, 1024), min=128, step=32) == Buckets(128, 1024, 32, 512 * 512, rarest=16)
    assert DataConfig.model_validate({"path": ".", "buckets": True}).buckets == BucketConfig()
    assert DataConfig.model_validate({"path": ".", "buckets": False}).buckets is None
    with pytest.raises(InputError, match="multiples of step"):
        rules(512, min=100)
    with pytest.raises(InputError, match="less than the smallest square"):
        rules(512, area=1000)


SIZES = [(4, 4)] * 11 + [(2, 8)] * 5 + [(8, 2)] * 2 + [(2, 6)]


def batches_of(seed: int, seen: int, size: int, count: int) -> list[list[Position]]:
    order = [*range(len(SIZES)), 0, 0]
    return list(islice(bucketed(order, SIZES.__getitem__, seed, seen, size), count))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40), size=st.integers(1, 9), start=st.integers(0, 60))
def test_the_batches_are_the_same_from_any_image_on(seed: int, size: int, start: int) -> None:
    whole = batches_of(seed, 0, size, 70)
    assert batches_of(seed, start * size + size // 2, size, 10) == whole[start : start + 10]


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_every_place_of_every_epoch_is_shown_once(size: int) -> None:
    batches = batches_of(5, 0, size, 21 * 18 // size)
    for batch in batches:
        assert len(batch) == size and len({SIZES[position.index] for position in batch}) == 1
    shown = Counter((position.epoch, position.place) for position in chain(*batches))
    assert set(shown.values()) == {1}
    last = max(epoch for epoch, _ in shown)
    assert last >= 15
    # 21 places an epoch, of which at most a batch less one of each of four sizes waits at its end.
    assert len(shown) >= last * 21 - 4 * (size - 1)
    assert all((epoch, place) in shown for epoch in range(last - 8) for place in range(21))


def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(40):
        height, width = [(24, 24), (16, 36), (36, 16), (20, 27)][index % 4]
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return tmp_path


def opened(root: Path, **keys: Any) -> PictureSet:
    values = {"path": root, "size": 16, "buckets": {"step": 4, "rarest": 4}, **keys}
    data = open_data(DataConfig.model_validate(values), "train")
    assert isinstance(data, PictureSet)
    return data


def test_batches_of_a_folder_have_one_size(tmp_path: Path) -> None:
    data = opened(folder(tmp_path), crop="random", flip=0.5)
    assert data.bucketed and len({data.size(index) for index in range(len(data))}) >= 3
    shapes = set()
    for group in islice(groups(data, 1, 0, 4), 30):
        places, pictures = load(data, group)
        height, width = pictures.shape[2:]
        assert places == group and all(data.size(position.index) == (height, width) for position in group)
        shapes.add((height, width))
        for position in group:
            view = data.view(position)
            assert view.size == (height, width) and view.original[0] in (16, 20, 24, 36)
    assert len(shapes) >= 3
    assert data.picture(0).size == (16, 16), "of the size of the recipe, for scores and sheets"
    held = open_data(DataConfig(path=tmp_path, size=16, buckets=BucketConfig()), "test")
    assert isinstance(held, PictureSet) and not held.bucketed


def test_processes_share_bucketed_batches(tmp_path: Path) -> None:
    data = opened(folder(tmp_path))
    whole = list(islice(groups(data, 3, 12, 6), 40))
    shares = [list(islice(groups(data, 3, 12, 6, Share(rank, 3)), 40)) for rank in range(3)]
    for number, batch in enumerate(whole):
        own = [share[number] for share in shares]
        assert [len(part) for part in own] == [2, 2, 2] and sorted(chain(*own), key=batch.index) == batch


def test_a_cut_covers_the_size_and_says_where(tmp_path: Path) -> None:
    ramp = np.arange(200, dtype=np.uint8)[:, None, None].repeat(50, 1).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    values = {"path": tmp_path, "size": 50, "crop": "random"}
    data = open_data(DataConfig.model_validate(values), "train")
    assert isinstance(data, PictureSet)
    tops = set()
    for place in range(25):
        _, (picture,) = data.shown(Position(0, 0, place, 0))
        view = data.view(Position(0, 0, place, 0))
        assert abs(int(np.asarray(picture)[0, 0, 0]) - view.crop[0]) <= 1 and view.crop[1] == 0
        tops.add(view.crop[0])
    assert min(tops) < 40 and max(tops) > 110


def test_the_share_of_mirrored_pictures(tmp_path: Path) -> None:
    data = opened(folder(tmp_path), flip=0.25, buckets=False)
    flips = [data.flipped(Position(0, 0, place, 0)) for place in range(800)]
    assert 0.2 < sum(flips) / 800 < 0.3
    assert all(opened(tmp_path, flip=1.0, buckets=False).flipped(Position(0, 0, k)) for k in range(50))
