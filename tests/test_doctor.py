"""The doctor: right about ideal networks of every kind, and about models that say the wrong thing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import sfumato
from sfumato.checkpoints.save import save_file
from sfumato.cli import main
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.doctor import (
    GAINS,
    SCHEDULES,
    drawings,
    examine,
    predicted,
    prediction,
    scale,
    suited,
    terminal,
    timesteps,
    under,
    weights,
)
from sfumato.errors import InputError
from sfumato.model import StableDiffusion
from sfumato.presets import PARTS

THREE = list(SCHEDULES)[:1] + list(SCHEDULES)[2:4]
SIGNS = torch.randint(2, (16, 2, 8, 8), generator=torch.Generator().manual_seed(1)) * 2.0 - 1


def ideal(kind: str, schedule: Schedule):  # type: ignore[no-untyped-def]
    """The best network for data whose values are 1 or -1: E[x0 | x] is a hyperbolic tangent."""

    def raw(x: Tensor, t: Tensor) -> Tensor:
        sigma = torch.tensor([schedule.sigma(float(each)) for each in t]).view(-1, 1, 1, 1)
        alpha = 1 / (1 + sigma**2).sqrt()
        x0 = torch.tanh(x / alpha / sigma**2)
        noise = (x - alpha * x0) / (alpha * sigma)
        v = alpha * noise - alpha * sigma * x0
        return {"eps": noise, "x0": x0, "v": v, "flow (eps - x0)": noise - x0}[kind]

    return raw


@pytest.mark.parametrize("schedule", THREE)
@pytest.mark.parametrize("kind", GAINS)
def test_twelve_of_twelve(kind: str, schedule: str) -> None:
    own = Schedule(SCHEDULES[schedule])
    found = predicted(ideal(kind, own), own, SIGNS)
    assert found.name == kind
    said = "eps" if kind != "eps" else "v"
    assert prediction(found, said).level == "fault" and kind in prediction(found, said).found


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("true", THREE)
@pytest.mark.parametrize("said", THREE)
def test_another_schedule_is_named(kind: str, true: str, said: str) -> None:
    finding = timesteps(ideal(kind, Schedule(SCHEDULES[true])), Schedule(SCHEDULES[said]), SIGNS, kind)
    assert finding.level == ("good" if true == said else "fault")
    assert true == said or true in finding.found


def test_what_answers_nothing_like_a_network_is_not_guessed_at() -> None:
    found = predicted(lambda x, t: 0.5 * x, Schedule(ScheduleConfig()), SIGNS)
    assert found.name == "" and (found.high, found.low) == pytest.approx((0.5, 0.5))
    assert prediction(found, "eps").level == "note"


def test_the_schedule_of_the_notes_leaves_a_third_of_the_signal() -> None:
    notes = Schedule(ScheduleConfig("linear", 200, 1e-4, 0.02))
    (finding,) = terminal(notes, "eps")
    assert (
        finding.level == "fault"
        and "36.4% of the signal" in finding.found
        and "zero_terminal" in finding.remedy
    )
    assert [each.level for each in terminal(Schedule(ScheduleConfig()), "eps")] == ["good"]
    zero = Schedule(ScheduleConfig(zero_terminal_snr=True))
    assert [each.level for each in terminal(zero, "eps")] == ["fault"]
    assert [each.level for each in terminal(zero, "v")] == ["good"]


def test_scales_and_weights() -> None:
    latents = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents /= latents.std()
    assert scale(latents, 0.18215, True).level == "good"
    assert "0.18" in scale(latents * 5.5, 1.0, True).remedy
    assert scale(latents * 0.3, 1.0, False).level == "good"  # pictures
    layer = torch.nn.Linear(3, 3)
    assert next(weights({"unet": layer})).level == "good"
    torch.nn.init.zeros_(layer.weight)
    assert next(weights({"unet": layer})).level == "note"
    layer.weight.data[0, 0] = float("nan")
    assert next(weights({"unet": layer})).level == "fault"


def test_the_embedded_model_is_well_and_lies_are_found() -> None:
    model = sfumato.load()
    assert {finding.level for finding in examine(model)} == {"good"}
    liar = StableDiffusion(
        replace(
            model.config, prediction="eps", schedule=ScheduleConfig("linear", beta_start=1e-4, beta_end=0.02)
        ),
        {part: module for part in PARTS if (module := model.part(part)) is not None},
    )
    faults = [finding.found for finding in examine(liar) if finding.level == "fault"]
    assert len(faults) == 2 and "predicts v, not eps" in faults[0] and "Stable Diffusion's" in faults[1]


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_another_scale_is_named(kind: str) -> None:
    """The scale is that of what a network learned, whatever the latents deviate by."""
    own = Schedule(SCHEDULES[THREE[0]])
    raw = ideal(kind, own)
    assert suited(raw, own, SIGNS, kind, 1.0).level == "good"
    for factor in (0.5, 0.715, 1.4, 1.9):
        found = suited(raw, own, factor * SIGNS, kind, factor)
        assert found.level == "fault"
        suits = float(found.remedy.partition("about ")[2].split()[0])
        assert 0.8 < suits < 1.25


def test_the_embedded_model_at_other_scales() -> None:
    model = sfumato.load()
    latents = model.encode_image(drawings(model)).float()
    raw = under(model, latents)

    def level(factor: float) -> str:
        return suited(raw, model.schedule, factor * latents, "v", factor * model.latent_scale).level

    assert level(1) == "good" and level(0.715) != "good"
    assert [level(factor) for factor in (0.5, 1.25, 1.4, 1.9)] == ["fault"] * 4


def test_models_of_other_kinds(tiny_class_model: StableDiffusion, pixel_model: StableDiffusion) -> None:
    for model in (tiny_class_model, pixel_model):
        assert len(list(examine(model))) >= 4
        assert drawings(model).shape[0] == 8


def test_the_command(tmp_path: Path, tiny_model: StableDiffusion, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0 and "predicts v" in capsys.readouterr().out
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    assert main(["doctor", "--pictures", str(pictures)]) == 2
    capsys.readouterr()
    for name, colour in (("a", "red"), ("b", "blue")):
        drawing = Image.new("RGB", (70, 50), "white")
        drawing.paste(colour, (20, 10, 50, 40))
        drawing.save(pictures / f"{name}.png")
    assert main(["doctor", "--prediction", "eps", "--pictures", str(pictures)]) == 1
    out = capsys.readouterr().out
    assert "FAULT the network predicts v, not eps" in out and "--prediction v" in out
    broken = {
        name: module.state_dict()
        for name in ("unet", "autoencoder", "text")
        if (module := tiny_model.part(name))
    }
    save_file(tmp_path / "tiny.safetensors", tiny_model.config, broken, torch.float32)
    assert main(["doctor", str(tmp_path / "tiny.safetensors")]) in (0, 1)
    assert "all weights are finite" in capsys.readouterr().out


def test_models_that_draw_no_pictures(tiny_model: StableDiffusion) -> None:
    class Line:
        image_size = (64,)
        name = "a line"

    with pytest.raises(InputError, match="draws no pictures"):
        next(examine(Line()))  # type: ignore[arg-type]
