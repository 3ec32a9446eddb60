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
from sfumato.errors import CheckpointError, InputError

TENSORS, INDEX = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class State:
    """Everything a run continues from: tensors by name and the number of images seen."""

    seen: int
    fingerprint: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save_state(root: Path, state: State, keep: int) -> Path:
    """Write `root/<images seen>/`, then delete all but the newest `keep` states."""
    final = root / f"{state.seen:012d}"
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    with disk_errors(final):
        shutil.rmtree(temporary, ignore_errors=True)
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
        for old in _states(root)[:-keep]:
            shutil.rmtree(old)
    return final


def latest_state(root: Path, fingerprint: Mapping[str, Any]) -> tuple[State | None, list[str]]:
    """(newest undamaged state or None if the run has none, a warning for each damaged one passed over).

    Raises `CheckpointError` if states exist and all are damaged, `InputError` if the newest belongs to another recipe.
    """
    warnings = []
    for stale in root.glob(".*.tmp"):
        shutil.rmtree(stale)
    for folder in reversed(_states(root)):
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if sha256(folder / TENSORS) != index["sha256"]:
                raise CheckpointError(f"{folder / TENSORS} does not have the digest it was written with")
            _same_recipe(index["fingerprint"], fingerprint, folder)
            return State(index["seen"], fingerprint, read_tensors(folder / TENSORS)[0]), warnings
        except InputError:
            raise
        except (OSError, ValueError, KeyError, CheckpointError) as error:
            warnings.append(f"training state {folder} is damaged and passed over: {error}")
    if warnings:
        raise CheckpointError(
            "\n".join(warnings), f"Delete {root} to begin again, or restore one of its folders."
        )
    return None, warnings


def _states(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("[0-9]*") if path.is_dir()) if root.is_dir() else []


def _same_recipe(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        raise InputError(
            f"{folder} was trained with another recipe: "
            + "; ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed),
            "Put the values back, or choose another `out` folder.",
        )
