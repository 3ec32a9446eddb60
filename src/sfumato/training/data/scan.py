"""Looks through all pictures of a data set before a run: each one that is unusable or odd, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sfumato.errors import DataError, InputError
from sfumato.training.data.dataset import Size
from sfumato.training.data.open import is_illustrations, list_any
from sfumato.training.data.reading import examined, mask_picture
from sfumato.training.data.records import FORMATS, File, Finding, Listing, Reading, Record

AT_ONCE = 256  # pictures that are queued for the threads


@dataclass(frozen=True)
class Scan:
    """What a data set holds. sizes: (height, width) of each usable picture -> how many have it."""

    pictures: int
    captioned: int
    classes: tuple[str, ...]
    sizes: Counter[Size]
    findings: tuple[Finding, ...]

    @property
    def unusable(self) -> list[Finding]:
        """What cannot be trained on."""
        return [finding for finding in self.findings if not finding.used]


def scan(
    root: Path,
    reading: Reading | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Scan:
    """Decode every picture of a folder, and its condition and mask; nothing that is found stops it.

    Raises `DataError` where there are no pictures or a table or tar cannot be read at all.
    """
    if is_illustrations(root):
        raise InputError(f"{root} is an illustration set", "Those are checked when they are opened.")
    listing = list_any(root, "train", reading or Reading())
    findings = list(listing.findings)
    sizes: Counter[Size] = Counter()
    for done, (size, found) in enumerate(_looked_at(listing.records, workers), start=1):
        findings += found
        if size is not None:
            sizes[size] += 1
        progress(done, len(listing.records))
    findings += _without_captions(listing, {finding.name for finding in findings if not finding.used})
    captioned = sum(any(record.captions) for record in listing.records)
    return Scan(
        len(listing.records), captioned, listing.classes, sizes, tuple(sorted(findings, key=lambda f: f.name))
    )


def _looked_at(records: list[Record], workers: int) -> Iterator[tuple[Size | None, list[Finding]]]:
    waiting = iter(records)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        while chunk := list(islice(waiting, AT_ONCE)):
            yield from pool.map(_look, chunk)


def _look(record: Record) -> tuple[Size | None, list[Finding]]:
    """(size of a usable picture, what is to be said about it)."""
    if record.fault is not None:
        return None, [Finding(record.name, record.fault)]
    try:
        head = examined("", record.place)
        if record.condition is not None:
            examined("its condition", record.condition)
        if record.mask is not None:
            mask_picture("its mask", record.mask)
    except DataError as error:
        return None, [Finding(record.name, error.message.removeprefix("cannot read : "))]
    found = []
    if isinstance(record.place, File):
        wanted = FORMATS.get(record.place.path.suffix.lower())
        if wanted is not None and head.format != wanted:
            found.append(Finding(record.name, f"it is a {head.format} picture, not {wanted}", used=True))
    if head.frames > 1:
        found.append(Finding(record.name, f"it has {head.frames} frames, the first is used", used=True))
    return head.size, found


def _without_captions(listing: Listing, unusable: set[str]) -> list[Finding]:
    """Usable pictures without a caption, where others have one."""
    without = [record for record in listing.records if not any(record.captions)]
    if len(without) == len(listing.records):
        return []
    return [
        Finding(record.name, "it has no caption, others have", used=True)
        for record in without
        if record.name not in unusable
    ]
