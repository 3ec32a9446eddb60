"""The data set that every source of picture files becomes: split, cut, in buckets, sound."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from sfumato.errors import DataError, InputError
from sfumato.training.data.buckets import Buckets, assigned
from sfumato.training.data.dataset import PICTURE, Part, Size, View
from sfumato.training.data.positions import Position, held_out
from sfumato.training.data.quarantine import Entry, Quarantine
from sfumato.training.data.reading import flat_picture, head_size, mask_picture
from sfumato.training.data.records import File, Listing, Place, Record, digest_of
from sfumato.training.data.views import CENTERED, Frame, Framing, cut, frame, framed, mirrored

Split = Literal["train", "test"]
TRIES = 64  # random replacements of an unusable picture before the next one in order serves
HEAD_READERS = 8  # threads: most of the time goes into waiting for the disk


@dataclass(frozen=True)
class Rules:
    """What becomes of every picture.

    size: (height, width) of `picture`, and of what is shown where there are no buckets. max_bad: share of all
    pictures, held out or not, that may be unusable.
    """

    size: Size
    channels: int = 3
    framing: Framing = CENTERED
    buckets: Buckets | None = None
    max_bad: float = 0.0


class PictureSet:
    """Records as a data set, see `Placed`.

    With a quarantine that keeps a list, pictures that cannot be read are put on it and replaced by others of
    the same size; which ones is a function of the position and of which are unusable, not of when that was
    found. Reading from several threads is safe. Raises `DataError` for an unreadable picture where no list is
    kept, and where more than `rules.max_bad` of all are.
    """

    def __init__(
        self,
        listing: Listing,
        split: Split,
        rules: Rules,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.rules, self.classes = rules, listing.classes
        self.quarantine = Quarantine(None) if quarantine is None else quarantine
        self._numbers = {name: number for number, name in enumerate(listing.classes)}
        self.total = len(listing.records)
        every = [_listed(record, self.quarantine) for record in listing.records]
        self.records = every if listing.apart else _split(every, split)
        self.mode = "L" if rules.channels == 1 else "RGB"
        self.digest = digest_of(self.records)
        self.flip, self.random_crop = rules.framing.flip, rules.framing.crop == "random"
        self.bucketed = rules.buckets is not None
        self.masked = any(record.mask is not None for record in self.records)
        self.conditioned = any(record.condition is not None for record in self.records)
        self._originals: dict[int, Size] = {}
        self._sizes: list[Size | None] = [rules.size] * len(self.records)
        if rules.buckets is not None:
            found = head_sizes(self.records)
            self._originals = {index: size for index, size in enumerate(found) if size is not None}
            self._sizes = assigned(found, rules.buckets)
        self._bad: set[int] = set()
        for index, record in enumerate(self.records):
            if record.fault is not None:
                self._put_aside(index, DataError(record.fault, "Remove or replace this file."))

    @property
    def order(self) -> Sequence[int]:
        return self._order

    @cached_property
    def _order(self) -> Sequence[int]:
        if all(record.repeats == 1 for record in self.records) and None not in self._sizes:
            return range(len(self.records))
        kept = [index for index, size in enumerate(self._sizes) if size is not None]
        if not kept:
            raise DataError(
                "every picture is smaller than the smallest bucket", "Lower data.buckets.min, or set enlarge."
            )
        return [index for index in kept for _ in range(self.records[index].repeats)]

    def __len__(self) -> int:
        return len(self.records)

    def picture(self, index: int) -> Image.Image:
        position = Position(0, -1, index, index)
        while True:
            position = self.sound(position)
            try:
                flat = self._flat(position.index)
            except DataError as error:
                self._put_aside(position.index, error)
                continue
            return cut(flat, frame(_upright(flat), self.rules.size))

    @property
    def paths(self) -> list[Path]:
        """The files of pictures that have one each."""
        return [record.place.path for record in self.records if isinstance(record.place, File)]

    def captions(self, index: int) -> list[str]:
        return list(self.records[index].captions)

    def label(self, index: int) -> int | None:
        label = self.records[index].label
        return None if label is None else self._numbers[label]

    def prior(self, index: int) -> bool:
        return self.records[index].prior

    def size(self, index: int) -> Size:
        return self._sizes[index] or self.rules.size

    def sound(self, position: Position) -> Position:
        if position.index not in self._bad:
            return position
        pool = self._pools.get(self.size(position.index), [])
        generator = position.generator("replacement")
        place = 0
        for _ in range(TRIES if pool else 0):
            place = int(torch.randint(len(pool), (), generator=generator))
            if pool[place] not in self._bad:
                return replace(position, index=pool[place])
        for step in range(len(pool)):
            index = pool[(place + step) % len(pool)]
            if index not in self._bad:
                return replace(position, index=index)
        raise DataError(
            f"no picture of size {self.size(position.index)} can be read", "See the run's quarantine.jsonl."
        )

    def shown(
        self, position: Position, parts: Sequence[Part] = PICTURE
    ) -> tuple[Position, list[Image.Image]]:
        while True:
            position = self.sound(position)
            try:
                return position, self._parts(position, parts)
            except DataError as error:
                self._put_aside(position.index, error)

    def variant(self, index: int, flipped: bool) -> Image.Image | None:
        if index in self._bad:
            return None
        try:
            flat = self._flat(index)
        except DataError as error:
            self._put_aside(index, error)
            return None
        return cut(flat, frame(_upright(flat), self.size(index), flipped))

    def unusable(self, index: int, reason: str) -> None:
        if index not in self._bad:
            self._put_aside(index, DataError(reason, "Remove or replace this file."))

    def flipped(self, position: Position) -> bool:
        return mirrored(self.rules.framing, position)

    def view(self, position: Position) -> View:
        return self._frame(position, self._original(position.index)).view

    def only(self, indices: Collection[int]) -> None:
        self._pools = self._pools_of([index for index in self.order if index in indices])

    @cached_property
    def _pools(self) -> dict[Size, list[int]]:
        """Size -> what may stand in for a picture shown in it."""
        return self._pools_of(self.order)

    def _pools_of(self, indices: Sequence[int]) -> dict[Size, list[int]]:
        pools: dict[Size, list[int]] = {}
        for index in indices:
            pools.setdefault(self.size(index), []).append(index)
        return pools

    def _parts(self, position: Position, parts: Sequence[Part]) -> list[Image.Image]:
        record, found = self.records[position.index], []
        flat = self._flat(position.index) if "picture" in parts else None
        original = self._original(position.index) if flat is None else _upright(flat)
        chosen = self._frame(position, original)
        for part, there in (("condition", self.conditioned), ("mask", self.masked)):
            if part in parts and not there:  # a fault of the recipe, and of no picture
                raise InputError(
                    f"no picture has a {part}", f"Give data.{part}s, or a column or members of tars for them."
                )
        for part in parts:
            if part == "picture":
                assert flat is not None
                found.append(cut(flat, chosen))
            elif part == "condition":
                found.append(
                    cut(flat_picture(*_beside(record, "condition", record.condition), "RGB"), chosen)
                )
            else:
                mask = mask_picture(*_beside(record, "mask", record.mask))
                found.append(cut(mask, chosen, Image.Resampling.BILINEAR))
        return found

    def _flat(self, index: int) -> Image.Image:
        record = self.records[index]
        return flat_picture(_shown_name(record), record.place, self.mode)

    def _frame(self, position: Position, original: Size) -> Frame:
        return framed(self.rules.framing, position, original, self.size(position.index))

    def _original(self, index: int) -> Size:
        if index not in self._originals:
            record = self.records[index]
            self._originals[index] = head_size(_shown_name(record), record.place)
        return self._originals[index]

    def _put_aside(self, index: int, error: DataError) -> None:
        """Quarantine a picture; raises `error` where no list is kept, a `DataError` if there are too many."""
        record = self.records[index]
        if self.quarantine.path is None:
            raise error
        self._bad.add(index)
        size = record.entered or self._originals.get(index)
        reason = error.message.removeprefix(f"cannot read {_shown_name(record)}: ")
        self.quarantine.add(Entry(record.name, reason, record.bytes, record.captions, size))
        names = self.quarantine.entries
        if len(names) > math.floor(self.rules.max_bad * self.total):
            first = "; ".join(f"{name}: {entry.reason}" for name, entry in list(names.items())[:3])
            raise DataError(
                f"{len(names)} of {self.total} pictures cannot be used, and data.max_bad is "
                f"{self.rules.max_bad:g} of them: {first}",
                "See `sfumato data check`; repair or remove the files, or raise data.max_bad.",
            )


def head_sizes(records: Sequence[Record]) -> list[Size | None]:
    """The size of every picture; None where it cannot be read, which is told when the picture is needed."""

    def size(record: Record) -> Size | None:
        if record.fault is not None:
            return record.entered
        try:
            return head_size(record.name, record.place)
        except DataError:
            return None

    with ThreadPoolExecutor(HEAD_READERS) as pool:
        return list(pool.map(size, records))


def _listed(record: Record, quarantine: Quarantine) -> Record:
    """The record as the quarantine has it, where it does."""
    entry = quarantine.entries.get(record.name)
    if entry is None:
        return record
    return record._replace(
        bytes=entry.bytes, captions=entry.captions, entered=entry.size, fault=record.fault or entry.reason
    )


def _split(records: Sequence[Record], split: Split) -> list[Record]:
    chosen = [
        record for record in records if (held_out(record.name) and not record.prior) == (split == "test")
    ]
    return chosen or list(records)  # a handful of pictures may have no held-out one: then all of them serve


def _upright(picture: Image.Image) -> Size:
    width, height = picture.size
    return height, width


def _beside(record: Record, what: str, place: Place | None) -> tuple[str, Place]:
    if place is None:
        raise DataError(f"{record.name} has no {what}", f"Give data.{what}s, or a column for them.")
    return f"the {what} of {record.name}", place


def _shown_name(record: Record) -> str:
    """What errors call it: the path of a file, the name in its source otherwise."""
    return str(record.place.path) if isinstance(record.place, File) else record.name
