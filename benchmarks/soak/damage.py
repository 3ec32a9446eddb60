"""Damages the newest of two states in every kind of way: is the older, whole one used each time, and named?

The states hold made-up tensors and are written as a run writes them, by one process and as two would. The
newest is cut, flipped, swapped, emptied, edited and misnamed, one damage at a time (`kinds`), then by a bit
at random places until there are `--count` damages; each time it is asked what a run would go on from.

Run: python benchmarks/soak/damage.py --count 120 --out benchmarks/soak/results/damage.json
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

import torch

from sfumato.checkpoints.files import read_tensors, sha256, write_tensors
from sfumato.errors import CheckpointError
from sfumato.training.state import INDEX, State, latest_state, save_state, signed

RECIPE = {"seed": 1, "loop.batch": 4}
OLDER, NEWER = 8, 16
Damage = Callable[[Path], object]


def flipped(path: Path, place: float) -> None:
    """One bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    at = min(int(place * len(content)), len(content) - 1)
    content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def grown(path: Path, tail: bytes) -> None:
    path.write_bytes(path.read_bytes() + tail)


def zeroed(path: Path, begin: float, length: int) -> None:
    """A stretch of zeros, as a disk leaves that lost a block."""
    content = bytearray(path.read_bytes())
    at = int(begin * len(content))
    content[at : at + length] = (
        bytes(len(content[at : at + length])) if any(content[at : at + length]) else b"\1"
    )
    path.write_bytes(content)


def edited(path: Path, key: str, value: object, sign: bool) -> None:
    """An index that says something else, signed as if we had written it or not."""
    index = {**json.loads(path.read_text(encoding="utf-8")), key: value}
    path.write_text(json.dumps(signed(index) if sign else index), encoding="utf-8")


def of_another_state(path: Path) -> None:
    shutil.copyfile(path.parent.parent / f"{OLDER:012d}" / path.name, path)


def without(path: Path, key: str) -> None:
    """An index that lacks something, signed as if we had written it."""
    index = json.loads(path.read_text(encoding="utf-8"))
    del index[key]
    path.write_text(json.dumps(index if key == "index_sha256" else signed(index)), encoding="utf-8")


def other_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """A sound file of other tensors, whose digest the index does not have."""
    tensors = dict(read_tensors(path)[0])
    change(tensors)
    write_tensors(path, tensors, {})


def linked(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def kinds(names: list[str]) -> Iterator[tuple[str, Damage]]:
    """(what, damage), each of another kind. names: the files of a state."""
    tensors = [name for name in names if name != INDEX]
    digests = "sha256" if len(tensors) == 1 else "files"
    changes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "a tensor is missing": lambda found: found.pop("moment"),
        "a tensor more": lambda found: found.update(more=torch.ones(1)),
        "another shape": lambda found: found.update(weight=found["weight"].flatten()),
        "another type": lambda found: found.update(weight=found["weight"].half()),
        "another value": lambda found: found["weight"].add_(1),
    }
    for name in names:
        yield f"{name}: missing", lambda folder, name=name: (folder / name).unlink()
        yield f"{name}: empty", lambda folder, name=name: cut(folder / name, 0)
        yield (
            f"{name}: a folder",
            lambda folder, name=name: ((folder / name).unlink(), (folder / name).mkdir()),
        )
        yield f"{name}: of another state", lambda folder, name=name: of_another_state(folder / name)
        yield f"{name}: a link to nothing", lambda folder, name=name: linked(folder / name, "nowhere")
        yield f"{name}: a link to itself", lambda folder, name=name: linked(folder / name, name)
        other = names[names.index(name) - 1]
        yield (
            f"{name}: what {other} has",
            lambda folder, name=name, other=other: shutil.copyfile(folder / other, folder / name),
        )
        yield f"{name}: text after its end", lambda folder, name=name: grown(folder / name, b" {}")
        yield f"{name}: zeros after its end", lambda folder, name=name: grown(folder / name, bytes(4096))
        for share in (0.1, 0.5, 0.99):
            yield f"{name}: cut to {share}", lambda folder, n=name, s=share: cut(folder / n, s)
        for place in (0.0, 0.05, 0.3, 0.6, 1.0):
            yield f"{name}: a bit at {place}", lambda folder, n=name, p=place: flipped(folder / n, p)
        yield f"{name}: 64 zeros", lambda folder, name=name: zeroed(folder / name, 0.4, 64)
    for name in tensors:
        for what, change in changes.items():
            yield f"{name}: {what}", lambda folder, n=name, c=change: other_tensors(folder / n, c)
    for key in ("seen", "fingerprint", digests, "index_sha256"):
        yield f"{INDEX}: {key} is missing", lambda folder, key=key: without(folder / INDEX, key)
    wrong = "0" * 64 if digests == "sha256" else dict.fromkeys(tensors, "0" * 64)
    yield f"{INDEX}: other digests", lambda folder: edited(folder / INDEX, digests, wrong, True)
    yield f"{INDEX}: in UTF-16", lambda folder: recoded(folder / INDEX)
    for key, value in (
        ("seen", NEWER + 1), ("seen", str(NEWER)), ("seen", None), ("fingerprint", []), ("sha256", None),
        ("files", {"../x": "0"}), ("files", []), ("sharded", 1),
    ):  # fmt: skip
        if key not in ("sha256", "files", "sharded") or (key == "sha256") == (len(tensors) == 1):
            yield (
                f"{INDEX}: {key} = {value!r}",
                lambda folder, k=key, v=value: edited(folder / INDEX, k, v, True),
            )
    for key, value in (("seed", 2), ("fingerprint", {}), ("torch", "0"), ("threads", 99), ("future", 1)):
        yield f"{INDEX}: {key} is changed", lambda folder, k=key, v=value: edited(folder / INDEX, k, v, False)
    for text in ("", "[]", "null", "{", '{"seen": 16}', "\ufeff{}", "[" * 100_000):
        yield f"{INDEX}: is {text[:12]!r}", lambda folder, text=text: (folder / INDEX).write_text(text)
    yield "an empty folder", lambda folder: (shutil.rmtree(folder), folder.mkdir())
    yield "a name of another image", lambda folder: folder.rename(folder.with_name(f"{NEWER + 5:012d}"))


def flips(names: list[str], chance: random.Random) -> Iterator[tuple[str, Damage]]:
    """Endless (what, damage): one bit at a random place of a file."""
    while True:
        name, place = chance.choice(names), chance.random()
        yield f"{name}: a bit at {place:.3f}", lambda folder, n=name, p=place: flipped(folder / n, p)


def recoded(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-16")


def survives(root: Path, damage: Damage) -> str:
    """What is wrong after the newest of two states was damaged; empty if the older is used, and said."""
    damage(root / f"{NEWER:012d}")
    found, warnings = latest_state(root, RECIPE)
    if found is None or found.seen != OLDER:
        return f"went on from {found and found.seen}"
    if not torch.equal(found.tensors["weight"], torch.full((64, 3), float(OLDER))):
        return "the older state is another"
    if sum("is damaged and passed over" in warning for warning in warnings) != 1:
        return f"it was told {warnings}"
    shutil.rmtree(root / f"{OLDER:012d}")
    try:
        latest_state(root, RECIPE)
    except CheckpointError as error:
        return "" if "to begin again" in str(error) else f"the hint is {error.hint}"
    return "it would begin anew, silently"


def whole_states(root: Path) -> None:
    for seen in (OLDER, NEWER):
        tensors = {"weight": torch.full((64, 3), float(seen)), "moment": torch.full((5,), seen / 7)}
        save_state(root, State(seen, RECIPE, tensors), keep=2)


def in_two_files(root: Path) -> None:
    """As two processes would have written the states: each the half of the rows."""
    whole_states(root)
    for folder in root.iterdir():
        tensors, _ = read_tensors(folder / "tensors.safetensors")
        files = {}
        for rank in range(2):
            path = folder / f"tensors-{rank:05}-of-00002.safetensors"
            write_tensors(path, {name: tensor.chunk(2)[rank] for name, tensor in tensors.items()}, {})
            files[path.name] = sha256(path)
        sharded = {
            name: {"shape": list(t.shape), "begins": [0, -(-len(t) // 2)]} for name, t in tensors.items()
        }
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index = {key: value for key, value in index.items() if key != "sha256"}
        text = json.dumps(signed({**index, "files": files, "sharded": sharded}))
        (folder / INDEX).write_text(text, encoding="utf-8")
        (folder / "tensors.safetensors").unlink()


def soak(count: int, processes: int, seed: int) -> tuple[int, dict[str, str]]:
    """(number of kinds, what is wrong after each of `count` damages) of a state of 1 or 2 processes.

    Of every kind there is one, even if that makes more.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "whole"
        (whole_states if processes == 1 else in_two_files)(model)
        names = sorted(path.name for path in (model / f"{NEWER:012d}").iterdir())
        wrong = {}
        chance = random.Random(seed)  # noqa: S311 - places of damages, no secrets
        each = list(kinds(names))
        more = islice(flips(names, chance), max(0, count - len(each)))
        for number, (what, damage) in enumerate(chain(each, more)):
            root = Path(temporary) / str(number)
            shutil.copytree(model, root)
            wrong[f"{number}: {what}"] = survives(root, damage)
            shutil.rmtree(root)
        return len(each), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {}
    failed = {}
    for processes in (1, 2):
        different, wrong = soak(options.count, processes, options.seed)
        failed |= {f"{processes} processes, {what}": told for what, told in wrong.items() if told}
        result[f"{processes} processes"] = {
            "kinds": different,
            "damages": len(wrong),
            "an older state is used": list(wrong.values()).count(""),
        }
    print(json.dumps({**result, "failed": failed}, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
