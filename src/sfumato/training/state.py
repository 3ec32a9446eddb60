"""Resumable training states: folders written whole or not at all, verified by digest when read back.

One process writes one file of tensors. Several write one each, of their rows of sharded tensors and of some
of the others; any number of processes reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.files import disk_errors, open_file, read_tensors, sha256, sync, write_tensors
from sfumato.checkpoints.source import Source
from sfumato.errors import CheckpointError, InputError, NumericalError, ResourceError
from sfumato.training.distributed import ALONE, Processes
from sfumato.training.sharding import is_sharded, local, rows

TENSORS, INDEX = "tensors.safetensors", "state.json"
DAMAGE = (OSError, ValueError, KeyError, RecursionError, CheckpointError)  # what damage raises
PAUSE = 1.0  # seconds before a failed write is tried again; twice as long each time
WITHOUT_EFFECT = {"data.workers", "data.max_bad"}  # keys of a recipe that change nothing but the speed


@dataclass(frozen=True)
class State:
    """Everything a run continues from: tensors by name and the number of images seen."""

    seen: int
    fingerprint: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Joined(Mapping[str, Tensor]):
    """The tensors of several files, whose rows are put together when they are asked for."""

    def __init__(self, files: list[Source], sharded: Mapping[str, Any]) -> None:
        self._files, self._sharded = files, sharded
        self._names = dict.fromkeys(name for file in files for name in file.infos)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.tensor(name) for file in self._files if name in file.infos]
        if not parts:
            raise KeyError(name)
        return torch.cat(parts) if name in self._sharded else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_state(
    root: Path,
    state: State,
    keep: int,
    processes: Processes = ALONE,
    retries: int = 0,
    report: Callable[[Mapping[str, str]], None] = lambda _: None,
) -> Path:
    """Write `root/<images seen>/`, then delete all but the newest `keep` states; all processes call it.

    retries: times that a failed write is tried again, after pauses and a warning to `report`. Raises
    `NumericalError` before anything is written if a tensor is not finite, `ResourceError` if the disk is full
    or cannot be written; where one process raises, all do.
    """
    processes.together(lambda: _check_finite(root, state))
    final = root / f"{state.seen:012d}"
    _patiently(lambda: _save(final, state, processes), retries, report)
    # Apart from the writing: a state that is whole already is not written over when old ones cannot go.
    _patiently(lambda: processes.first_does(lambda: _trim(final, keep)), retries, report)
    return final


def _patiently(action: Callable[[], None], retries: int, report: Callable[[Mapping[str, str]], None]) -> None:
    for attempt in range(retries):
        try:
            return action()
        except ResourceError as error:
            pause = PAUSE * 2**attempt
            report({"warning": f"{error.message}; trying again in {pause:g} s"})
            time.sleep(pause)
    return action()


def _save(final: Path, state: State, processes: Processes) -> None:
    temporary = final.with_name(f".{final.name}.{processes.gathered(os.getpid())[0]}.tmp")
    name = TENSORS
    if processes.world > 1:
        name = f"tensors-{processes.rank:05}-of-{processes.world:05}.safetensors"
    try:
        processes.first_does(lambda: _make(temporary, final))
        digest = processes.together(lambda: _write(temporary / name, final, state, processes))
        files = dict(processes.gathered([name, digest]))
        index = {
            "seen": state.seen,
            "fingerprint": dict(state.fingerprint),
            **({"sha256": digest} if processes.world == 1 else _layout(state, files)),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        processes.first_does(lambda: _publish(temporary, final, index))
    finally:
        if processes.first:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_finite(root: Path, state: State) -> None:
    for name, tensor in state.tensors.items():
        if not torch.isfinite(local(tensor)).all():
            raise NumericalError(
                f"{name} is not finite at image {state.seen}; the last state in {root} is good",
                "Lower optimizer.learning_rate.",
            )


def _make(temporary: Path, final: Path) -> None:
    with disk_errors(final):
        temporary.mkdir(parents=True)


def _write(path: Path, final: Path, state: State, processes: Processes) -> str:
    """Write what this process keeps, and return the file's digest."""
    mine = _mine(state.tensors, processes)
    try:
        with disk_errors(final):
            write_tensors(path, mine, {})
            return sha256(path)
    except ResourceError as error:
        needed = sum(tensor.nbytes for tensor in mine.values())
        free = shutil.disk_usage(final.parent).free
        message = f"{error.message} ({needed:,} bytes needed, {free:,} free)"
        raise ResourceError(message, error.hint) from error


def _mine(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """This process's rows of sharded tensors, and its part of the others, so that all write equally much."""
    written = [0] * processes.world
    mine = {}
    for name, tensor in sorted(tensors.items()):  # a resumed run has them in another order
        if is_sharded(tensor):
            if local(tensor).numel():  # fewer rows than processes leave the last without any
                mine[name] = local(tensor)
            continue
        lightest = written.index(min(written))
        written[lightest] += tensor.nbytes
        if lightest == processes.rank:
            mine[name] = tensor
    return mine


def _layout(state: State, files: Mapping[str, str]) -> dict[str, Any]:
    """The part of the index that tells of several files: digests, and where the rows of tensors begin."""
    world = len(files)
    return {
        "files": dict(files),
        "sharded": {
            name: {
                "shape": list(tensor.shape),
                "begins": [rows(tensor.shape[0], rank, world)[0] for rank in range(world)],
            }
            for name, tensor in sorted(state.tensors.items())
            if is_sharded(tensor)
        },
    }


def _publish(temporary: Path, final: Path, index: Mapping[str, Any]) -> None:
    """Write the index and give the folder its name."""
    with disk_errors(final):
        (temporary / INDEX).write_text(json.dumps(signed(index), indent=1), encoding="utf-8")
        sync(temporary / INDEX)
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(final.parent)


def _trim(final: Path, keep: int) -> None:
    """Delete all but the newest `keep` states up to `final`.

    States beyond it were damaged, or the run would have gone on from them.
    """
    with disk_errors(final):
        states = _states(final.parent)
        kept = [folder for folder in states if folder.name <= final.name][-keep:]
        for folder in states:
            if folder not in kept:
                shutil.rmtree(folder)


def signed(index: Mapping[str, Any]) -> dict[str, Any]:
    """An index with the digest of all else that it says, so that it is seen to be damaged."""
    said = {key: value for key, value in index.items() if key != "index_sha256"}
    text = json.dumps(said, sort_keys=True).encode()
    return {**said, "index_sha256": hashlib.sha256(text).hexdigest()}


def latest_state(
    root: Path, fingerprint: Mapping[str, Any], processes: Processes = ALONE
) -> tuple[State | None, list[str]]:
    """(newest undamaged state or None if the run has none, warnings); all processes call it.

    Warnings tell of damaged states that were passed over, and of what will make the weights differ from those
    of an uninterrupted run. Raises `CheckpointError` if states exist and all are damaged, `InputError` if the
    newest belongs to another recipe.
    """
    warnings: list[str] = []
    found = processes.first_does(lambda: _verified(root, fingerprint, processes.world, warnings))
    name = processes.gathered(found and found.name)[0]
    if name is None:
        return None, warnings
    return processes.together(lambda: _opened(root / name)), warnings


def _verified(root: Path, fingerprint: Mapping[str, Any], world: int, warnings: list[str]) -> Path | None:
    """The folder of the newest undamaged state."""
    for folder in reversed(_states(root)):
        try:
            index = _read_index(folder)
            for name, digest in _files(index).items():
                if sha256(folder / name) != digest:
                    raise CheckpointError(f"{folder / name} does not have the digest it was written with")
            _opened(folder)
        except DAMAGE as error:
            warnings.append(f"training state {folder} is damaged and passed over: {error!s}")
            continue
        _same_recipe(index["fingerprint"], fingerprint, folder)
        now = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processes": world}
        before = {**index, "processes": len(_files(index))}
        for name in now:
            if before.get(name) != now[name]:
                warnings.append(
                    f"{name}: {before.get(name)} so far, now {now[name]}; weights will not be bit-equal"
                )
        return folder
    if warnings:
        raise CheckpointError(
            "\n".join(warnings), f"Delete {root} to begin again, or restore one of its folders."
        )
    return None


def _opened(folder: Path) -> State:
    index = _read_index(folder)
    if "sha256" in index:
        tensors: Mapping[str, Tensor] = read_tensors(folder / TENSORS)[0]
    else:
        tensors = Joined([open_file(folder / name) for name in index["files"]], index["sharded"])
    return State(index["seen"], index["fingerprint"], tensors)


def _files(index: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each file of tensors by its name."""
    return {TENSORS: index["sha256"]} if "sha256" in index else dict(index["files"])


def _states(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("[0-9]*") if path.is_dir())


def _read_index(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    match index:
        case {"seen": int(seen), "fingerprint": dict(), "sha256": str()}:
            fits = True
        case {"seen": int(seen), "fingerprint": dict(), "files": dict(files), "sharded": dict()}:
            fits = all(isinstance(digest, str) and Path(name).name == name for name, digest in files.items())
        case _:
            seen, fits = 0, False
    if not fits or folder.name != f"{seen:012d}" or signed(index) != index:
        raise CheckpointError(f"{folder / INDEX} is not the index of this state")
    return index


def _same_recipe(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    keys = (old.keys() | new.keys()) - WITHOUT_EFFECT
    changed = sorted(key for key in keys if old.get(key) != new.get(key))
    if changed:
        raise InputError(
            f"{folder} was trained with another recipe: "
            + "; ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed),
            "Put the values back, or choose another `out` folder.",
        )
