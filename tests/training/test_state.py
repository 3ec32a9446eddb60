"""What a run keeps in its folder: states that are whole or passed over, one process, averaged weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfumato.checkpoints import files
from sfumato.errors import CheckpointError, InputError, NumericalError, ResourceError
from sfumato.training import state as states
from sfumato.training.ema import RAMP_UP, Ema
from sfumato.training.lock import locked
from sfumato.training.state import INDEX, TENSORS, State, latest_state, save_state, signed

RECIPE = {"seed": 1, "loop.batch": 4}


def state(seen: int, value: float | None = None) -> State:
    return State(seen, RECIPE, {"weight": torch.full((3,), float(seen if value is None else value))})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two states, of 8 and 16 images."""
    for seen in (8, 16):
        save_state(tmp_path / "states", state(seen), keep=2)
    return tmp_path / "states"


def newest(root: Path) -> int:
    found, warnings = latest_state(root, RECIPE)
    assert found is not None and warnings == []
    assert torch.equal(found.tensors["weight"], torch.full((3,), float(found.seen)))
    return found.seen


def test_the_newest_states_are_kept(root: Path) -> None:
    assert newest(root) == 16
    save_state(root, state(24), keep=2)
    assert sorted(path.name for path in root.iterdir()) == ["000000000016", "000000000024"]
    assert newest(root) == 24


def test_no_states_are_no_error(tmp_path: Path) -> None:
    assert latest_state(tmp_path / "states", RECIPE) == (None, [])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **changes: Any) -> None:
    """Change an index as if it had been written so."""
    path.write_text(json.dumps(signed({**json.loads(path.read_text()), **changes})))


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda folder: flip(folder / TENSORS),
    "tensors cut short": lambda folder: os.truncate(folder / TENSORS, 20),
    "tensors missing": lambda folder: (folder / TENSORS).unlink(),
    "index missing": lambda folder: (folder / INDEX).unlink(),
    "index cut short": lambda folder: os.truncate(folder / INDEX, 20),
    "index empty": lambda folder: os.truncate(folder / INDEX, 0),
    "index of bytes": lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe\x00"),
    "index a list": lambda folder: (folder / INDEX).write_text("[1]"),
    "index a number": lambda folder: (folder / INDEX).write_text("1"),
    "index without digest": lambda folder: rewrite(folder / INDEX, sha256=None),
    "index of another image": lambda folder: rewrite(folder / INDEX, seen=17),
    "no recipe in the index": lambda folder: rewrite(folder / INDEX, fingerprint=3),
    "index of another recipe": lambda folder: swap(folder / INDEX, '"seed": 1', '"seed": 2'),
    "index of another torch": lambda folder: swap(folder / INDEX, '"threads": ', '"threads": 1'),
    "index of no files": lambda folder: rewrite(folder / INDEX, sha256=None, files={}, sharded={}),
    "files elsewhere": lambda folder: rewrite(folder / INDEX, sha256=None, files={"../a": "0"}, sharded={}),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_state_is_passed_over_with_a_warning(root: Path, damage: Callable[[Path], object]) -> None:
    damage(root / "000000000016")
    found, warnings = latest_state(root, RECIPE)
    assert found is not None and found.seen == 8
    assert len(warnings) == 1 and "000000000016 is damaged and passed over" in warnings[0]
    damage(root / "000000000008")
    with pytest.raises(CheckpointError, match=r"(?s)000000000016.*000000000008.*Delete .*states"):
        latest_state(root, RECIPE)


def test_a_damaged_state_never_counts_as_one_that_is_kept(root: Path) -> None:
    flip(root / "000000000016" / TENSORS)
    save_state(root, state(12), keep=1)  # the run went on from 8
    assert [path.name for path in root.iterdir()] == ["000000000012"]
    assert newest(root) == 12


def test_a_state_is_written_over_its_damaged_self(root: Path) -> None:
    flip(root / "000000000016" / TENSORS)
    save_state(root, state(16), keep=2)
    assert newest(root) == 16


def test_another_recipe_is_refused_with_what_changed(root: Path) -> None:
    with pytest.raises(InputError, match=r"loop\.batch: 4 -> 8; new: None -> True; seed: 1 -> None"):
        latest_state(root, {"loop.batch": 8, "new": True})
    assert newest(root) == 16


def test_another_torch_or_thread_count_is_said(root: Path) -> None:
    rewrite(root / "000000000016" / INDEX, torch="1.0", threads=96)
    found, warnings = latest_state(root, RECIPE)
    assert found is not None and found.seen == 16
    assert warnings[0].startswith("torch: 1.0 so far, now ")
    assert warnings[1].startswith("threads: 96 so far, now ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(root: Path, value: float) -> None:
    with pytest.raises(NumericalError, match=r"weight is not finite at image 24; .* is good"):
        save_state(root, state(24, value), keep=1)
    assert newest(root) == 16 and len(list(root.iterdir())) == 2


class Disk:
    """Counts the calls of a save that reach the disk, and fails the one it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int) -> None:
        self.left, self.calls = fail_at, 0
        for owner, name in (
            (files, "save_file"), (os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "write_text"),
            (Path, "mkdir"), (states, "sha256"),
        ):  # fmt: skip
            patch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.left:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(*arguments, **options)

        return call


def test_a_failure_at_any_point_of_a_save_loses_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fail_at in range(30):
        with monkeypatch.context() as patch:
            disk = Disk(patch, fail_at)
            try:
                save_state(root, state(24), keep=2)
            except ResourceError as error:
                assert "cannot write" in error.message and "Input/output error" in error.message
            else:
                break
        assert not list(root.glob(".*"))
        if newest(root) == 24:  # renamed already, only the folder's own sync failed
            assert fail_at == disk.calls - 1
            shutil.rmtree(root / "000000000024")
        assert newest(root) == 16
    else:
        pytest.fail("the save never came to its end")
    assert fail_at >= 10 and newest(root) == 24


def test_an_interrupted_save_leaves_nothing_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(states, "sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state(root, state(24), keep=2)
    monkeypatch.undo()
    assert newest(root) == 16 and not list(root.glob(".*"))


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    leftovers = [
        tmp_path / ".model.safetensors.123.tmp",
        tmp_path / "previews" / ".000000016.png.9.tmp",
        tmp_path / "states" / ".000000000016.123.tmp" / "tensors.safetensors",
    ]
    others = [tmp_path / "notes.tmp", tmp_path / ".mine.tmp", tmp_path / "deep" / "er" / ".a.1.tmp"]
    for path in (*leftovers, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    with locked(tmp_path):
        pass
    assert not any(path.exists() for path in leftovers)
    assert list((tmp_path / "states").iterdir()) == []
    assert all(path.exists() for path in others)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(ResourceError, match=f"process {os.getpid()} is training in"):
            locked(tmp_path / "run").__enter__()
        assert (tmp_path / "run" / "lock").read_text() == f"{os.getpid()}\n"
    with locked(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sfumato.training.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    source = str(Path(states.__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": source},
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    with pytest.raises(ResourceError, match=f"process {child.pid} is training"), locked(tmp_path):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"), locked(tmp_path / "file" / "run"):
        pass


def averaged(half_life: int) -> tuple[nn.Linear, Ema]:
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.fill_(0.0)
    return module, Ema({"net": module}, half_life)


def set_weight(module: nn.Linear, value: float) -> None:
    with torch.no_grad():
        module.weight.fill_(value)


def test_the_average_has_a_closed_form() -> None:
    module, ema = averaged(half_life=100)
    start, batch = 1_000_000, 50  # so late that the half-life is not shortened
    for step in range(1, 11):
        set_weight(module, 1.0)
        ema.update(start + step * batch, batch)
    expected = 1 - 0.5 ** (10 * batch / 100)  # of a weight that was 0 and is 1 since
    assert torch.allclose(ema.average["net.weight"], torch.full((1, 2), expected), atol=1e-6)


def test_early_averages_forget_the_start() -> None:
    module, ema = averaged(half_life=1_000_000)
    set_weight(module, 1.0)
    ema.update(seen=400, batch=10)
    expected = 1 - 0.5 ** (10 / (400 * RAMP_UP))
    assert torch.allclose(ema.average["net.weight"], torch.full((1, 2), expected), atol=1e-6)


def test_without_a_half_life_the_average_is_the_newest_weight() -> None:
    module, ema = averaged(half_life=0)
    set_weight(module, 1 / 3)
    ema.update(seen=400, batch=10)
    assert torch.equal(ema.average["net.weight"], module.weight)


def test_the_average_is_lent_and_the_weights_come_back() -> None:
    module, ema = averaged(half_life=1000)
    set_weight(module, 1 / 3)
    ema.update(seen=400, batch=10)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(module.weight, ema.average["net.weight"])
        assert not torch.equal(module.weight, before["weight"])
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.weight.requires_grad
