"""Does a picture depend on the batch it is drawn in? Every sampler, on the embedded model.

In deterministic mode a picture has the same bytes alone and as the last of a batch. Drawn together, in
fewer and larger passes, at most 0.1 % of the 8-bit values may be off by more than 1.

Run: python benchmarks/soak/batches.py --out benchmarks/soak/results/batches.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import sfumato
from sfumato.diffusion.samplers import SAMPLERS

PROMPT = "a noto drawing of a fox on a blue background"
ALLOWED = 1e-3  # of the values


def pixels(result: sfumato.Result) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.stack([np.asarray(image) for image in result.images]).astype(np.int16)


def check(model: sfumato.StableDiffusion, name: str, steps: int, batch: int) -> dict[str, Any]:
    """One sampler: equality of bytes, and how far the batched mode is from it."""
    request = sfumato.Request(
        prompt=PROMPT, seed=0, sampler=name, steps=steps, num_images=batch, deterministic=True
    )
    together = sfumato.generate(model, request)
    alone = sfumato.generate(model, request.model_copy(update={"num_images": 1, "seed": batch - 1}))
    batched = sfumato.generate(model, request.model_copy(update={"deterministic": False}))
    equal = alone.samples[0].numpy().tobytes() == together.samples[-1].numpy().tobytes()
    off = np.abs(pixels(batched) - pixels(together))
    share = float((off > 1).mean())
    passed = equal and share <= ALLOWED
    return {
        "sampler": name,
        "equal_bytes": equal,
        "share_off": share,
        "largest": int(off.max()),
        "passed": passed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, rows = sfumato.load(), []
    for name in options.samplers:
        rows.append(check(model, name, options.steps, options.batch))
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        found = {"steps": options.steps, "batch": options.batch, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not all(row["passed"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
