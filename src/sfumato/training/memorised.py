"""Whether a model draws its training pictures again: the nearest one to each sample (Carlini et al. 2023).

A distance says little by itself: pictures of one kind are alike. So samples are compared with pictures that
training never saw, whose nearest training pictures lie as far away as chance has it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.training.data import Dataset, to_tensor
from sfumato.training.sheets import save_sheet

SIDE = 16  # pixels that pictures are compared at, as averages of theirs
MOST = 20_000  # training pictures that are looked at, evenly spread
COMPARED = 128  # held-out pictures
COPIES = 0.5  # of the median distance of held-out pictures, below which a sample counts as a copy
ROWS = 12  # pairs on a sheet


@dataclass(frozen=True)
class Nearest:
    """The nearest training picture of each sample: its index, and how far it is, 1 as held-out ones are."""

    indices: list[int]
    distances: list[float]

    @property
    def scores(self) -> dict[str, float]:
        """nearest: the median distance. nearest_copies: the share of samples that are copies."""
        return {
            "nearest": statistics.median(self.distances),
            "nearest_copies": sum(one < COPIES for one in self.distances) / len(self.distances),
        }


class Memory:
    """The training pictures, small, to be compared with; reads them all once."""

    def __init__(self, dataset: Dataset, held_out: Dataset) -> None:
        self.dataset = dataset
        every = sorted(set(dataset.order))
        self.indices = every[:: -(-len(every) // MOST)]
        self.pictures = _small(dataset, self.indices)
        other = range(0, len(held_out), -(-len(held_out) // COMPARED))
        same = held_out.digest == dataset.digest  # a handful of pictures has no held-out ones
        found = _distances(_small(held_out, list(other)), self.pictures)
        nearest = found.kthvalue(2, dim=1).values if same and found.shape[1] > 1 else found.amin(dim=1)
        self.usual = max(float(nearest.median()), 1e-6)

    def nearest(self, samples: Tensor) -> Nearest:
        """The training pictures nearest to samples (n, c, h, w) in -1..1."""
        distances = _distances(features(samples.cpu()), self.pictures)
        found = distances.min(dim=1)
        return Nearest(
            [self.indices[place] for place in found.indices.tolist()],
            [value / self.usual for value in found.values.tolist()],
        )

    def sheet(self, samples: Tensor, nearest: Nearest, path: Path) -> None:
        """Write the samples that are most like training pictures, the nearest first, each above its own."""
        order = sorted(range(len(samples)), key=nearest.distances.__getitem__)[:ROWS]
        size = tuple(samples.shape[2:])
        originals = [to_tensor(self.dataset.picture(nearest.indices[place]))[None] for place in order]
        shown = torch.cat([F.interpolate(each, size, mode="area") for each in originals])
        save_sheet(path, torch.cat([samples[order].cpu(), shown]), len(order))


def features(pictures: Tensor) -> Tensor:
    """(n, c * 16 * 16) of pictures (n, c, h, w)."""
    return F.adaptive_avg_pool2d(pictures.float().clamp(-1, 1), SIDE).flatten(1)


def _small(dataset: Dataset, indices: Sequence[int]) -> Tensor:
    return torch.cat([features(to_tensor(dataset.picture(index))[None]) for index in indices])


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Root mean square differences, (n, m)."""
    return torch.cdist(one, other) / one.shape[1] ** 0.5
