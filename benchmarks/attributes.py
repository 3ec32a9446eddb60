"""A classifier of what an illustration shows, trained on the training pictures: the judge in quality.py.

Run: python benchmarks/attributes.py --data data/illustrations --out runs/attributes.safetensors
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.checkpoints.files import read_tensors, write_tensors
from sfumato.data.pictures import Pictures, Row
from sfumato.training.data import positions, to_tensor

SIZE = 64
SIDES = {"left": ("beside", 0), "right": ("beside", 1), "above": ("stacked", 0), "below": ("stacked", 1)}
AVATARS = ("critters", "planets", "sprouts", "landscape")

Facts = dict[str, str]


def facts(row: Row) -> Facts:
    """What the canonical caption of a row says, as head -> value.

    "a fox left of a dog" and "a dog right of a fox" are one picture, so pairs are told from left and top.
    """
    told = row["attributes"]
    if row["kind"] == "avatar":
        style = str(told["style"])
        named = {
            f"{style} {name}": str(value)
            for name, value in told.items()
            if name not in ("style", "object", "code")
        }
        return {"object": str(told["object"]), **named}
    known = {"object": str(told["object"]), "background": str(told["background"])}
    if row["kind"] == "drawing":
        return known | {"style": str(told["style"])}
    if told["form"] == "single":
        return known | {"size": str(told["size"]), "position": str(told["position"])}
    if told["form"] == "count":
        return known | {"count": str(told["count"])}
    arrangement, swapped = SIDES[str(told["relation"])]
    things = [str(told["object"]), str(told["second"])]
    first, second = reversed(things) if swapped else things
    return {"background": known["background"], "arrangement": arrangement, "first": first, "second": second}


class Block(nn.Module):
    """Two convolutions at half the resolution beside a strided shortcut."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out_channels, 3, 2, 1)
        self.norm1 = nn.GroupNorm(8, out_channels)
        self.second = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.shortcut = nn.Conv2d(channels, out_channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(h)) + self.shortcut(x))


class Judge(nn.Module):
    """(b, 3, 64, 64) in -1..1 -> for each head the logits of its values."""

    def __init__(self, values: dict[str, list[str]]) -> None:
        super().__init__()
        self.values = values
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), Block(32, 64), Block(64, 128), Block(128, 256),
            nn.Flatten(), nn.Linear(256 * 16, 384), nn.ReLU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.heads = nn.ModuleDict({head: nn.Linear(384, len(names)) for head, names in values.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.trunk(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def right(self, pictures: Tensor, wanted: Sequence[Facts]) -> dict[str, list[bool]]:
        """For each head, whether it sees the wanted value in each picture that has one."""
        found: dict[str, list[bool]] = defaultdict(list)
        for start in range(0, len(wanted), 128):
            answers = {name: logits.argmax(1) for name, logits in self(pictures[start : start + 128]).items()}
            for place, told in enumerate(wanted[start : start + 128]):
                for head, value in told.items():
                    found[head].append(self.values[head][int(answers[head][place])] == value)
        return dict(found)


def load_judge(path: Path) -> Judge:
    tensors, metadata = read_tensors(path)
    judge = Judge(json.loads(metadata["values"]))
    judge.load_state_dict(tensors)
    return judge.eval()


def picture(pictures: Pictures, row: Row) -> Tensor:
    return to_tensor(pictures.image(row, SIZE))


def augmented(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to 2 pixels, softened and noised: generated pictures are not pixel-sharp."""
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    batch = torch.roll(F.pad(batch, (2, 2, 2, 2), mode="replicate"), shift, dims=(2, 3))[..., 2:-2, 2:-2]
    soft = F.avg_pool2d(F.pad(batch, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = torch.rand((len(batch), 1, 1, 1), generator=generator)
    noise = torch.randn(batch.shape, generator=generator) * 0.06
    return (batch + mix * (soft - batch) + noise).contiguous(memory_format=torch.channels_last)


def batches(rows: list[Row], pictures: Pictures, size: int) -> Iterator[tuple[Tensor, list[Facts]]]:
    order = [index for index, row in enumerate(rows) for _ in range(3 if row["kind"] == "drawing" else 1)]
    stream = positions(order, seed=7, start=0)
    while True:
        chosen = [rows[position.index] for position in islice(stream, size)]
        yield torch.stack([picture(pictures, row) for row in chosen]), [facts(row) for row in chosen]


def train(data: Path, images: int, size: int = 128) -> Judge:
    torch.manual_seed(7)
    pictures = Pictures(data)
    rows = pictures.rows("train")
    values: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for head, value in facts(row).items():
            values[head].add(value)
    judge = Judge({head: sorted(names) for head, names in sorted(values.items())})
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    numbers = {head: {value: i for i, value in enumerate(names)} for head, names in judge.values.items()}
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.02)
    steps = images // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(7)
    started = time.perf_counter()
    for step, (batch, wanted) in enumerate(islice(batches(rows, pictures, size), steps)):
        with torch.autocast("cpu", torch.bfloat16):
            answers = judge(augmented(batch, generator))
        loss = torch.zeros(())
        for head, logits in answers.items():
            targets = torch.tensor([numbers[head][told[head]] if head in told else -100 for told in wanted])
            if (targets >= 0).any():
                loss = loss + F.cross_entropy(logits.float(), targets, reduction="sum") / size
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            speed = (step + 1) * size / (time.perf_counter() - started)
            print(f"{step * size} images, loss {float(loss):.3f}, {speed:.0f} images/s", flush=True)
    return judge.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200_000)
    options = parser.parse_args()
    judge = train(options.data, options.images)
    write_tensors(options.out, judge.state_dict(), {"values": json.dumps(judge.values)})
    pictures = Pictures(options.data)
    rows = pictures.rows("test")
    found = judge.right(torch.stack([picture(pictures, row) for row in rows]), [facts(row) for row in rows])
    print(json.dumps({head: round(sum(right) / len(right), 3) for head, right in found.items()}, indent=1))


if __name__ == "__main__":
    main()
