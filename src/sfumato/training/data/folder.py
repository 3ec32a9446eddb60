"""A folder of pictures, searched recursively, each with an optional caption in a text file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from sfumato.errors import DataError
from sfumato.training.data.quarantine import Entry
from sfumato.training.data.records import SUFFIXES, File, Finding, Listing, Reading, Record, read_caption

UNREAD = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".svg", ".psd", ".jp2")


def list_folder(root: Path, reading: Reading, entries: Mapping[str, Entry] | None = None) -> Listing:
    """The pictures of a folder in the order of their paths; hidden files are left out.

    Where every picture lies in a sub-folder, the first level's names are the classes. entries: pictures that
    are listed even if they are gone, with what was known of them.
    """
    apart = {path.resolve() for path in (reading.conditions, reading.masks) if path is not None}
    found: dict[PurePosixPath, Path] = {}
    findings: list[Finding] = []
    for path in root.rglob("*"):
        name = PurePosixPath(path.relative_to(root).as_posix())
        suffix = path.suffix.lower()
        if suffix not in (*SUFFIXES, *UNREAD) or any(part.startswith(".") for part in name.parts):
            continue
        if apart and not apart.isdisjoint(path.resolve().parents):
            continue
        if suffix in UNREAD:
            findings.append(Finding(str(name), f"{suffix} files are not read: {', '.join(SUFFIXES)} are"))
        elif path.is_file():
            found[name] = path
        else:
            findings.append(Finding(str(name), _no_file(path)))
    for given in entries or {}:
        name = PurePosixPath(given)
        if name not in found and not name.is_absolute() and ".." not in name.parts:
            found[name] = root / name
    conditions, masks = beside(reading.conditions), beside(reading.masks)
    records = []
    for name in sorted(found):
        captions, fault = caption_of(found[name], reading)
        count = 0 if entries and str(name) in entries else found[name].stat().st_size
        stem = str(name.with_suffix(""))
        records.append(
            Record(
                str(name),
                count,
                captions,
                File(found[name]),
                name.parts[0] if len(name.parts) > 1 else None,
                conditions.get(stem),
                masks.get(stem),
                fault or _missing(stem, reading, conditions, masks),
            )
        )
    if not records:
        raise DataError(f"no pictures in {root}", f"Put {', '.join(SUFFIXES)} files there.")
    labels = {record.label for record in records}
    if None in labels:
        records = [record._replace(label=None) for record in records]
    classes = tuple(sorted(label for label in labels if label is not None and None not in labels))
    return Listing(records, classes, tuple(findings))


def beside(folder: Path | None) -> dict[str, File]:
    """Relative path without suffix -> picture, of a folder of conditions or masks; empty for None."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", "It holds a picture of the same name for each picture.")
    return {
        path.relative_to(folder).with_suffix("").as_posix(): File(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    }


def caption_of(path: Path, reading: Reading) -> tuple[tuple[str, ...], str | None]:
    """(captions beside a picture, why they cannot be used or None)."""
    try:
        return read_caption(path.with_suffix(reading.extension), reading.lines), None
    except DataError as error:
        return (), error.message


def _missing(
    stem: str, reading: Reading, conditions: Mapping[str, File], masks: Mapping[str, File]
) -> str | None:
    """What a picture lacks of what was asked for."""
    if reading.conditions is not None and stem not in conditions:
        return f"{stem} has no picture in {reading.conditions}"
    if reading.masks is not None and stem not in masks:
        return f"{stem} has no picture in {reading.masks}"
    return None


def _no_file(path: Path) -> str:
    """What something with a picture's name is instead."""
    if path.is_symlink():
        try:
            path.stat()
        except FileNotFoundError:
            return "it is a link to nothing"
        except OSError:
            return "it is a link in a loop of links"
    return "it is a folder" if path.is_dir() else "it is no file"
