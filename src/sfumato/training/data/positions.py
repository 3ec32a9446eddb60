"""The order in which a run shows its samples, as a function of (seed, epoch), and which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Position:
    """Where a sample stands in the run: its random numbers depend on (seed, epoch, place) and nothing else.

    `place` is where it stands in the shuffled epoch, `index` which picture of the data set it is.
    """

    seed: int
    epoch: int
    place: int
    index: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for one purpose ("noise", "caption", ...) of this sample."""
        text = f"{self.seed}/{self.epoch}/{self.place}/{purpose}"
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        return torch.Generator().manual_seed(number >> 1)


class Share(NamedTuple):
    """The part of every batch that one of several processes computes."""

    rank: int = 0
    world: int = 1


WHOLE = Share()


def positions(order: Sequence[int], seed: int, start: int) -> Iterator[Position]:
    """The endless samples from image `start` of the run on; each epoch is another permutation of `order`."""
    epoch, offset = divmod(start, len(order))
    while True:
        yield from epoch_positions(order, seed, epoch, offset)
        epoch, offset = epoch + 1, 0


def epoch_positions(order: Sequence[int], seed: int, epoch: int, offset: int = 0) -> Iterator[Position]:
    """The samples of one epoch, but for the first `offset`."""
    shuffle = Position(seed, epoch, -1).generator("order")
    for place in torch.randperm(len(order), generator=shuffle)[offset:].tolist():
        yield Position(seed, epoch, place, order[place])


def held_out(name: str, share: float = 0.05) -> bool:
    """Whether a picture belongs to the held-out split: by hash of its name, so it survives additions."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return number < share * 2**32
