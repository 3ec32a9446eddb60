"""Stand-ins for the npm tarballs: every style draws every object of the small domain as a coloured disc."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sfumato.data import emoji, illustrations, objects, packages
from sfumato.data.emoji import STYLES, slug
from sfumato.data.split import unit
from sfumato.data.words import parse_list

SMALL_LABELS = [entry.rstrip(" *").partition(" =")[0].strip() for entry in parse_list(objects.SMALL)]
CODES = {label: f"{0x1F300 + number:X}" for number, label in enumerate(SMALL_LABELS)}


def write_tarball(path: Path, members: Mapping[str, Any]) -> str:
    """Writes a .tgz with JSON members; its SHA-256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def disc(*names: str) -> str:
    """An SVG body whose colour and radius are a function of the names."""
    red, green, blue = (int(255 * unit("disc", axis, *names)) for axis in "rgb")
    radius = 20 + 30 * unit("radius", *names)
    return f'<circle cx="64" cy="64" r="{radius:.2f}" fill="rgb({red},{green},{blue})"/>'


@pytest.fixture(scope="session")
def tarballs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of synthetic tarballs under their pinned names, and their digests by package name."""
    folder = tmp_path_factory.mktemp("npm")
    entries = [{"label": label, "hexcode": code, "group": 3, "tags": []} for label, code in CODES.items()]
    entries.append({"label": "regional indicator A", "hexcode": "1F1E6"})
    digests = {
        packages.LABELS.name: write_tarball(
            folder / packages.LABELS.file_name, {"package/en/data.json": entries}
        )
    }
    for style in STYLES:
        icons = {slug(label): {"body": disc(style, label)} for label in SMALL_LABELS}
        members = {
            "package/icons.json": {"icons": icons, "width": 128, "height": 128},
            "package/chars.json": {code.lower(): slug(label) for label, code in CODES.items()},
        }
        package = packages.ART[style]
        digests[package.name] = write_tarball(folder / package.file_name, members)
    return folder, digests


@pytest.fixture(scope="module")
def npm_dir(tarballs: tuple[Path, dict[str, str]]) -> Iterator[Path]:
    """The folder of synthetic tarballs, with the pins changed to their digests."""
    folder, digests = tarballs
    labels = dataclasses.replace(packages.LABELS, sha256=digests[packages.LABELS.name])
    art = {
        style: dataclasses.replace(package, sha256=digests[package.name])
        for style, package in packages.ART.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        for module in (emoji, illustrations):
            patch.setattr(module, "LABELS", labels)
            patch.setattr(module, "ART", art)
        yield folder


@pytest.fixture(scope="module")
def tiny_domain() -> Iterator[None]:
    """The small domain with a handful of avatars and scenes."""
    domain = illustrations.DOMAINS["small"]
    tiny = dataclasses.replace(
        domain,
        avatars=domain.avatars[:1],
        avatars_train=6,
        avatars_test=2,
        scenes_train=150,
        scenes_test=20,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(illustrations.DOMAINS, "small", tiny)
        yield
