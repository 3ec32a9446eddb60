"""Training of a small latent diffusion model, ours against diffusers' script, in fresh processes in turn.

Two cases: from a folder of pictures, all from opening it on counted, and bare steps on latents that are
there. Both sides have equal networks, batches, threads and optimizers. Memory is the resident peak, and the
most that no file backs.

Run: python benchmarks/training.py --work /tmp/training --out benchmarks/results/training.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfumato.checkpoints.save import save_file
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.presets import ModelConfig
from sfumato.text.tokenizer import Tokenizer
from training_side import (
    BATCH,
    CHANNELS,
    PICTURES,
    STORED,
    TEXT_HEADS,
    TEXT_INNER,
    TEXT_LAYERS,
    TEXT_WIDTH,
    TOKENS,
    VOCABULARY,
)

HERE = Path(__file__).parent
SIDES = {"ours": HERE / "training_ours.py", "reference": HERE / "training_diffusers.py"}
CASES = ("folder", "step")
BARS = {"folder": 1.2, "step": 1.0, "peak_mb": 0.9, "private_mb": 0.9}
WORDS = ("red", "green", "blue", "small", "large", "round", "old", "fox", "owl", "house", "tree", "river")


def prepare(work: Path) -> None:
    """Pictures with captions, and an autoencoder and a text encoder for our side."""
    folder = work / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(PICTURES):
        small = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((STORED, STORED), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:04d}.png")
        (folder / f"{index:04d}.txt").write_text("a " + " ".join(random.choice(WORDS, 6)))
    torch.manual_seed(0)
    first = AutoencoderConfig(
        ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=CHANNELS, embed_dim=CHANNELS, resolution=64,
        attn_type="none", num_groups=1,
    )  # fmt: skip
    config = ModelConfig(name="first", autoencoder=first, latent_scale=0.18215)
    parts = {"autoencoder": AutoencoderKL(first).state_dict()}
    save_file(work / "ours-autoencoder.safetensors", config, parts, torch.float32)

    captions = sorted(path.read_text() for path in folder.glob("*.txt"))
    tokenizer = Tokenizer.train([*captions, *WORDS], VOCABULARY, TOKENS)
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=TEXT_WIDTH, intermediate_size=TEXT_INNER,
        num_hidden_layers=TEXT_LAYERS, num_attention_heads=TEXT_HEADS, max_position_embeddings=TOKENS,
        eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    unet = UNetConfig(  # a model file has one; it is not read
        in_channels=4, out_channels=4, model_channels=8, num_res_blocks=1, attention_resolutions=(1,),
        channel_mult=(1,), num_heads=1, use_spatial_transformer=True, context_dim=TEXT_WIDTH, num_groups=4,
    )  # fmt: skip
    config = ModelConfig(name="text", text=text, tokenizer=tokenizer.to_json(), unet=unet)
    states = {"text": CLIPTextEncoder(text).state_dict(), "unet": UNet(unet).state_dict()}
    save_file(work / "ours-text.safetensors", config, states, torch.float32)


def run_side(side: str, work: Path, steps: int, threads: int, cached: bool) -> dict[str, float]:
    """The outcome of one fresh process."""
    for cache in (work / "ours").glob("*"):
        if cache.is_file():
            cache.unlink()
    command = [sys.executable, str(SIDES[side]), "--work", str(work), "--steps", str(steps),
               "--threads", str(threads)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}

    def run(*more: str) -> str:
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment)  # noqa: S603
        if done.returncode:
            raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
        return done.stdout

    if cached:
        run("--encode")  # in a process of its own, whose memory is not counted
    return json.loads(run(*(["--cached"] if cached else [])).strip().splitlines()[-1])


def case(name: str, work: Path, steps: int, threads: int, pairs: int) -> dict[str, Any]:
    """Both sides in turn, and our ratio to the reference in each pair."""
    rows: list[dict[str, dict[str, float]]] = []
    for pair in range(pairs):
        order = list(SIDES) if pair % 2 == 0 else list(SIDES)[::-1]
        found = {side: run_side(side, work, steps, threads, name == "step") for side in order}
        assert found["ours"]["parameters"] == found["reference"]["parameters"]
        rows.append(found)
        print(json.dumps({name: found}), file=sys.stderr)
    speed = "images_per_second" if name == "folder" else "steps_per_second"
    keys = (speed, speed.replace("second", "cpu_second"), "peak_mb", "private_mb")
    ratios = {key: [row["ours"][key] / row["reference"][key] for row in rows] for key in keys}
    return {
        "ratio": {key: round(statistics.median(values), 3) for key, values in ratios.items()},
        "ratios": {key: [round(value, 3) for value in values] for key, values in ratios.items()},
        "bar": {speed: BARS[name], "peak_mb": BARS["peak_mb"], "private_mb": BARS["private_mb"]},
        "runs": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=160, help="of each run: 160 are ten epochs")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--noisy", action="store_true", help="say in the result that the machine was busy")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    prepare(given.work)
    load = os.getloadavg()[0]
    cases = {name: case(name, given.work, given.steps, given.threads, given.pairs) for name in given.cases}
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": given.threads,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "load_before": load,
        "noisy": given.noisy,
        "pictures": PICTURES,
        "batch": BATCH,
        "steps": given.steps,
        "cases": cases,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
