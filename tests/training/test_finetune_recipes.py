"""Each recipe of fine-tuning in configs/ runs to its end, on a small model and few pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from finetune_models import SD1, written

from sfumato.training import run

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("finetune-*.toml"))
FILES = {
    "finetune-controlnet.toml": "canny.safetensors",
    "finetune-dreambooth.toml": "pim-dreambooth.safetensors",
    "finetune-full.toml": "model.safetensors",
    "finetune-lora.toml": "night.safetensors",
    "finetune-textual-inversion.toml": "embeddings/pim.safetensors",
}


def test_every_recipe_is_listed() -> None:
    assert set(FILES) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_to_its_end(name: str, pictures: Path, tmp_path: Path) -> None:
    model, out = written(tmp_path, SD1), tmp_path / "run"
    changes = [
        f"finetune.model='{model}'", f"data.path='{pictures}'", f"out='{out}'", "device=cpu", "data.size=8",
        "data.workers=0", "loop.images=4", "loop.batch=2", "loop.log_images=2", "loop.save_images=4",
        "loop.preview_images=4", "loop.precision=float32", "data.repeats={}", "finetune.prompts=['pim']",
    ]  # fmt: skip
    if "inversion" in name:
        changes.append("finetune.inversion.templates=object")  # these pictures' captions do not say the word
    if "dreambooth" in name:
        changes.append("finetune.prior.images=3")
    lines: list[dict[str, object]] = []
    path = run(CONFIGS / name, changes, lambda line: lines.append(dict(line)))
    assert path == out / FILES[name] and path.is_file()
    assert (out / "previews" / "000000004.png").is_file()
    assert any("loss" in line for line in lines) and any("held_out_loss" in line for line in lines)
