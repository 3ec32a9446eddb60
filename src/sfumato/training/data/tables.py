"""Pictures that a table names: metadata.jsonl, .csv or .parquet, as Hugging Face's imagefolder has it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sfumato.errors import DataError, InputError, nearest
from sfumato.training.data.folder import beside
from sfumato.training.data.records import File, Listing, Reading, Record

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMNS = ("file_name", "image", "file")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
CONDITION_COLUMNS = ("conditioning_image", "conditioning_image_file_name")
MASK_COLUMNS = ("mask", "mask_file_name")
LABEL_COLUMNS = ("label", "class")
MAX_LINE = 4 << 20  # characters of one row
MAX_FIELD = 1 << 20

Row = Mapping[str, Any]


def table_of(root: Path) -> Path | None:
    """The table in a folder that names its pictures; None where there is none, as in an illustration set."""
    for name in NAMES:
        path = root / name
        if path.is_file() and (path.suffix != ".jsonl" or _names_files(path)):
            return path
    return None


def list_table(path: Path, reading: Reading) -> Listing:
    """The pictures of a table in its order.

    Raises `DataError` for a table that cannot be read, or a row without the name of a file; a file that is
    missing, or lies outside of the folder, is the fault of its record.
    """
    root, rows = path.parent, list(_rows(path))
    if not rows:
        raise DataError(f"{path} has no rows", "Each row names a picture in `file_name`.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    file_column = _column(columns, FILE_COLUMNS)
    if file_column is None:
        raise DataError(
            f"{path} has no column file_name, but {', '.join(columns)}", "Add it: it names files."
        )
    caption = caption_column(columns, reading, str(path))
    condition = _column(columns, CONDITION_COLUMNS)
    mask, label = _column(columns, MASK_COLUMNS), _column(columns, LABEL_COLUMNS)
    conditions, masks = beside(reading.conditions), beside(reading.masks)
    records, names = [], set()
    for number, row in enumerate(rows, start=1):
        name = row.get(file_column)
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}, row {number}: {file_column} is {name!r}", "Every row names a picture.")
        if name in names:
            raise DataError(f"{path}, row {number}: {name} a second time", "Put its captions into one list.")
        names.add(name)
        place, fault = _file(root, name)
        stem = str(PurePosixPath(name).with_suffix(""))
        extra = {}
        for what, column, folder in (("condition", condition, conditions), ("mask", mask, masks)):
            extra[what] = folder.get(stem)
            if column is not None and row.get(column):
                extra[what], wrong = _file(root, str(row[column]))
                fault = fault or (wrong and f"its {what}: {wrong}")
        captions, wrong = captions_of(row.get(caption) if caption else None)
        count = place.path.stat().st_size if fault is None else 0
        records.append(
            Record(name, count, captions, place, _label(row.get(label or "")), fault=fault or wrong, **extra)
        )
    return Listing(records, tuple(sorted({record.label for record in records if record.label is not None})))


def caption_column(columns: Sequence[str], reading: Reading, name: str) -> str | None:
    """The column of captions: the one asked for, or the first with a usual name."""
    if not reading.column:
        return _column(columns, CAPTION_COLUMNS)
    if reading.column not in columns:
        raise InputError(
            f"data.caption_column is {reading.column!r}, which {name} lacks", nearest(reading.column, columns)
        )
    return reading.column


def captions_of(value: object) -> tuple[tuple[str, ...], str | None]:
    """(the captions in a cell: none, one or several; why they cannot be used or None)."""
    match value:
        case None | "":
            return (), None
        case str():
            return (value.strip(),), None
        case [*several] if all(isinstance(each, str) for each in several):
            return tuple(each.strip() for each in several), None
    return (), f"its caption is no text: {str(value)[:80]}"


def _column(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    return next((name for name in usual if name in columns), None)


def _label(value: object) -> str | None:
    return None if value is None or value == "" else str(value)


def _file(root: Path, name: str) -> tuple[File, str | None]:
    """(a file below `root`, why it cannot be used or None)."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        return File(root), f"its file name points out of the folder: {name!r}"
    path = root / pure
    return File(path), None if path.is_file() else f"{path} does not exist"


def _names_files(path: Path) -> bool:
    """Whether a metadata.jsonl is of this kind: its first row names a file."""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in iter(lambda: lines.readline(MAX_LINE), "") if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and any(isinstance(row.get(column), str) for column in FILE_COLUMNS)


def _rows(path: Path) -> Iterator[Row]:
    try:
        if path.suffix == ".parquet":
            from sfumato.training.data.arrow import read_rows

            yield from read_rows(path)
            return
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _csv_rows(file) if path.suffix == ".csv" else _json_rows(file)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}", "Repair the table.") from error


def _json_rows(lines: Any) -> Iterator[Row]:
    for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE), ""), start=1):
        if len(line) >= MAX_LINE:
            raise ValueError(f"line {number} is longer than {MAX_LINE} characters")
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield row


def _csv_rows(lines: Any) -> Iterator[Row]:
    reader = csv.reader(lines)
    header = next(reader, [])
    for row in reader:
        if row and len(row) != len(header):
            raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header {len(header)}")
        if any(len(field) > MAX_FIELD for field in row):
            raise ValueError(f"line {reader.line_num} has a field longer than {MAX_FIELD} characters")
        if row:
            yield dict(zip(header, row, strict=True))
