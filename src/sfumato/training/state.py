"""Resumable training states: folders written whole or not at all, verified by digest when read back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.files import disk_errors, read_tensors, sha256, sync, write_tensors
from sfumato.errors import CheckpointError, InputError, NumericalError

TENSORS, INDEX = "tensors.safetensors", "state.json"
WITHOUT_EFFECT = {"data.workers"}  # keys of a recipe that change nothing but the speed


@dataclass(frozen=True)
class State:
    """Everything a run continues from: tensors by name and the number of images seen."""

    seen: int
    fingerprint: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save_state(root: Path, state: State, keep: int) -> Path:
    """Write `root/<images seen>/`, then delete all but the newest `keep` states.

    Raises `NumericalError` before anything is written if a tensor is not finite, `ResourceError` if the disk
    is full or cannot be written.
    """
    for name, tensor in state.tensors.items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(
                f"{name} is not finite at image {state.seen}; the last state in {root} is good",
                "Lower optimizer.learning_rate.",
            )
    final = root / f"{state.seen:012d}"
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    with disk_errors(final):
        try:
            temporary.mkdir(parents=True)
            write_tensors(temporary / TENSORS, state.tensors, {})
            index = {
                "seen": state.seen,
                "fingerprint": dict(state.fingerprint),
                "sha256": sha256(temporary / TENSORS),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
            (temporary / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
            sync(temporary / INDEX)
            sync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync(root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        # States beyond this one were damaged, or the run would have gone on from them.
        kept = [folder for folder in _states(root) if folder.name <= final.name][-keep:]
        for folder in _states(root):
            if folder not in kept:
                shutil.rmtree(folder)
    return final


def latest_state(root: Path, fingerprint: Mapping[str, Any]) -> tuple[State | None, list[str]]:
    """(newest undamaged state or None if the run has none, warnings).

    Warnings tell of damaged states that were passed over, and of what will make the weights differ from those
    of an uninterrupted run. Raises `CheckpointError` if states exist and all are damaged, `InputError` if the
    newest belongs to another recipe.
    """
    warnings: list[str] = []
    for folder in reversed(_states(root)):
        try:
            index = _read_index(folder)
            if sha256(folder / TENSORS) != index["sha256"]:
                raise CheckpointError(f"{folder / TENSORS} does not have the digest it was written with")
            tensors, _ = read_tensors(folder / TENSORS)
        except (OSError, ValueError, KeyError, CheckpointError) as error:
            warnings.append(f"training state {folder} is damaged and passed over: {error!s}")
            continue
        _same_recipe(index["fingerprint"], fingerprint, folder)
        for name, now in (("torch", torch.__version__), ("threads", torch.get_num_threads())):
            if index.get(name) != now:
                warnings.append(f"{name}: {index.get(name)} so far, now {now}; weights will not be bit-equal")
        return State(index["seen"], fingerprint, tensors), warnings
    if warnings:
        raise CheckpointError(
            "\n".join(warnings), f"Delete {root} to begin again, or restore one of its folders."
        )
    return None, warnings


def _states(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("[0-9]*") if path.is_dir())


def _read_index(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    match index:
        case {"seen": int(seen), "fingerprint": dict(), "sha256": str()} if folder.name == f"{seen:012d}":
            return index
    raise CheckpointError(f"{folder / INDEX} is not the index of this state")


def _same_recipe(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    keys = (old.keys() | new.keys()) - WITHOUT_EFFECT
    changed = sorted(key for key in keys if old.get(key) != new.get(key))
    if changed:
        raise InputError(
            f"{folder} was trained with another recipe: "
            + "; ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed),
            "Put the values back, or choose another `out` folder.",
        )
