"""The zip container of torch checkpoints, in the one strict form in which it cannot mean two things.

PyTorch writes its members uncompressed and aligned, so each is a piece of the file that can be mapped. Zip
readers disagree on everything else (two members of one name, a directory elsewhere, sizes that differ between
header and directory), so all of it is refused. Layout: PKWARE APPNOTE.TXT 6.3.10, 4.3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

from sfumato.checkpoints.ckpt.unpickle import MAX_PICKLE

MAX_ENTRIES = 20_000
MAX_DIRECTORY = 4 << 20  # bytes; 200 per member are plenty

END: Final = struct.Struct("<4s4H2LH")  # signature, disk, disk, here, total, size, offset, comment
END64: Final = struct.Struct(
    "<4sQ2H2L4Q"
)  # signature, length, made, needed, disk, disk, here, total, size, offset
LOCATOR: Final = struct.Struct("<4sLQL")
CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
LOCAL: Final = struct.Struct("<4s5H3L2H")
TAKEN_ELSEWHERE_16, TAKEN_ELSEWHERE_32 = 0xFFFF, 0xFFFFFFFF  # "look into the zip64 fields"
ENCRYPTED, SIZES_FOLLOW = 0x2041, 0x0008  # bits of the flags: encryption of any kind, data descriptor


@dataclass(frozen=True)
class Entry:
    """A member of the archive: `size` bytes at `start`, as they are. header: where its local header lies."""

    name: str
    header: int
    start: int
    size: int
    checksum: int


def read_entries(file: BinaryIO, file_size: int) -> dict[str, Entry]:
    """Name -> member. ValueError for whatever is not stored as it is, exactly once, inside the file."""
    count, size, offset = _directory(file, file_size)
    for value, limit, what in ((count, MAX_ENTRIES, "members"), (size, MAX_DIRECTORY, "bytes")):
        if value > limit:
            raise ValueError(f"its directory has {value} {what}, at most {limit} are read")
    directory = read_at(file, offset, size)
    entries: dict[str, Entry] = {}
    at = 0
    for _ in range(count):
        entry, at = _entry(file, directory, at, offset)
        if entry.name in entries:
            raise ValueError(f"it has two members of the name {entry.name[:80]!r}")
        entries[entry.name] = entry
    if at != size:
        raise ValueError("its directory is longer than its members")
    end = 0
    for entry in sorted(entries.values(), key=lambda each: each.header):
        if entry.header < end:
            raise ValueError(f"its member {entry.name[:80]!r} overlaps another")
        end = entry.start + entry.size
    return entries


def read_at(file: BinaryIO, start: int, count: int) -> bytes:
    """Exactly `count` bytes from `start`; ValueError where the file ends before."""
    file.seek(start)
    content = file.read(count)
    if len(content) != count:
        raise ValueError("it ends too early")
    return content


def _directory(file: BinaryIO, file_size: int) -> tuple[int, int, int]:
    """(members, bytes, offset) of the central directory, which must lie where the file's end says."""
    if file_size < END.size:
        raise ValueError("it ends too early")
    at = file_size - END.size
    end = END.unpack(read_at(file, at, END.size))
    if end[0] != b"PK\5\6" or end[-1]:
        raise ValueError("it does not end like a zip archive; it is cut off, or something was appended")
    disks, here, (count, size, offset) = end[1:3], end[3], end[4:7]
    if at >= LOCATOR.size + END64.size:
        locator = LOCATOR.unpack(read_at(file, at - LOCATOR.size, LOCATOR.size))
        if locator[0] == b"PK\6\7":
            at = locator[2]
            if at != file_size - END.size - LOCATOR.size - END64.size:
                raise ValueError("its zip64 directory lies somewhere else than before the end")
            wide = END64.unpack(read_at(file, at, END64.size))
            narrow = (TAKEN_ELSEWHERE_16, TAKEN_ELSEWHERE_32, TAKEN_ELSEWHERE_32)
            same = all(
                old in (new, gone)
                for old, new, gone in zip((count, size, offset), wide[7:10], narrow, strict=True)
            )
            if wide[0] != b"PK\6\6" or not same:
                raise ValueError("its two ends of the directory differ")
            disks, here, (count, size, offset) = (*wide[4:6], locator[1], locator[3] - 1), wide[6], wide[7:10]
    if any(disks) or here != count:
        raise ValueError("it is one part of several archives")
    if offset + size != at:
        raise ValueError("its directory does not lie before its end")
    return count, size, offset


def _entry(file: BinaryIO, directory: bytes, at: int, limit: int) -> tuple[Entry, int]:
    """(the member that the directory describes at `at`, the next place). limit: where members have ended."""
    if at + CENTRAL.size > len(directory):
        raise ValueError("its directory ends too early")
    (signature, _, _, flags, method, _, _, checksum, packed, size, name_length, extra_length, comment_length,
     disk, _, _, header) = CENTRAL.unpack_from(directory, at)  # fmt: skip
    at += CENTRAL.size
    after = at + name_length + extra_length + comment_length
    if signature != b"PK\1\2" or after > len(directory):
        raise ValueError("its directory is damaged")
    raw = directory[at : at + name_length]
    name = _name(raw)
    extra = directory[at + name_length : at + name_length + extra_length]
    size, packed, header = _wide(extra, size, packed, header)
    if method or flags & ENCRYPTED or size != packed or disk:
        raise ValueError(
            f"its member {name[:80]!r} is compressed or encrypted; torch stores members as they are"
        )
    if header + LOCAL.size > limit:
        raise ValueError(f"its member {name[:80]!r} lies outside of it")
    local = LOCAL.unpack(read_at(file, header, LOCAL.size))
    start = header + LOCAL.size + local[9] + local[10]
    if start + size > limit:
        raise ValueError(f"its member {name[:80]!r} would have {size} bytes, which the file has not")
    if local[0] != b"PK\3\4" or local[3] != method or local[2] != flags or local[9] != name_length:
        raise ValueError(f"header and directory differ on its member {name[:80]!r}")
    variable = read_at(file, header + LOCAL.size, local[9] + local[10])
    sizes = _wide(variable[name_length:], local[8], local[7], 0)[:2]
    unsaid = bool(flags & SIZES_FOLLOW) and set(sizes) <= {0, TAKEN_ELSEWHERE_32}
    if variable[:name_length] != raw or not (unsaid or sizes == (size, size)):
        raise ValueError(f"header and directory differ on its member {name[:80]!r}")
    return Entry(name, header, start, size, checksum), after


def _name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it has a member whose name is no text") from None
    parts = name.removesuffix("/").split("/")
    if not name.isprintable() or "\\" in name or not all(parts) or {".", ".."} & set(parts):
        raise ValueError(f"it has a member of the name {name[:80]!r}")
    return name


def _wide(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """(size, packed size, header offset), from the zip64 extra field where the short ones refer to it."""
    wanted = [value == TAKEN_ELSEWHERE_32 for value in (size, packed, header)]
    if not any(wanted):
        return size, packed, header
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1 and at + length <= len(extra) and length >= 8 * sum(wanted):
            numbers = iter(struct.unpack_from(f"<{sum(wanted)}Q", extra, at))
            values = zip((size, packed, header), wanted, strict=True)
            size, packed, header = (next(numbers) if elsewhere else value for value, elsewhere in values)
            return size, packed, header
        at += length
    return size, packed, header


@dataclass(frozen=True)
class Archive:
    """A torch archive: its pickle, and the members that hold numbers, by key."""

    pickle: bytes
    storages: Mapping[str, Entry]


def read_archive(file: BinaryIO, file_size: int) -> Archive:
    """Check a torch zip file and read what is small in it. ValueError where it is none."""
    entries = read_entries(file, file_size)
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} members data.pkl, a torch checkpoint has one")
    root = pickles[0].removesuffix("data.pkl")
    if root.count("/") != 1:
        raise ValueError(f"its data.pkl lies at {pickles[0][:80]!r}, a torch checkpoint has it in one folder")
    if root + "constants.pkl" in entries or any(name.startswith(root + "code/") for name in entries):
        raise ValueError("it is a TorchScript program; only its weights, saved by torch.save, can be read")
    if (order := entries.get(root + "byteorder")) and read_at(
        file, order.start, min(order.size, 8)
    ) != b"little":
        raise ValueError("its numbers are not in little-endian order")
    pickle = entries[pickles[0]]
    if pickle.size > MAX_PICKLE:
        raise ValueError(f"its pickle has {pickle.size} bytes, at most {MAX_PICKLE} are read")
    content = read_at(file, pickle.start, pickle.size)
    if pickle.checksum not in (0, zlib.crc32(content)):  # 0: torch.serialization.set_crc32_options(False)
        raise ValueError("the checksum of its data.pkl is wrong")
    storages = {
        name.removeprefix(root + "data/"): entry
        for name, entry in entries.items()
        if name.startswith(root + "data/")
    }
    return Archive(content, storages)
