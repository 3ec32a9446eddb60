"""docs/pictures/fine-tuning.png: what the embedded model draws before and after three kinds of fine-tuning.

The runs are those of configs/finetune-{lora,textual-inversion,controlnet}.toml. Seed i for column i, none
picked.
Run: python benchmarks/finetune_sheet.py data/fine-tuning data/illustrations runs
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import sfumato
from sfumato.checkpoints.addons.apply import Weighted, apply_addons, read_lora
from sfumato.checkpoints.files import read_tensors
from sfumato.conditioning import Conditioning
from sfumato.generation import draw, generate
from sfumato.images import preview
from sfumato.model import StableDiffusion
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.nn.unet import Patch
from sfumato.preprocess import preprocess
from sfumato.request import Request
from sfumato.training.data import Position, open_dataset, to_tensor
from sfumato.training.finetune.hints import Hints
from sfumato.training.settings_finetune import ControlConfig
from sfumato.training.sheets import save_sheet

OUT = Path(__file__).parent.parent / "docs" / "pictures" / "fine-tuning.png"
NIGHT = (
    "a noto drawing of a house at night", "a noto drawing of a cat at night",
    "a fluent drawing of a rocket at night", "a noto drawing of a fox at night",
    "a noto drawing of a guitar at night", "a fluent drawing of a panda at night",
    "a noto drawing of a tomato at night", "a twemoji drawing of a castle at night",
)  # fmt: skip
PIM = (
    "pim on a green background", "pim on an orange background", "pim on a blue background",
    "pim on a white background", "pim on a black background", "pim on a pink background", "pim",
    "pim on a purple background",
)  # fmt: skip
STEERED = ("a fox", "on a blue background")  # each for all hints


class Steered(StableDiffusion):
    """The model under a ControlNet, with one hint for each sample."""

    def __init__(self, model: StableDiffusion, control: ControlNet, hints: Tensor) -> None:
        vars(self).update(vars(model))
        self.control, self.hints = control, hints

    def network(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        patch: Patch | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        hints = self.hints.repeat(len(x) // len(self.hints), 1, 1, 1)
        return super().network(x, t, cond, patch, self.control(x, t, hints, cond.context))


def shown(folder: Path) -> Tensor:
    """Eight pictures of a folder."""
    paths = sorted(folder.glob("*.png"))
    return torch.stack([to_tensor(Image.open(p, formats=["PNG"])) for p in paths[:: len(paths) // 8][:8]])


@torch.no_grad()
def main(sets: Path, illustrations: Path, runs: Path) -> None:
    model = sfumato.load(device="cpu")
    seeds = range(8)
    rows = [shown(sets / "night"), draw(model, NIGHT, seeds)]
    parts = {part: module for part in ("unet", "text") if (module := model.part(part)) is not None}
    with apply_addons(model.config, parts, [Weighted(read_lora(runs / "night" / "night.safetensors"))]):
        rows.append(draw(model, NIGHT, seeds))
    rows.append(shown(sets / "pim"))
    for folder in (None, str(runs / "pim" / "embeddings")):
        asked = [Request(prompt=prompt, seed=i, embedding_dir=folder) for i, prompt in enumerate(PIM)]
        rows.append(torch.cat([generate(model, request).samples for request in asked]))
    held_out = open_dataset(illustrations, (64, 64), 3, "test", {"avatar": 0})
    hints = Hints(held_out, ControlConfig(preprocessor="canny"))
    stride = len(held_out) // 24
    given = hints.of([Position(0, -1, index, index) for index in range(0, 24 * stride, stride)])
    control = ControlNet(ControlNetConfig(model.unet.config, hint_widths=(16, 32, 96))).eval()
    tensors = read_tensors(runs / "canny" / "canny.safetensors")[0]
    control.load_state_dict({name.removeprefix("control_model."): t.float() for name, t in tensors.items()})
    steered = Steered(model, control, given[:8])
    rows += [given[:8] * 2 - 1, draw(model, STEERED[:1] * 8, seeds)]
    rows += [draw(steered, [prompt] * 8, seeds) for prompt in STEERED]
    save_sheet(OUT, F.interpolate(torch.cat(rows), scale_factor=1.5, mode="bicubic"), columns=8)
    captions = [held_out.captions(index)[0] for index in range(0, 24 * stride, stride)]
    for name, prompts in (("own captions", captions), ("no words", [""] * 24)):
        alone = agreement(draw(model, prompts, range(24)), given)
        print(f"{name}: {alone:.2f} without, ", end="")
        print(f"{agreement(draw(Steered(model, control, given), prompts, range(24)), given):.2f} with it")


def agreement(samples: Tensor, hints: Tensor) -> float:
    """F-score of the edges that Canny finds in samples, and those of their hints, a pixel apart at most."""
    found = [preprocess("canny", preview(sample)) for sample in samples]
    edges = torch.stack([(to_tensor(picture)[:1] + 1) / 2 for picture in found])
    wanted = hints[:, :1]
    precision = (edges * F.max_pool2d(wanted, 3, 1, 1)).sum() / edges.sum()
    recall = (wanted * F.max_pool2d(edges, 3, 1, 1)).sum() / wanted.sum()
    return float(2 * precision * recall / (precision + recall))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
