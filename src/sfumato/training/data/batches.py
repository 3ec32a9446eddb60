"""Batches of places, all of one size where pictures are in buckets, and the pictures decoded ahead."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.training.data.dataset import PICTURE, Dataset, Part, Placed, Size, to_tensor
from sfumato.training.data.positions import WHOLE, Position, Share, epoch_positions, positions

G = TypeVar("G")
T = TypeVar("T")


def groups(
    dataset: Dataset,
    seed: int,
    seen: int,
    size: int,
    share: Share = WHOLE,
    order: Sequence[int] | None = None,
) -> Iterator[list[Position]]:
    """The endless batches from image `seen` of the run on, and of each the places that are this process's.

    size: of a batch of all processes together. order: as `dataset.order`, which it is by default. Where
    pictures are in buckets, each batch is of one bucket, see `bucketed`.
    """
    order = dataset.order if order is None else order
    if isinstance(dataset, Placed) and dataset.bucketed:
        whole = bucketed(order, dataset.size, seed, seen, size)
    else:
        places = positions(order, seed, seen)
        whole = iter(lambda: list(islice(places, size)), [])
    for batch in whole:
        yield batch[share.rank :: share.world]


def bucketed(
    order: Sequence[int], size_of: Callable[[int], Size], seed: int, seen: int, size: int
) -> Iterator[list[Position]]:
    """The endless batches of pictures of equal size from image `seen` on, which is rounded down to a batch.

    The places of an epoch are gone through in their shuffled order, and a batch leaves as soon as `size`
    pictures of one bucket are together. What is left of a bucket when the epoch ends comes first in the next
    epoch, as the places that they are. So every place of every epoch is shown exactly once, every batch is
    full, and the state at any image follows from the counts: nothing has to be replayed but the rests.
    """
    counts = Counter(size_of(index) for index in order)
    epoch, skip = _epoch_of(seen // size, counts, size)
    waiting = _rests(order, size_of, seed, epoch, counts, size)
    while True:
        for position in epoch_positions(order, seed, epoch):
            batch = waiting[size_of(position.index)]
            batch.append(position)
            if len(batch) == size:
                if skip == 0:
                    yield list(batch)
                else:
                    skip -= 1
                batch.clear()
        epoch += 1


def _epoch_of(batch: int, counts: Counter[Size], size: int) -> tuple[int, int]:
    """(epoch that a batch is filled in, number of batches before it that are filled there too)."""

    def filled(epochs: int) -> int:
        return sum(epochs * count // size for count in counts.values())

    # `filled` is within one batch a bucket of its slope, so the epoch is found by bisection between bounds.
    low, high = 0, (batch + 1 + len(counts)) * size // counts.total() + 1
    while low < high:
        middle = (low + high) // 2
        if filled(middle + 1) > batch:
            high = middle
        else:
            low = middle + 1
    return low, batch - filled(low)


def _rests(
    order: Sequence[int],
    size_of: Callable[[int], Size],
    seed: int,
    epoch: int,
    counts: Counter[Size],
    size: int,
) -> defaultdict[Size, list[Position]]:
    """The places of earlier epochs that wait for a full batch when `epoch` begins."""
    missing = {key: epoch * count % size for key, count in counts.items()}
    found: defaultdict[Size, list[Position]] = defaultdict(list)
    earlier = epoch
    while any(missing.values()):
        earlier -= 1
        for position in reversed(list(epoch_positions(order, seed, earlier))):
            key = size_of(position.index)
            if missing[key]:
                missing[key] -= 1
                found[key].append(position)
    for rest in found.values():
        rest.reverse()
    return found


def batches(
    dataset: Dataset, order: Iterator[list[Position]], workers: int
) -> Generator[tuple[list[Position], Tensor], None, None]:
    """(positions, pictures (b, c, h, w) in -1..1) of `groups`; `workers` threads decode that many ahead.

    The positions are those of the pictures that are there: one that cannot be read is replaced. What comes
    out depends on `order` alone. Close it to stop the threads.
    """
    return ahead(order, lambda group: load(dataset, group), workers)


def load(dataset: Dataset, group: Sequence[Position]) -> tuple[list[Position], Tensor]:
    """(positions, pictures (b, c, h, w) in -1..1) of one batch."""
    if isinstance(dataset, Placed):
        places, (pictures,) = load_parts(dataset, group, PICTURE)
        return places, pictures
    return list(group), torch.stack([to_tensor(dataset.picture(position.index)) for position in group])


def load_parts(
    dataset: Placed, group: Sequence[Position], parts: Sequence[Part]
) -> tuple[list[Position], list[Tensor]]:
    """(positions, each of the parts of their pictures, (b, c, h, w) in -1..1), cut and mirrored alike."""
    shown = [dataset.shown(position, parts) for position in group]
    tensors = [torch.stack([to_tensor(images[k]) for _, images in shown]) for k in range(len(parts))]
    return [position for position, _ in shown], tensors


def ahead(order: Iterator[G], make: Callable[[G], T], workers: int) -> Generator[T, None, None]:
    """`make` of every batch in turn; `workers` threads are that many batches ahead. Close it to stop them."""
    if workers == 0:
        for group in order:
            yield make(group)
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[T]] = deque()
    try:
        for group in order:
            waiting.append(pool.submit(make, group))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
