"""Opens damaged files of weights by the thousand: does each load, or end in one family of errors, soon?

A dozen small files over all formats are flipped, cut, spliced and overwritten at random; children do the
reading, so that a signal is a figure and not the end.

Run: python benchmarks/soak/mutants.py --count 20000 --out benchmarks/soak/results/mutants.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sfumato.checkpoints.files import open_file
from sfumato.errors import SfumatoError

GENERATORS = Path(__file__).parents[2] / "tests" / "checkpoints"
SEEDS = (
    "zip, SD 1 in torch.float16", "zip, Lightning's extras", "zip, protocol 4", "zip, views of one storage",
    "zip, every number format", "zip, OmegaConf's settings", "zip, packed again without compression",
    "legacy, Lightning's extras", "legacy, protocol 4", "legacy, written by Python 2",
    "legacy, with views of storages", "safetensors, SD 1", "safetensors, SDXL", "safetensors, not aligned",
)  # fmt: skip
CHILD = 2000  # files that one child reads
PATIENCE = 600  # seconds of one child
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 16, 64, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1,
           2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
OPCODES = b"()]}.NRbcehjqrstuaKMJGXUTCBQio01" + bytes(range(0x80, 0x99))


def load(name: str) -> ModuleType:
    """One of the generators that the tests use too; they are no package."""
    spec = importlib.util.spec_from_file_location(f"generators_{name}", GENERATORS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


Mutation = Callable[[bytearray, random.Random, list[bytes]], None]


def flip(content: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    for _ in range(chance.randint(1, 4)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def overwrite(content: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    for _ in range(chance.randint(1, 6)):
        content[chance.randrange(len(content))] = chance.randrange(256)


def opcodes(content: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    for _ in range(chance.randint(1, 3)):
        content[chance.randrange(len(content))] = chance.choice(OPCODES)


def numbers(content: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    width = chance.choice((1, 2, 4, 8))
    place = chance.randrange(max(1, len(content) - width))
    content[place : place + width] = (chance.choice(NUMBERS) % 256**width).to_bytes(width, "little")


def digits(content: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    """Change a figure: in safetensors' headers these are shapes and offsets."""
    places = [place for place, value in enumerate(content[:4096]) if 48 <= value < 58]
    for _ in range(chance.randint(1, 2)):
        if places:
            content[chance.choice(places)] = chance.choice(b'0123456789-,[]"e')


def cut(content: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    del content[chance.randrange(len(content)) :]


def drop(content: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    place = chance.randrange(len(content))
    del content[place : place + chance.randint(1, 40)]


def splice(content: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    other = chance.choice(seeds)
    begin = chance.randrange(len(other))
    place = chance.randrange(len(content))
    length = chance.randint(1, 300)
    content[place : place + chance.choice((0, length))] = other[begin : begin + length]


def repeat(content: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    begin = chance.randrange(len(content))
    piece = content[begin : begin + chance.randint(1, 100)]
    content[begin:begin] = piece * chance.randint(1, 5)


def swap(content: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    length = chance.randint(1, 64)
    one, two = sorted(chance.randrange(max(1, len(content) - length)) for _ in range(2))
    if one + length <= two:
        content[one : one + length], content[two : two + length] = (
            content[two : two + length],
            content[one : one + length],
        )


MUTATIONS: tuple[Mutation, ...] = (flip, overwrite, opcodes, numbers, digits, cut, drop, splice, repeat, swap)


def mutant(number: int, seeds: list[bytes]) -> bytes:
    """The mutant of that number: always the same for the same seeds."""
    chance = random.Random(number)  # noqa: S311 - no secrets
    seed = seeds[number % len(seeds)]
    mutation = MUTATIONS[number // len(seeds) % len(MUTATIONS)]
    pickle = _pickle(seed)
    if pickle is None or chance.random() < 0.4:
        content = bytearray(seed)
        mutation(content, chance, seeds)
        return bytes(content)
    begin, end, checksum = pickle  # of a zip file: its checksum would catch the rest before it is read
    middle = bytearray(seed[begin:end])
    mutation(middle, chance, seeds)
    piece = bytes(middle[: end - begin]).ljust(end - begin, b"0")
    return seed[:begin] + piece + seed[end:checksum] + bytes(4) + seed[checksum + 4 :]


def _pickle(content: bytes) -> tuple[int, int, int] | None:
    """(begin, end, place of the checksum in the directory) of a zip file's data.pkl."""
    if not content.startswith(b"PK\3\4"):
        return None
    place = content.find(b"PK\1\2")
    while content[place + 46 : place + 46 + content[place + 28]].rpartition(b"/")[2] != b"data.pkl":
        place = content.find(b"PK\1\2", place + 4)
    size, header = (
        struct.unpack_from("<L", content, place + 24)[0],
        struct.unpack_from("<L", content, place + 42)[0],
    )
    name, extra = struct.unpack_from("<2H", content, header + 26)
    begin = header + 30 + name + extra
    return begin, begin + size, place + 16


def read(path: Path, mmap: bool) -> str:
    try:
        source = open_file(path, mmap=mmap)
        for name in source.infos:
            source.tensor(name).clone()
    except SfumatoError as error:
        return type(error).__name__
    return "read"


def child(start: int, stop: int, folder: Path) -> None:
    """Read the mutants of these numbers; prints a line for each start, so that a death can be placed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seeds = [(folder / str(number)).read_bytes() for number in range(len(SEEDS))]
    path = folder / f"mutant-{start}"
    for number in range(-len(seeds), 0):  # imports, caches
        path.write_bytes(seeds[number])
        read(path, mmap=True)
    outcomes: Counter[str] = Counter()
    seconds, memory = (0.0, 0), (0, 0)  # the worst, and which mutant
    failures: list[str] = []
    for number in range(start, stop):
        content = mutant(number, seeds)
        path.write_bytes(content)
        print(number, file=sys.stderr, flush=True)
        traced = number % 4 == 0  # tracing slows three times
        if traced:
            tracemalloc.start()
        started = time.process_time()
        try:
            outcomes[read(path, mmap=bool(number % 2))] += 1
        except Exception as error:  # what must not happen is counted
            failures.append(f"{number}: {type(error).__name__}: {error}")
        seconds = max(seconds, (time.process_time() - started, number))
        if traced:
            memory = max(memory, (tracemalloc.get_traced_memory()[1] - len(content), number))
            tracemalloc.stop()
    path.unlink()
    print(json.dumps({"outcomes": outcomes, "seconds": seconds, "memory": memory, "failures": failures}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1], options.folder)
        return
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    signals = 0
    seconds, memory = (0.0, 0), (0, 0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "seeds").mkdir()
        paths = {each.name: each.path for each in load("benign").benign(Path(folder) / "seeds")}
        for number, name in enumerate(SEEDS):
            (Path(folder) / str(number)).write_bytes(paths[name].read_bytes())
        for start in range(0, options.count, CHILD):
            stop = min(start + CHILD, options.count)
            command = [sys.executable, __file__, "--child", str(start), str(stop), "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)  # noqa: S603
            if done.returncode:
                last = done.stderr.splitlines()[-1:] or ["before the first"]
                signals += done.returncode < 0
                failures.append(f"{last[0]}: the child ended with {done.returncode}")
                continue
            told: dict[str, Any] = json.loads(done.stdout)
            outcomes.update(told["outcomes"])
            seconds, memory = max(seconds, (*told["seconds"],)), max(memory, (*told["memory"],))
            failures += told["failures"]
    result = {
        "files": options.count, "seeds": len(SEEDS), "outcomes": dict(outcomes), "signals": signals,
        "other_exceptions": len(failures), "failures": failures[:20], "worst_seconds": round(seconds[0], 3),
        "worst_bytes": memory[0],
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if failures or sum(outcomes.values()) != options.count:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
