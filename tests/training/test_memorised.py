"""Copies of training pictures are found, and pictures of the same kind are not taken for copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sfumato.training.data import to_tensor
from sfumato.training.memorised import Memory, features


class Pictures:
    """Smooth random pictures."""

    def __init__(self, count: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        small = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        self.pictures = [Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC) for one in small]
        self.digest = f"{count} {seed}"
        self.order = [index for index in range(count) for _ in range(2)]

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, index: int) -> Image.Image:
        return self.pictures[index]

    def captions(self, index: int) -> list[str]:
        return []


def samples(data: Pictures, *indices: int) -> torch.Tensor:
    return torch.stack([to_tensor(data.picture(index)) for index in indices])


def test_a_copy_is_named_and_a_new_picture_is_as_far_as_others(tmp_path: Path) -> None:
    data, held_out = Pictures(60, 1), Pictures(20, 2)
    memory = Memory(data, held_out)
    copies = samples(data, 17, 3) + 0.05 * torch.randn(
        2, 3, 32, 32, generator=torch.Generator().manual_seed(0)
    )
    found = memory.nearest(copies)
    assert found.indices == [17, 3] and max(found.distances) < 0.2
    assert found.scores["nearest_copies"] == 1
    fresh = memory.nearest(samples(Pictures(20, 3), *range(20)))
    assert 0.8 < fresh.scores["nearest"] < 1.2 and fresh.scores["nearest_copies"] == 0
    mixed = torch.cat([samples(Pictures(20, 3), 0, 1), copies])
    both = memory.nearest(mixed)
    assert both.scores["nearest_copies"] == 0.5
    memory.sheet(mixed, both, tmp_path / "nearest.png")
    with Image.open(tmp_path / "nearest.png") as sheet:
        assert sheet.size == (4 * 34, 2 * 34)
        first = np.asarray(sheet)[34:66, :32].astype(int)  # below the sample that is most alike
    wanted = min((17, 3), key=lambda index: both.distances[both.indices.index(index)])
    assert np.abs(first - np.asarray(data.picture(wanted)).astype(int)).max() <= 1


def test_without_held_out_pictures_each_is_compared_with_the_others() -> None:
    data = Pictures(30, 1)
    memory = Memory(data, data)
    assert memory.usual > 0.1
    assert memory.nearest(samples(data, 5)).distances == [0.0]


def test_features_do_not_depend_on_the_size() -> None:
    picture = samples(Pictures(1, 1), 0)
    large = torch.nn.functional.interpolate(picture, scale_factor=2, mode="nearest")
    assert torch.allclose(features(picture), features(large), atol=1e-6)
