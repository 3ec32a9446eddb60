"""Latents in memory-mapped files: by buckets, both sides, killed and resumed, by several processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.vq import Latents
from sfumato.training import latents, rows
from sfumato.training.data import PictureSet, Position, Share, groups, open_data
from sfumato.training.latents import CachedLatents
from sfumato.training.settings_data import DataConfig


class Halved(nn.Module):
    """An "autoencoder" whose latents are the picture at half its size, so that they can be told apart."""

    downsampling = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls, self.most = 0, 10**9

    def encode(self, pictures: Tensor) -> Latents:
        self.calls += len(pictures)
        if self.calls > self.most:
            raise KeyboardInterrupt
        return Latents(nn.functional.avg_pool2d(pictures, 2) * self.weight)


def folder(root: Path, bad: bool = False) -> Path:
    root.mkdir()
    generator = np.random.default_rng(0)
    for index in range(24):
        height, width = [(8, 8), (4, 16)][index % 2]
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index:02}.png")
    if bad:
        (root / "07.png").write_bytes(b"")
    return root


def opened(root: Path, out: Path | None = None, **keys: Any) -> PictureSet:
    buckets = {"min": 4, "max": 16, "step": 4, "rarest": 1}
    values = {"path": root, "size": 8, "buckets": buckets, "max_bad": 0.1, **keys}
    data = open_data(DataConfig.model_validate(values), "train", out)
    assert isinstance(data, PictureSet)
    return data


def cached(data: PictureSet, path: Path, network: Halved, **keys: Any) -> CachedLatents:
    autoencoder = cast(AutoencoderKL, network)
    arguments: tuple[Any, ...] = (data, autoencoder, 3.0, (3, 4, 4), path, "digest", lambda done, of: None)
    return CachedLatents(*arguments, workers=0, **keys)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Files of few rows."""

    def limit(count: int) -> None:
        monkeypatch.setattr(latents, "ENCODE_BATCH", 2)
        monkeypatch.setattr(rows, "PART_BYTES", count * (2 * 3 * 4 * 4 * 2 + 1))

    return limit


def expected(data: PictureSet, position: Position) -> Tensor:
    pixels = np.asarray(data.shown(position)[1][0], np.float32).transpose(2, 0, 1) / 127.5 - 1
    return nn.functional.avg_pool2d(torch.from_numpy(pixels)[None], 2)[0]


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_latents_are_those_of_the_pictures_as_they_are_shown(
    tmp_path: Path, small: Callable[[int], None], flip: float
) -> None:
    small(4)
    data = opened(folder(tmp_path / "set"), flip=flip)
    network = Halved()
    source = cached(data, tmp_path / "l.safetensors", network)
    assert network.calls == len(data) * (2 if flip else 1)
    shapes, sides = set(), set()
    for group, samples in islice(source.batches(groups(data, 1, 0, 3)), 30):
        shapes.add(samples.shape[2:])
        for position, sample in zip(group, samples, strict=True):
            assert torch.allclose(sample / 3, expected(data, position), atol=2e-3)
            sides.add(data.flipped(position))
    assert shapes == {(4, 4), (2, 8)} and sides == ({True, False} if flip else {False})
    assert len(list(tmp_path.glob("l*.safetensors"))) >= 6
    with pytest.raises(ValueError, match="several sizes"):
        source.fixed(list(range(len(data))))


def test_a_killed_encoding_goes_on_where_it_was(tmp_path: Path, small: Callable[[int], None]) -> None:
    small(4)
    data, path = opened(folder(tmp_path / "set")), tmp_path / "l.safetensors"
    network = Halved()
    network.most = 13
    with pytest.raises(KeyboardInterrupt):
        cached(data, path, network)
    kept = {file.name: file.read_bytes() for file in tmp_path.glob("l*.safetensors")}
    assert len(kept) == 3 and not list(tmp_path.glob(".*.tmp"))
    network.calls, network.most = 0, 10**9
    first = cached(data, path, network)
    assert network.calls == len(data) - 11, "files of four, four and three were kept"
    assert all((tmp_path / name).read_bytes() == content for name, content in kept.items())
    whole = cached(data, tmp_path / "other.safetensors", Halved())
    order = list(islice(groups(data, 1, 0, 3), 10))
    for (_, a), (_, b) in zip(first.batches(iter(order)), whole.batches(iter(order)), strict=True):
        assert torch.equal(a, b)
    next(tmp_path.glob("l-00002*")).write_bytes(b"damaged")
    network.calls = 0
    cached(data, path, network)
    assert 0 < network.calls <= 4


def test_old_files_beyond_the_last_are_removed(tmp_path: Path, small: Callable[[int], None]) -> None:
    small(2)
    data, path = opened(folder(tmp_path / "set")), tmp_path / "l.safetensors"
    cached(data, path, Halved())
    many = len(list(tmp_path.glob("l*.safetensors")))
    small(100)
    cached(data, path, Halved())
    assert many > 8 and len(list(tmp_path.glob("l*.safetensors"))) == 2


def test_each_process_encodes_its_files(
    tmp_path: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    small(4)
    monkeypatch.setattr(rows, "POLL", 0.01)
    root, path = folder(tmp_path / "set"), tmp_path / "l.safetensors"
    networks = [Halved(), Halved()]
    found: dict[int, CachedLatents] = {}

    def run(rank: int) -> None:
        found[rank] = cached(opened(root), path, networks[rank], share=Share(rank, 2))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    data = opened(root)
    assert sum(network.calls for network in networks) == len(data), "no picture twice"
    assert min(network.calls for network in networks) >= 8
    order = list(islice(groups(data, 1, 0, 3), 10))
    for (_, a), (_, b) in zip(found[0].batches(iter(order)), found[1].batches(iter(order)), strict=True):
        assert torch.equal(a, b)


def test_a_picture_that_cannot_be_encoded_is_replaced(tmp_path: Path) -> None:
    root, out = folder(tmp_path / "set", bad=True), tmp_path / "out"
    data = opened(root, out)
    cached(data, tmp_path / "l.safetensors", Halved())
    assert "07.png" in (out / "quarantine.jsonl").read_text()
    order = list(islice(groups(data, 1, 0, 3), 30))
    assert any(data.records[position.index].name == "07.png" for group in order for position in group)
    (out / "quarantine.jsonl").unlink()  # the cache itself remembers
    for again in (data, opened(root, out)):
        source = cached(again, tmp_path / "l.safetensors", Halved())
        for (group, samples), asked in zip(source.batches(iter(order)), order, strict=True):
            assert [p.place for p in group] == [p.place for p in asked]
            for position, sample in zip(group, samples, strict=True):
                assert again.records[position.index].name != "07.png"
                assert torch.allclose(sample / 3, expected(again, position), atol=2e-3)


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    with pytest.raises(InputError, match="cut at random"):
        cached(opened(root, crop="random"), tmp_path / "l.safetensors", Halved())
    odd = {"min": 3, "max": 15, "step": 3, "rarest": 1}
    with pytest.raises(InputError, match=r"takes multiples of 2\nSet data.buckets.step"):
        cached(opened(root, buckets=odd), tmp_path / "l.safetensors", Halved())
