"""Whatever happens to a disk, a whole state survives, is used, and what happened is said."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sfumato.checkpoints import files
from sfumato.errors import ResourceError
from sfumato.training import state as states
from sfumato.training.state import State, latest_state, save_state

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak" / "damage.py"
RECIPE = {"seed": 1}
CALLS = (
    (files, "save_file"), (os, "fsync"), (Path, "open"), (Path, "replace"), (Path, "rename"),
    (Path, "write_text"), (Path, "mkdir"), (Path, "touch"), (Path, "chmod"), (states, "sha256"),
    (shutil, "rmtree"),
)  # fmt: skip
ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)


def state(seen: int) -> State:
    return State(seen, RECIPE, {"weight": torch.full((3,), float(seen))})


def newest(root: Path) -> int:
    found, warnings = latest_state(root, RECIPE)
    assert found is not None and warnings == []
    assert torch.equal(found.tensors["weight"], torch.full((3,), float(found.seen)))
    return found.seen


class Disk:
    """Counts the calls that reach the disk, and fails `times` of them from the one it is told on."""

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int, times: int, number: int) -> None:
        self.failing, self.calls, self.number = range(fail_at, fail_at + times), 0, number
        for owner, name in CALLS:
            patch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if options.get("ignore_errors"):  # what is thrown away may stay
                return function(*arguments, **options)
            self.calls += 1
            if self.calls - 1 in self.failing:
                raise OSError(self.number, os.strerror(self.number))
            return function(*arguments, **options)

        return call


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One state, of 8 images; failed writes are tried again at once."""
    monkeypatch.setattr(states, "PAUSE", 0.0)
    save_state(tmp_path / "states", state(8), keep=1)
    return tmp_path / "states"


@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
def test_a_failure_of_every_call_is_tried_again(
    root: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at, told = 0, [""]
    for fail_at in range(60):
        told: list[str] = []
        with monkeypatch.context() as patch:
            disk = Disk(patch, fail_at, 1, number)
            save_state(
                root, state(16), 1, retries=1, report=lambda line, told=told: told.append(line["warning"])
            )
        assert [path.name for path in root.iterdir()] == ["000000000016"] and newest(root) == 16
        if disk.calls <= fail_at:
            break
        assert len(told) == 1 and os.strerror(number) in told[0] and "trying again" in told[0]
        shutil.rmtree(root)
        save_state(root, state(8), 1)
    assert 12 <= fail_at < 50 and told == []


@pytest.mark.parametrize("retries", [0, 2])
def test_a_disk_that_stays_broken_costs_no_state(
    root: Path, retries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fail_at in range(60):
        with monkeypatch.context() as patch:
            disk = Disk(patch, fail_at, 10_000, errno.ENOSPC)
            try:
                save_state(root, state(16), 1, retries=retries)
            except ResourceError as error:
                assert "No space left" in error.message and error.hint
        left = {path.name for path in root.iterdir() if not path.name.startswith(".")}
        assert newest(root) in (8, 16) and left <= {"000000000008", "000000000016"}
        if disk.calls <= fail_at:
            break
        shutil.rmtree(root)
        save_state(root, state(8), 1)
    assert newest(root) == 16


def test_a_full_disk_is_told_in_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(
        ResourceError, match=r"cannot write .*16.*: No space left .* \(12 bytes needed, [\d,]+ free\)"
    ):
        save_state(root, state(16), 1)
    assert newest(root) == 8


def test_a_folder_that_nobody_may_write(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser may write everywhere")
    root.chmod(0o500)
    try:
        with pytest.raises(ResourceError, match="Permission denied"):
            save_state(root, state(16), 1)
    finally:
        root.chmod(0o700)
    assert newest(root) == 8


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak_damage", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("processes", [1, 2])
def test_an_older_state_survives_damages_of_the_newest(soak: ModuleType, processes: int) -> None:
    kinds, found = soak.soak(66, processes, 0)
    assert len(found) >= kinds >= 66 and {what: told for what, told in found.items() if told} == {}
