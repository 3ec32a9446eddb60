"""WebDataset: tars whose members of one name are a sample, as img2dataset writes LAION; read by offset."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from sfumato.checkpoints.files import write_atomically
from sfumato.errors import DataError
from sfumato.training.data.records import (
    MAX_TEXT,
    SUFFIXES,
    Finding,
    Listing,
    Reading,
    Record,
    Span,
    decode_caption,
)

MAX_HEADER = 1 << 20  # bytes of a member's extended header; names are shorter
VERSION = 1  # of the index
CONDITIONS = ("conditioning", "condition", "conditioning_image")  # before the last suffix: 000.condition.png
AGAIN = "Download or copy it again."
Sample = dict[str, Any]


def list_tars(root: Path, reading: Reading) -> Listing:
    """The samples of every tar in a folder, in the order of the tars and their members.

    A sample's picture, caption (.txt, or the caption in .json), class (.cls), condition and mask are members
    whose names differ after the first dot. Nothing is unpacked: members are read where they lie. The index
    of a tar is kept in `reading.cache` while the tar stays as it is. Raises `DataError` for a tar that is
    damaged; links, devices and members with unusable names are passed over and told.
    """
    records: list[Record] = []
    findings: list[Finding] = []
    for path in sorted(root.glob("*.tar")):
        samples, odd = _indexed(path, reading)
        findings += [Finding(f"{path.name}/{name}", reason) for name, reason in odd]
        records += [_record(path, sample, reading) for sample in samples]
    if not records:
        raise DataError(
            f"no pictures in the tars of {root}", "Their members are like 000000000.jpg and .txt."
        )
    labels = {record.label for record in records if record.label is not None}
    classes = sorted(
        labels, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label)
    )
    return Listing(records, tuple(classes), tuple(findings))


def _indexed(path: Path, reading: Reading) -> tuple[list[Sample], list[tuple[str, str]]]:
    """(samples, (member, reason) passed over) of a tar, from its kept index if that is of this tar."""
    status = path.stat()
    state = [
        VERSION, path.name, status.st_size, status.st_mtime_ns, reading.extension, reading.column,
        reading.lines,
    ]  # fmt: skip
    kept = None
    if reading.cache is not None:
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        kept = reading.cache / f"{path.stem}-{name}.json"
        try:
            index = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            index = None  # made again
        match index:
            case {"state": found, "samples": list(samples), "passed": list(passed)} if found == state:
                return samples, [(member, reason) for member, reason in passed]
    samples, passed = _read(path, reading)
    if kept is not None:
        text = json.dumps({"state": state, "samples": samples, "passed": passed})
        write_atomically(kept, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return samples, passed


def _read(path: Path, reading: Reading) -> tuple[list[Sample], list[tuple[str, str]]]:
    samples: dict[str, Sample] = {}
    passed: list[tuple[str, str]] = []
    with path.open("rb") as file:
        for info in _members(path, file):
            wrong = _refused(info)
            if wrong is not None:
                passed.append((info.name[:200], wrong))
                continue
            folder, _, base = info.name.rpartition("/")
            stem, _, kind = base.partition(".")
            if not stem or not kind:
                continue  # a folder's own file, or a hidden one
            key = f"{folder}/{stem}" if folder else stem
            sample = samples.setdefault(key, {"name": f"{path.stem}/{key}"})
            _take(sample, kind.lower(), info, file, reading)
    return [sample for sample in samples.values() if "picture" in sample], passed


def _members(path: Path, file: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
    size = path.stat().st_size
    try:
        with tarfile.open(fileobj=_Limited(file), mode="r:") as archive:
            reached = -1
            while (info := archive.next()) is not None:
                cast(Any, archive).members.clear()  # it would keep all of them
                if info.size < 0 or info.offset <= reached:
                    raise DataError(f"{path} is damaged: it goes back at {info.name}", AGAIN)
                if info.offset_data + (info.size if info.isreg() else 0) > size:
                    raise DataError(f"{path} ends within {info.name}", AGAIN)
                reached = info.offset
                yield info
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}", AGAIN) from error


class _Limited(io.RawIOBase):
    """A file whose reads are bounded: tarfile takes an extended header whole, however long it says it is."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a header of {size} bytes")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def _refused(info: tarfile.TarInfo) -> str | None:
    """Why a member is not looked at."""
    if info.isdir():
        return None
    if not info.isreg():
        return "it is a link or a device"
    if info.issparse():
        return "it is stored as a sparse file"
    if info.name.startswith("/") or ".." in info.name.split("/") or not info.name.isprintable():
        return "its name points out of the tar, or is not printable"
    return None


def _take(
    sample: Sample, kind: str, info: tarfile.TarInfo, file: io.BufferedReader, reading: Reading
) -> None:
    """Put a member into its sample by what follows the first dot of its name."""
    span = [info.offset_data, info.size]
    *before, last = kind.split(".")
    if not info.isreg():
        return
    if f".{last}" in SUFFIXES:
        part = "picture" if not before else "mask" if before == ["mask"] else None
        part = "condition" if len(before) == 1 and before[0] in CONDITIONS else part
        if part in sample:
            sample["fault"] = f"it has two members for its {part}"
        elif part is not None:
            sample[part] = span
    elif kind == reading.extension.removeprefix(".") or kind in ("json", "cls"):
        if info.size > MAX_TEXT:
            sample["fault"] = f"its .{kind} has more than {MAX_TEXT} bytes"
            return
        file.seek(info.offset_data)
        _read_text(sample, kind, file.read(info.size), reading)


def _read_text(sample: Sample, kind: str, data: bytes, reading: Reading) -> None:
    try:
        if kind == "json":
            values = json.loads(data)
            column = reading.column or "caption"
            if isinstance(values, dict) and isinstance(values.get(column), str):
                sample.setdefault("described", values[column].strip())
        elif kind == "cls":
            sample["label"] = data.decode("utf-8").strip()
        else:
            sample["captions"] = decode_caption(data, f"{sample['name']}.{kind}", reading.lines)
    except DataError as error:
        sample["fault"] = error.message
    except (ValueError, RecursionError) as error:
        sample["fault"] = f"its .{kind} cannot be read: {error}"


def _record(path: Path, sample: Sample, reading: Reading) -> Record:
    described = (sample["described"],) if sample.get("described") else ()
    captions = tuple(sample.get("captions", ()))
    spans = {part: Span(path, *sample[part]) for part in ("picture", "condition", "mask") if part in sample}
    return Record(
        name=sample["name"],
        bytes=spans["picture"].size,
        captions=described or captions if reading.column else captions or described,
        place=spans["picture"],
        label=sample.get("label"),
        condition=spans.get("condition"),
        mask=spans.get("mask"),
        fault=sample.get("fault"),
    )
