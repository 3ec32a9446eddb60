"""Opens hostile files of weights under an audit hook: is each refused, and does none run, import or write?

Then opens harmless ones, whose tensors must equal what they were written from and what `torch.load` gives.

Seconds are of processor time, bytes beyond the size of the file.

Run: python benchmarks/soak/hostile.py --out benchmarks/soak/results/hostile.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.files import open_file
from sfumato.errors import CheckpointError, UnsafeCheckpointError

GENERATORS = Path(__file__).parents[2] / "tests" / "checkpoints"
EVENTS = (
    "os.", "subprocess.", "exec", "compile", "import", "socket.", "ctypes.", "shutil.", "pickle.", "marshal.",
    "code.", "function.", "urllib.", "pty.", "webbrowser.", "builtins.", "tempfile.", "sqlite3.",
)  # fmt: skip
HARMLESS = ("os.listdir", "os.scandir", "builtins.id")


def generator(name: str) -> ModuleType:
    """One of the generators that the tests use too; they are no package."""
    spec = importlib.util.spec_from_file_location(f"generators_{name}", GENERATORS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Sentinel:
    """Counts, while it watches, the events by which code shows itself; hooks cannot be removed again."""

    def __init__(self) -> None:
        self.watching = False
        self.seen: Counter[str] = Counter()
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            writes = isinstance(mode, str) and not set(mode).isdisjoint("wax+")
            if writes or (isinstance(flags, int) and flags & 0o1103):  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
                self.seen[event] += 1
        elif event.startswith(EVENTS) and event not in HARMLESS:
            self.seen[event] += 1

    @contextmanager
    def watch(self) -> Iterator[None]:
        self.watching = True
        try:
            yield
        finally:
            self.watching = False


def attempt(path: Path, mmap: bool) -> str:
    """What opening the file and reading all of it comes to."""
    try:
        source = open_file(path, mmap=mmap)
        for name in source.infos:
            source.tensor(name).clone()
    except UnsafeCheckpointError:
        return "unsafe"
    except CheckpointError:
        return "damaged"
    except Exception as error:  # what must not happen is counted
        return f"other: {type(error).__name__}"
    return "accepted"


def control(folder: Path, sentinel: Sentinel) -> None:
    """Let Python's own unpickler run a payload: the canary must be touched and the sentinel must hear it."""
    command = f"touch {folder / 'canary'}".encode()
    payload = b"\x80\2cos\nsystem\nX" + struct.pack("<I", len(command)) + command + b"\x85R."
    with sentinel.watch():
        pickle.loads(payload)  # noqa: S301 - made here
    assert sentinel.seen["os.system"] and sentinel.seen["pickle.find_class"] and (folder / "canary").exists()
    sentinel.seen.clear()
    (folder / "canary").unlink()


def run_hostile(folder: Path, count: int, sentinel: Sentinel) -> dict[str, Any]:
    canary, path = folder / "canary", folder / "file"
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    seconds, memory, touched = (0.0, ""), (0, ""), 0
    for name, content in generator("hostile").hostile(str(canary)):
        if sum(outcomes.values()) >= count:
            break
        path.write_bytes(content)
        with sentinel.watch():
            started = time.process_time()
            outcome = attempt(path, mmap=True)
            seconds = max(seconds, (time.process_time() - started, name))
            tracemalloc.start()
            again = attempt(path, mmap=False)
            memory = max(memory, (tracemalloc.get_traced_memory()[1] - len(content), name))
            tracemalloc.stop()
        outcomes[outcome] += 1
        if outcome not in ("unsafe", "damaged") or again != outcome:
            wrong.append(f"{name}: {outcome}, {again} without mmap")
        if canary.exists():
            touched += 1
            wrong.append(f"{name}: touched the canary")
            canary.unlink()
    return {
        "files": sum(outcomes.values()),
        "refused": outcomes["unsafe"] + outcomes["damaged"],
        "refused_as_unsafe": outcomes["unsafe"],
        "canaries": touched,
        "audit_events": dict(sentinel.seen),
        "worst_seconds": round(seconds[0], 3),
        "worst_seconds_file": seconds[1],
        "worst_bytes": memory[0],
        "worst_bytes_file": memory[1],
        "wrong": wrong,
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether names, types, shapes and every bit are equal."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == each.dtype
        and found[name].shape == each.shape
        and torch.equal(bits(found[name]), bits(each))
        for name, each in wanted.items()
    )


def by_torch(path: Path, benign: ModuleType) -> tuple[str, dict[str, Tensor]]:
    """(how, tensors) by torch itself; written here, the files may run what its own guard refuses."""
    with benign.classes(*benign.STANDING_IN):
        try:
            return "weights_only", benign.flattened(torch.load(path, weights_only=True))
        except Exception:  # whatever type torch's guard raises
            return "trusted", benign.flattened(torch.load(path, weights_only=False))


def run_benign(folder: Path) -> dict[str, Any]:
    benign = generator("benign")
    files = equal = 0
    ways: Counter[str] = Counter()
    wrong: list[str] = []
    for each in benign.benign(folder):
        files += 1
        try:
            source = open_file(each.path)
            found = {name: source.tensor(name) for name in source.infos}
            copied = open_file(each.path, mmap=False)
            again = {name: copied.tensor(name) for name in copied.infos}
            fine = same(found, each.tensors) and same(again, found)
            if each.path.suffix != ".safetensors":
                way, reference = by_torch(each.path, benign)
                fine = fine and same(found, reference)
                ways[way] += 1
        except Exception as error:  # a refusal here is what is looked for
            fine = False
            wrong.append(f"{each.name}: {error}")
        equal += fine
        if not fine:
            wrong.append(each.name)
    return {"benign": files, "benign_equal": equal, "compared_with_torch": dict(ways), "benign_wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10**6, help="at most this many hostile files")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = run_benign(Path(folder))  # first: it imports what reading imports
        sentinel = Sentinel()
        control(Path(folder), sentinel)
        result |= run_hostile(Path(folder), options.count, sentinel)
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if (
        result["wrong"]
        or result["benign_wrong"]
        or result["audit_events"]
        or result["files"] != result["refused"]
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
