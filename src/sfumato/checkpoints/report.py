"""What is in a model file, for people and for programs: parts, keys, evidence; no tensor is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints.files import sha256
from sfumato.checkpoints.opened import Opened
from sfumato.checkpoints.source import Source, TensorInfo

LISTED = 10  # names of each kind
SHOWN = 200  # characters of a value of the metadata


def report(opened: Opened, *, digest: bool = False) -> dict[str, Any]:
    """What was found as JSON values. digest: also the sha256 of every file, which reads all of it."""
    parts = {}
    for name, part in opened.parts.items():
        infos = [part.info(key) for key in part.names]
        parts[name] = {
            "parameters": sum(math.prod(pair.shape) for pair in part.mapping),
            "tensors": len(infos),
            "dtypes": dtypes(infos),
            "file": str(part.source.path),
        }
    values: dict[str, Any] = {
        "place": opened.place,
        "format": opened.format,
        "family": opened.family,
        "layout": opened.layout,
        "parts": parts,
        "prediction": None if opened.uncertain else opened.config.prediction,
        "prediction_evidence": opened.evidence,
        "latent_scale": opened.config.latent_scale,
        "image_size": list(opened.config.image_size),
        "keys": {
            "used": sum(part["tensors"] for part in parts.values()),
            "ignored": {rule: list(names) for rule, names in opened.ignored.items()},
            "unknown": list(opened.unknown),
        },
        "metadata": dict(opened.metadata),
        "notes": list(opened.notes),
    }
    if digest:
        values["sha256"] = {str(file): sha256(file) for file in opened.files}
    return values


def unknown_report(source: Source, reason: str, *, digest: bool = False) -> dict[str, Any]:
    """What can be said of a file that is no model known here."""
    values = {
        "place": str(source.path),
        "format": source.format,
        "family": None,
        "reason": reason,
        "tensors": len(source.infos),
        "parameters": sum(math.prod(info.shape) for info in source.infos.values()),
        "dtypes": dtypes(list(source.infos.values())),
        "first": {name: list(source.infos[name].shape) for name in list(source.infos)[:LISTED]},
        "metadata": dict(source.metadata),
        "notes": list(source.notes),
    }
    return values | ({"sha256": {str(source.path): sha256(source.path)}} if digest else {})


def dtypes(infos: list[TensorInfo]) -> list[str]:
    """Number formats, the most frequent first."""
    counts = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    return [name for name, _ in counts.most_common()]


def as_text(values: Mapping[str, Any]) -> str:
    """The lines of `sfumato inspect`."""
    lines = [printable(str(values["place"])), f"  format      {values['format']}"]
    if values["family"] is None:
        lines += [
            "  family      unknown",
            f"  tensors     {values['tensors']}, {values['parameters']:,} numbers, "
            f"{', '.join(values['dtypes'])}",
            *(f"    {printable(name)} {tuple(shape)}" for name, shape in values["first"].items()),
        ]
    else:
        lines += _known(values)
    for name, text in sorted(values["metadata"].items()):
        flat = printable(text)
        shown = flat if len(flat) <= SHOWN else f"{flat[:SHOWN]}... ({len(text)} characters)"
        lines.append(f"  metadata    {printable(name)}: {shown}")
    lines += [f"  note        {printable(note)}" for note in values["notes"]]
    for file, digest in values.get("sha256", {}).items():
        lines.append(f"  sha256      {digest} (AUTOV2 {digest[:10].upper()}) {printable(file)}")
    return "\n".join(lines)


def _known(values: Mapping[str, Any]) -> list[str]:
    lines = [
        f"  family      {values['family']}",
        f"  layout      {values['layout']}",
        f"  prediction  {values['prediction'] or 'unknown without loading'}: {values['prediction_evidence']}",
        f"  pictures    {'x'.join(str(side) for side in reversed(values['image_size']))}, latents times "
        f"{values['latent_scale']:g}",
    ]
    for name, part in values["parts"].items():
        lines.append(
            f"  {name:<11} {part['parameters']:,} parameters in {part['tensors']} tensors, "
            f"{', '.join(part['dtypes'])}"
        )
    keys = values["keys"]
    lines.append(f"  keys        {keys['used']} used")
    for rule, names in keys["ignored"].items():
        lines.append(f"    ignored   {len(names)}: {rule} ({some(names)})")
    if keys["unknown"]:
        lines.append(f"    unknown   {len(keys['unknown'])}: {some(keys['unknown'])}")
    return lines


def some(names: list[str]) -> str:
    """The first of many names."""
    first = ", ".join(printable(name) for name in names[:3])
    return f"{first}, ..." if len(names) > 3 else first


def printable(text: str) -> str:
    """A stranger's text on one line, without what would steer a terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
