"""Hugging Face `datasets` on the disk: Parquet shards that hold pictures, and folders of `save_to_disk`."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sfumato.errors import DataError, InputError, ResourceError
from sfumato.training.data.records import Given, Listing, Reading, Record
from sfumato.training.data.tables import (
    CONDITION_COLUMNS,
    LABEL_COLUMNS,
    MASK_COLUMNS,
    caption_column,
    captions_of,
)

if TYPE_CHECKING:
    import pyarrow as pa

PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture")
KEPT_BYTES = 256 << 20  # of decoded row groups, in memory
SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "dev")}
MAX_INFO = 16 << 20


class Table(Protocol):
    """A file of rows."""

    path: Path
    schema: pa.Schema
    length: int

    def columns(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """The columns of all rows, in order and in parts."""
        ...

    def cell(self, row: int, column: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture in a table: bytes, or a struct of them and a path."""

    table: Table
    row: int
    column: str

    def given(self) -> Given:
        value = self.table.cell(self.row, self.column)
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise InputError(f"row {self.row} of {self.table.path} holds no bytes", "Embed the pictures.")
        return data


class ParquetTable:
    """A Parquet file, of which the row groups read last are kept; reading from several threads is safe."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self.path = path
        self.file = parquet.ParquetFile(path)
        self.schema, self.length = self.file.schema_arrow, self.file.metadata.num_rows
        counts = [self.file.metadata.row_group(k).num_rows for k in range(self.file.num_row_groups)]
        self.groups = [(k, row) for k, count in enumerate(counts) for row in range(count)]
        self._kept: OrderedDict[tuple[int, str], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def columns(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        yield from self.file.iter_batches(columns=names)

    def cell(self, row: int, column: str) -> Any:
        group, place = self.groups[row]
        with self._lock:  # the file has one place it reads at
            table = self._kept.get((group, column))
            if table is None:
                table = self.file.read_row_group(group, columns=[column])
                self._kept[(group, column)] = table
                while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((group, column))
        return table.column(0)[place].as_py()


class ArrowTable:
    """A file of Arrow's stream format, mapped into memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            self.table = stream.read_all()
        self.table.validate(full=True)  # offsets of a damaged file would be followed blindly
        self.schema, self.length = self.table.schema, self.table.num_rows

    def columns(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        yield from self.table.select(names).to_batches()

    def cell(self, row: int, column: str) -> Any:
        return self.table.column(column)[row].as_py()


def list_parquet(paths: list[Path], split: str, reading: Reading) -> Listing:
    """The pictures whose bytes the Parquet files hold, in order.

    Where files are named train-... and test-... or validation-..., as on the hub, those of the split.
    """
    _require()
    own, apart = _files_of(paths, split)
    return _listing([_open(ParquetTable, path) for path in own], reading)._replace(apart=apart)


def list_saved(root: Path, split: str, reading: Reading) -> Listing:
    """The pictures of a `save_to_disk` folder; of one with splits those of the split.

    Where there is a split to train on and none that is held out, it is both.
    """
    _require()
    apart = False
    if (root / "dataset_dict.json").is_file():
        names = _read_json(root / "dataset_dict.json").get("splits", [])
        train, test = (next((n for n in SPLITS[each] if n in names), None) for each in ("train", "test"))
        if train is None:
            raise DataError(f"{root} has no split to train on", "Save one that is named train.")
        apart = test is not None
        root = root / (test if test is not None and split == "test" else train)
    files = _read_json(root / "state.json").get("_data_files", [])
    paths = [root / Path(str(file.get("filename"))).name for file in files if isinstance(file, dict)]
    if not paths:
        raise DataError(f"{root / 'state.json'} names no files", "Save the data set again.")
    return _listing([_open(ArrowTable, path) for path in paths], reading)._replace(apart=apart)


def _files_of(paths: list[Path], split: str) -> tuple[list[Path], bool]:
    """(the files of a split, whether their names tell splits apart)."""
    by_split = {
        name: [path for path in paths if path.name.split("-")[0].removesuffix(".parquet") in words]
        for name, words in SPLITS.items()
    }
    if not by_split["train"]:
        return paths, False
    return by_split[split] or by_split["train"], bool(by_split["test"])


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a small Parquet table."""
    _require()
    table = _open(ParquetTable, path)
    for batch in table.columns([field.name for field in table.schema]):
        yield from batch.to_pylist()


def _listing(tables: list[Any], reading: Reading) -> Listing:
    records: list[Record] = []
    names: tuple[str, ...] | None = None
    for table in tables:
        records += _records(table, reading)
        names = names or _class_names(table.schema)
    if names is not None:
        records = [_named(record, names) for record in records]
    classes = names or tuple(sorted({record.label for record in records if record.label is not None}))
    if not records:
        raise DataError("the tables have no rows", "Give others.")
    return Listing(records, classes)


def _records(table: Table, reading: Reading) -> Iterator[Record]:
    columns = [field.name for field in table.schema]
    picture = next((name for name in PICTURE_COLUMNS if name in columns), None)
    if picture is None:
        raise DataError(
            f"{table.path} has the columns {', '.join(columns)}",
            f"Pictures are expected in one of {', '.join(PICTURE_COLUMNS)}.",
        )
    caption = caption_column(columns, reading, str(table.path))
    beside = [
        next((name for name in usual if name in columns), None) for usual in (CONDITION_COLUMNS, MASK_COLUMNS)
    ]
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    row = 0
    for batch in table.columns([name for name in (picture, caption, label) if name is not None]):
        sizes = _lengths(batch.column(0))
        captions = batch.column(1).to_pylist() if caption else [None] * len(batch)
        labels = batch.column(batch.num_columns - 1).to_pylist() if label else [None] * len(batch)
        for size, words, number in zip(sizes, captions, labels, strict=True):
            texts, fault = captions_of(words)
            condition, mask = (Cell(table, row, name) if name else None for name in beside)
            yield Record(
                name=f"{table.path.name}/{row}",
                bytes=size or 0,
                captions=texts,
                place=Cell(table, row, picture),
                label=None if number is None else str(number),
                fault=fault if size else "it holds no bytes",
                condition=condition,
                mask=mask,
            )
            row += 1


def _lengths(column: Any) -> list[int | None]:
    """Bytes of every picture of a column; None where there are none."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_struct(column.type):
        if column.type.get_field_index("bytes") < 0:
            return [None] * len(column)
        column = compute.call_function("struct_field", [column], compute.StructFieldOptions("bytes"))
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return [None] * len(column)
    return compute.call_function("binary_length", [column]).to_pylist()


def _class_names(schema: pa.Schema) -> tuple[str, ...] | None:
    """The names of a ClassLabel column, which `datasets` keeps in the schema's metadata."""
    text = (schema.metadata or {}).get(b"huggingface", b"")
    try:
        values = json.loads(text[:MAX_INFO] or b"{}")
    except ValueError:
        return None  # someone else's metadata
    match values:
        case {"info": {"features": dict(features)}}:
            for name in LABEL_COLUMNS:
                match features.get(name):
                    case {"names": [*names]} if all(isinstance(each, str) for each in names):
                        return tuple(names)
    return None


def _named(record: Record, names: tuple[str, ...]) -> Record:
    label = record.label
    if label is None or not label.isdigit() or int(label) >= len(names):
        return record._replace(label=None)  # -1 is "unknown" there
    return record._replace(label=names[int(label)])


def _open(kind: type[Any], path: Path) -> Any:
    import pyarrow as pa

    try:
        return kind(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}", "Download or save it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(MAX_INFO))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}", "Save the data set again.") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is no object", "Save the data set again.")
    return values


def _require() -> None:
    """`ResourceError` without pyarrow, which nothing else needs."""
    from importlib.util import find_spec

    if find_spec("pyarrow") is None:
        raise ResourceError(
            "Parquet and Arrow files need pyarrow", "Install it: pip install 'sfumato[parquet]'."
        )
