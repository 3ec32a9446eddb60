"""Kills tiny training runs at random moments, some inside a save: are the resumed weights bit-equal?

Every kind of training is a row of `KINDS`; another recipe is `--recipe file.toml`. Of two processes one is
killed, torchrun ends the other, and the same command goes on.

Run: python benchmarks/soak/kills.py --kills 20 --out benchmarks/soak/results/kills.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints.files import read_tensors
from sfumato.data.shapes import write_shapes

LOOP = """
[loop]
images = {images}
batch = 8
ema_images = 200
log_images = 80
save_images = 32
preview_images = 480
"""
SHAPES = """
[data]
path = "{data}"
size = 16
workers = 1
"""
SCRATCH = """
task = "diffusion"
[diffusion]
vocabulary = 600
steps = 2
prompts = ["a red circle"]
[unet]
in_channels = 3
out_channels = 3
model_channels = 16
channel_mult = [1, 2]
num_res_blocks = 1
attention_resolutions = [2]
num_head_channels = 16
use_spatial_transformer = true
context_dim = 32
dropout = 0.1
num_groups = 8
[text]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 16
vocab_size = 600
eos_token_id = 1
"""
GAN = """
task = "autoencoder"
[autoencoder]
adversarial = "hinge"
perceptual = "ssim"
disc_start = 200
disc_layers = 1
disc_width = 8
preview_images = 32
[first_stage]
ch = 8
ch_mult = [1, 2]
num_res_blocks = 1
z_channels = 2
embed_dim = 2
resolution = 16
num_groups = 4
"""
FINETUNE = """
task = "finetune"
[finetune]
model = "{base}"
prompts = ["a red circle"]
"""
LORA = f"""{FINETUNE}method = "lora"
[finetune.lora]
rank = 2
dropout = 0.1
"""
INVERSION = f"""{FINETUNE}method = "textual_inversion"
[finetune.inversion]
word = "shape"
vectors = 2
"""


@dataclass(frozen=True)
class Kind:
    """A kind of training: its recipe but for data, loop and out, and how many processes share it."""

    recipe: str
    processes: int = 1
    images: int = 960


KINDS = {
    "scratch diffusion": Kind(SCRATCH),
    "autoencoder with GAN": Kind(GAN),
    "LoRA": Kind(LORA),
    "textual inversion": Kind(INVERSION),
    "two processes": Kind(SCRATCH, processes=2, images=480),
    "two processes, sharded": Kind(SCRATCH, processes=2, images=480),
}
OVERRIDES = {"two processes, sharded": ['--loop.parallel="fsdp"']}
BASED = ("LoRA", "textual inversion")  # on a model of a few steps
IN_SAVE = 3  # every third kill waits for a half-written state
FINISHED = "finished"
PATIENCE = 300  # seconds after which a child that does nothing is a failure


@dataclass(frozen=True)
class Run:
    """A run to be: its recipe, its folder, and the words that start it."""

    out: Path
    command: list[str]

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )


def prepared(recipe: Path, out: Path, processes: int, overrides: list[str]) -> Run:
    words = ["train", str(recipe), f"--out={out}", *overrides]
    if processes == 1:
        return Run(out, [sys.executable, "-m", "sfumato", *words])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return Run(out, [sys.executable, *torchrun, "-m", "sfumato.cli", *words])


def begun(child: subprocess.Popen[bytes], run: Run) -> None:
    """Wait until the child trains: imports and encoding are over."""
    deadline = time.monotonic() + PATIENCE
    while not (run.out / "metrics.jsonl").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def finish(run: Run) -> float:
    """Train to the end; returns the seconds from the first step on."""
    child = run.start()
    begun(child, run)
    started = time.monotonic()
    _, told = child.communicate(timeout=10 * PATIENCE)
    if child.returncode:
        raise SystemExit(f"training ended with {child.returncode}: {told.decode()}")
    return time.monotonic() - started


def weights(run: Run) -> dict[str, str]:
    """Digests of the weights that a run leaves for use, and of everything in its last state."""
    last = sorted((run.out / "states").iterdir())[-1]
    files = [*run.out.glob("*.safetensors"), *last.glob("*.safetensors")]
    return {str(path.relative_to(run.out)): digest(path) for path in sorted(files)}


def digest(path: Path) -> str:
    """Of a file's tensors: safetensors writes several texts of metadata, as LoRAs have them, in any order."""
    told = hashlib.sha256()
    for name, tensor in sorted(read_tensors(path)[0].items()):
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        told.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def victim(child: subprocess.Popen[bytes], processes: int, chance: random.Random) -> int:
    """The process to kill: the child, or one of those that it, as torchrun, has started."""
    if processes == 1:
        return child.pid
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text(encoding="ascii").split()
    training = [pid for pid in workers if b"sfumato.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return int(chance.choice(training)) if training else child.pid


def kill(run: Run, processes: int, chance: random.Random, seconds: float, in_save: bool) -> str:
    """Start the run, `kill -9` it at a random moment, say where it was."""
    child = run.start()
    begun(child, run)
    deadline = time.monotonic() + PATIENCE
    time.sleep(chance.uniform(0, seconds))
    half_written = False
    while in_save and child.poll() is None and time.monotonic() < deadline and not half_written:
        half_written = any((run.out / "states").glob(".*.tmp"))
    if child.poll() is None:
        os.kill(victim(child, processes, chance), signal.SIGKILL)
    half_written = any((run.out / "states").glob(".*.tmp"))
    child.communicate()
    if half_written:
        return "inside a save"
    return FINISHED if (run.out / "model.safetensors").exists() else "while training"


def soak(
    root: Path, recipe: Path, processes: int, overrides: list[str], kills: int, seed: int
) -> dict[str, Any]:
    """Of a recipe: how often it was killed where, and how often its weights are as if it had not been."""
    chance = random.Random(seed)  # noqa: S311 - moments of kills, no secrets
    where: dict[str, int] = {}
    equal = 0
    undisturbed = prepared(recipe, root / f"{recipe.stem}-undisturbed", processes, overrides)
    seconds = finish(undisturbed)
    wanted = weights(undisturbed)
    for number in range(kills):
        run, place = prepared(recipe, root / f"{recipe.stem}-{number}", processes, overrides), FINISHED
        while place == FINISHED:  # it was too late: another run, killed earlier
            shutil.rmtree(run.out, ignore_errors=True)
            place = kill(run, processes, chance, seconds, number % IN_SAVE == 0)
            seconds *= 0.9 if place == FINISHED else 1.0
        where[place] = where.get(place, 0) + 1
        finish(run)
        equal += weights(run) == wanted
        shutil.rmtree(run.out)
    return {"kills": kills, "bit_equal": equal, "where": where, "files": len(wanted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="of each kind")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--recipe", type=Path, help="a recipe file instead of the kinds")
    parser.add_argument("--processes", type=int, default=1, help="that share the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.recipe is not None:
            found = soak(root, options.recipe, options.processes, [], options.kills, options.seed)
            results[options.recipe.stem] = found
            print(json.dumps(results), flush=True)
            options.kinds = []
        else:
            write_shapes(root / "shapes", size=16)
        for name in options.kinds:
            kind = KINDS[name]
            if name in BASED and not (root / "base").exists():
                finish(prepared(written(root, "base", KINDS["scratch diffusion"], 80), root / "base", 1, []))
            recipe = written(root, name.replace(" ", "-"), kind, kind.images)
            found = soak(root, recipe, kind.processes, OVERRIDES.get(name, []), options.kills, options.seed)
            results[name] = found
            print(json.dumps({name: found}), flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if any(found["bit_equal"] < found["kills"] for found in results.values()):
        raise SystemExit(1)


def written(root: Path, name: str, kind: Kind, images: int) -> Path:
    """The recipe of a kind as a file."""
    head, _, tables = kind.recipe.strip().partition("\n")
    text = "\n".join([head, f'out = "{root / name}"', tables, SHAPES, LOOP])
    path = root / f"{name}.toml"
    base = root / "base" / "model.safetensors"
    path.write_text(text.format(data=root / "shapes", base=base, images=images), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
