"""Kills a tiny training run at random moments, some inside a save, and resumes it: are the weights bit-equal?

Run: python benchmarks/soak/kills.py --kills 20 --out benchmarks/soak/results/kills.json
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sfumato.checkpoints.files import sha256
from sfumato.data.shapes import write_shapes

RECIPE = """
task = "diffusion"
out = "{out}"
[data]
path = "{data}"
size = 16
workers = 1
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
[loop]
images = 960
batch = 8
ema_images = 200
log_images = 80
save_images = 32
preview_images = 480
"""
IN_SAVE = 3  # every third kill waits for a half-written state
PATIENCE = 120  # seconds after which a child that does nothing is a failure


def start(recipe: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sfumato", "train", str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # noqa: S603


def begun(child: subprocess.Popen[bytes], run: Path) -> None:
    """Wait until the child trains: imports and encoding are over."""
    deadline = time.monotonic() + PATIENCE
    while not (run / "metrics.jsonl").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def finish(recipe: Path, run: Path) -> float:
    """Train to the end; returns the seconds from the first step on."""
    child = start(recipe)
    begun(child, run)
    started = time.monotonic()
    _, told = child.communicate(timeout=10 * PATIENCE)
    if child.returncode:
        raise SystemExit(f"training ended with {child.returncode}: {told.decode()}")
    return time.monotonic() - started


def weights(run: Path) -> dict[str, str]:
    """Digests of the model file and of everything in the last state."""
    last = sorted((run / "states").iterdir())[-1]
    return {
        "model": sha256(run / "model.safetensors"),
        last.name: sha256(last / "tensors.safetensors"),
    }


def kill(recipe: Path, run: Path, moments: random.Random, seconds: float, in_save: bool) -> str:
    """Start the run, `kill -9` it at a random moment, say where it was."""
    child = start(recipe)
    begun(child, run)
    deadline = time.monotonic() + PATIENCE
    time.sleep(moments.uniform(0, seconds))
    half_written = False
    while in_save and child.poll() is None and time.monotonic() < deadline and not half_written:
        half_written = any((run / "states").glob(".*.tmp"))
    child.kill()
    child.wait()
    assert child.stderr is not None
    child.stderr.close()
    if any((run / "states").glob(".*.tmp")):
        return "inside a save"
    return "finished" if (run / "model.safetensors").exists() else "while training"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    moments = random.Random(options.seed)  # noqa: S311 - moments of kills, no secrets
    where: dict[str, int] = {}
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shapes(root / "shapes", size=16)

        def recipe(name: str) -> tuple[Path, Path]:
            path = root / f"{name}.toml"
            path.write_text(RECIPE.format(out=root / name, data=root / "shapes"), encoding="utf-8")
            return path, root / name

        path, run = recipe("undisturbed")
        seconds = finish(path, run)
        wanted = weights(run)
        for number in range(options.kills):
            path, run = recipe(f"killed-{number}")
            place = kill(path, run, moments, seconds, number % IN_SAVE == 0)
            where[place] = where.get(place, 0) + 1
            finish(path, run)
            equal += weights(run) == wanted
    result = {"kills": options.kills, "bit_equal": equal, "where": where}
    print(json.dumps(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if equal < options.kills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
