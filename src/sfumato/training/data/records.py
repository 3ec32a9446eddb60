"""What every source of pictures is turned into: a list of records that say where the bytes lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from sfumato.errors import DataError, InputError
from sfumato.training.data.dataset import Size

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
SUFFIXES = tuple(FORMATS)  # in small letters
MAX_TEXT = 1 << 20  # bytes of one caption file
Given = Path | bytes


class Place(Protocol):
    """Where the bytes of a picture are."""

    def given(self) -> Given:
        """The file, or its bytes."""
        ...


@dataclass(frozen=True, slots=True)
class File:
    """A picture in a file of its own."""

    path: Path

    def given(self) -> Given:
        return self.path


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes within a file, such as a member of a tar."""

    path: Path
    offset: int
    size: int

    def given(self) -> Given:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise InputError(f"{self.path} ends within it", "Copy the file again.")
        return data


class Record(NamedTuple):
    """A picture of a data set.

    name: unique within it, with slashes; it decides about the held-out split. bytes: of the file. label: its
    class's name. fault: why it cannot be used, as far as is known without decoding it. prior: as
    `Placed.prior`. entered: its size as the quarantine has it, for a file that may be gone.
    """

    name: str
    bytes: int
    captions: tuple[str, ...]
    place: Place
    label: str | None = None
    condition: Place | None = None
    mask: Place | None = None
    fault: str | None = None
    prior: bool = False
    repeats: int = 1
    entered: Size | None = None


class Finding(NamedTuple):
    """Something about a file of a data set; `used` says whether it is trained on all the same."""

    name: str
    reason: str
    used: bool = False


class Listing(NamedTuple):
    """The records of a source in a fixed order, the classes its labels name, and what was passed over.

    apart: they are those of one split, as the source has it.
    """

    records: list[Record]
    classes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    apart: bool = False


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    extension: of caption files. column: of captions in tables, "" to look for a usual name. lines: whether a
    caption file holds a caption a line. cache: folder for what is worth keeping, None to keep nothing.
    conditions, masks: folders with a picture of the same name, whatever its extension, for each.
    """

    extension: str = ".txt"
    column: str = ""
    lines: bool = False
    cache: Path | None = None
    conditions: Path | None = None
    masks: Path | None = None


def read_caption(path: Path, lines: bool = False) -> tuple[str, ...]:
    """The captions in a text file, none where there is no such file; `DataError` for what is no text."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT + 1)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "Check the file.") from error
    if len(data) > MAX_TEXT:
        raise DataError(f"cannot read {path}: it has more than {MAX_TEXT} bytes", "Captions are short texts.")
    return decode_caption(data, str(path), lines)


def decode_caption(data: bytes, name: str, lines: bool = False) -> tuple[str, ...]:
    """The captions in the bytes of a text file; `DataError` where they are not UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeError as error:
        raise DataError(f"cannot read {name}: {error}", "Save it as UTF-8 text.") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if lines:
        return tuple(line.strip() for line in text.split("\n") if line.strip())
    return (text.strip(),)


def digest_of(records: Sequence[Record]) -> str:
    """Of names, sizes of the files and captions; and of conditions, masks, labels and repeats, if any."""
    content = [[record.name, record.bytes, record.captions] for record in records]
    text = json.dumps(content)
    more = [
        [record.label, _weight(record.condition), _weight(record.mask), record.prior, record.repeats]
        for record in records
    ]
    if any(item != [record.label, None, None, False, 1] for item, record in zip(more, records, strict=True)):
        text += json.dumps(more)
    return hashlib.sha256(text.encode()).hexdigest()


def _weight(place: Place | None) -> int | None:
    """The bytes of a picture beside another; -1 for a missing one, which is told when it is needed."""
    match place:
        case None:
            return None
        case Span(size=size):
            return size
        case File(path=path):
            try:
                return path.stat().st_size
            except OSError:
                return -1
    return 0
