"""What a scan of a data set found, as text for people and as JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from sfumato.training.data.buckets import assigned
from sfumato.training.data.dataset import Size
from sfumato.training.data.open import bucket_rules
from sfumato.training.data.scan import Scan
from sfumato.training.settings_data import BucketConfig, DataConfig


def as_text(found: Scan, size: int | None = None) -> str:
    """Every finding on a line of its own, then the counts; size: `data.size` whose buckets are shown."""
    lines = [
        _printable(f"{'odd' if finding.used else 'unusable'}: {finding.name}: {finding.reason}")
        for finding in found.findings
    ]
    lines.append(
        f"{found.pictures} pictures, {found.captioned} with captions, {len(found.classes)} classes, "
        f"{len(found.unusable)} unusable, {len(found.findings) - len(found.unusable)} odd"
    )
    if size is not None:
        lines += [
            f"{height}x{width}: {count}" for (height, width), count in buckets_of(found, size).most_common()
        ]
    return "\n".join(lines)


def as_json(found: Scan, size: int | None = None) -> str:
    """The same as one object."""
    values = {
        "pictures": found.pictures,
        "captioned": found.captioned,
        "classes": found.classes,
        "unusable": {finding.name: finding.reason for finding in found.findings if not finding.used},
        "odd": [[finding.name, finding.reason] for finding in found.findings if finding.used],
    }
    if size is not None:
        values["buckets"] = [[*key, count] for key, count in buckets_of(found, size).most_common()]
    return json.dumps(values, ensure_ascii=False, indent=1)


def buckets_of(found: Scan, size: int) -> Counter[Size]:
    """(height, width) -> pictures, with `data.buckets = true` at a `data.size`."""
    rules = bucket_rules(DataConfig(path=Path(), size=size, buckets=BucketConfig()))
    assert rules is not None
    originals = list(found.sizes.elements())
    return Counter(size for size in assigned(originals, rules) if size is not None)


def _printable(text: str) -> str:
    """Names of strangers' files may hold commands to the terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
