"""Writes a picture set: lossless WebP in tar shards and rows as JSON lines, byte-equal for equal input."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from sfumato.data.pictures import Row

SHARD_PICTURES = 8192


def encode(picture: Image.Image) -> bytes:
    """An RGBA picture as lossless WebP; what colour a fully transparent pixel has is not kept."""
    file = io.BytesIO()
    picture.save(file, format="WEBP", lossless=True, quality=60, method=4, exact=False)
    return file.getvalue()


def write_shards(root: Path, pictures: Iterable[tuple[str, bytes]]) -> int:
    """Writes encoded pictures as members `<key>.webp` of `pictures-00000.tar`, ...; how many there were."""
    archive: tarfile.TarFile | None = None
    number = 0
    try:
        for number, (key, data) in enumerate(pictures, start=1):
            if archive is None or (number - 1) % SHARD_PICTURES == 0:
                if archive is not None:
                    archive.close()
                name = root / f"pictures-{(number - 1) // SHARD_PICTURES:05d}.tar"
                archive = tarfile.open(name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            info = tarfile.TarInfo(f"{key}.webp")  # owner, time and mode keep their fixed defaults
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    finally:
        if archive is not None:
            archive.close()
    return number


def write_rows(root: Path, rows: Iterable[Row]) -> None:
    """Writes `metadata.jsonl`, one row a line."""
    with (root / "metadata.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def digests(root: Path) -> dict[str, str]:
    """File name -> SHA-256 of the shards and the rows."""
    files = [*sorted(root.glob("pictures-*.tar")), root / "metadata.jsonl"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
