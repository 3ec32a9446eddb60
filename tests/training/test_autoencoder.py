"""Training first stages: the paper's loss, codebooks, resumption, and what a finished one leaves behind."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.files import read_tensors
from sfumato.checkpoints.load import load_file
from sfumato.checkpoints.open import open_anything
from sfumato.errors import InputError
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.vq import Latents, VQModel
from sfumato.training.config import TrainingConfig
from sfumato.training.latents import Pixels
from sfumato.training.loop import train
from sfumato.training.run import make_task
from sfumato.training.tasks.autoencoder import AutoencoderTask
from sfumato.training.tasks.autoencoder.finish import distil, measured, scaled
from sfumato.training.tasks.autoencoder.scores import worst_tiles

sys.path.insert(0, str(Path(__file__).parent))
from autoencoder_runs import CPU, SHORT, VQ, batch_of, task_of

Recipe = Callable[..., TrainingConfig]
Trained = Callable[..., Path]
PAPER = {
    "perceptual": "ssim", "adversarial": "hinge", "disc_layers": 1, "disc_width": 4, "learn_logvar": True,
}  # fmt: skip


def state_of(config: TrainingConfig) -> dict[str, Tensor]:
    newest = max((config.out / "states").glob("[0-9]*"))
    return read_tensors(newest / "tensors.safetensors")[0]


def by_hand(task: AutoencoderTask) -> tuple[Tensor, Tensor]:
    """The two losses of LDM's LPIPSWithDiscriminator, written out, with gradients of the same batch."""
    order, pictures = batch_of(task)
    network, judge, options = task.network, task.discriminator, task.options
    assert isinstance(network, AutoencoderKL) and judge is not None
    posterior = network.encode(pictures)
    noise = torch.stack(
        [torch.randn(posterior.mean.shape[1:], generator=p.generator("posterior")) for p in order]
    )
    decoded = network.decode(posterior.mean + (0.5 * posterior.logvar).exp() * noise)
    mean, logvar = posterior.mean, posterior.logvar
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / pictures.numel()
    nll = (decoded - pictures).abs().mean()
    adversarial = -judge(decoded).mean()
    last = network.decoder.conv_out.weight
    (first,) = torch.autograd.grad(nll, last, retain_graph=True)
    (second,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    weight = (first.norm() / (second.norm() + 1e-4)).clamp(0, 1e4).detach() * options.disc_weight
    whole = nll + options.kl_weight * divergence + weight * adversarial
    real, fake = judge(pictures), judge(decoded.detach())
    return whole, 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def test_the_losses_and_their_gradients_are_the_paper_s(recipe: Recipe, tmp_path: Path) -> None:
    gan = {"adversarial": "hinge", "disc_layers": 1, "disc_width": 4, "kl_weight": 0.1}
    task = task_of(recipe("autoencoder", tmp_path / "run", autoencoder=gan))
    parameters = task.optimized()
    found: dict[str, list[Tensor]] = {}
    values: list[float] = []
    for name, loss, _ in task.losses(batch_of(task), 0):
        torch.autograd.backward(loss, inputs=parameters[name])
        found[name] = [p.grad.clone() for p in parameters[name] if p.grad is not None]
        values.append(loss.item())
        for p in parameters[name]:
            p.grad = None
    wanted = by_hand(task)
    assert values == pytest.approx([loss.item() for loss in wanted], rel=1e-5)
    for name, loss in zip(("autoencoder", "discriminator"), wanted, strict=True):
        gradients = torch.autograd.grad(loss, parameters[name], retain_graph=True)
        assert len(gradients) == len(found[name]) == len(parameters[name])
        for mine, theirs in zip(found[name], gradients, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.norm()) + 1e-8)


def test_a_plain_backward_leaves_the_other_network_alone(recipe: Recipe, tmp_path: Path) -> None:
    task = task_of(recipe("autoencoder", tmp_path / "run", autoencoder=PAPER))
    parameters = task.optimized()
    for name, loss, _ in task.losses(batch_of(task), 0):
        loss.backward()
        other = {"autoencoder": "discriminator", "discriminator": "autoencoder"}[name]
        touched = [p.grad is not None and bool(p.grad.any()) for p in parameters[other]]
        assert not any(touched) and any(p.grad is not None for p in parameters[name])
        for p in itertools.chain(*parameters.values()):
            p.grad = None


def test_the_discriminator_joins_in_when_it_is_told(recipe: Recipe, trained: Trained, tmp_path: Path) -> None:
    config = recipe("autoencoder", tmp_path / "run", autoencoder={**PAPER, "disc_start": 8}, loop=SHORT)
    lines: list[Any] = []
    torch.manual_seed(config.seed)
    task = task_of(config)
    before = {name: value.clone() for name, value in task.modules["discriminator"].state_dict().items()}
    train(config, task, CPU, lambda line: lines.append(dict(line)))
    assert [("adversarial" in line) for line in lines if "loss" in line] == [False, False, True, True]
    state = state_of(config)
    moved = {name for name in before if not torch.equal(before[name], state[f"module.discriminator.{name}"])}
    assert {name for name in before if name.endswith("weight")} <= moved
    assert state["module.loss.logvar"] != 0
    written = read_tensors(config.out / "model.safetensors")[0]
    assert not any("discriminator" in name or "logvar" in name for name in written)


@pytest.mark.parametrize("stage", [{}, VQ])
def test_resumed_weights_are_bit_equal(
    recipe: Recipe, trained: Trained, tmp_path: Path, stage: dict[str, Any]
) -> None:
    options = {**PAPER, "disc_start": 4, "codebook": "ema", "codebook_images": 4, "revive_below": 0.3}
    whole = recipe("autoencoder", tmp_path / "whole", autoencoder=options, first_stage=stage, loop=SHORT)
    trained(whole)
    stopped = whole.model_copy(update={"out": tmp_path / "stopped"})

    class Stop(Exception):
        pass

    def stop(line: Any) -> None:
        if line.get("seen") == 12:
            raise Stop

    with pytest.raises(Stop):
        trained(stopped, stop)
    torch.manual_seed(1)  # whatever another process draws
    trained(stopped)
    first, second = state_of(whole), state_of(stopped)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    files = [(config.out / "model.safetensors").read_bytes() for config in (whole, stopped)]
    assert files[0] == files[1]


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_a_codebook_overfits_one_batch_and_is_used(recipe: Recipe, tmp_path: Path, codebook: str) -> None:
    loop = {
        "images": 320, "log_images": 4, "save_images": 320, "preview_images": 320, "ema_images": 0,
    }  # fmt: skip
    optimizer = {"learning_rate": 2e-2, "warmup_images": 0, "weight_decay": 0.0}
    options = {"codebook": codebook, "codebook_images": 40, "preview_images": 0}
    config = recipe(
        "autoencoder", tmp_path / "run", autoencoder=options, optimizer=optimizer, loop=loop, first_stage=VQ
    )
    task = task_of(config)
    batch = batch_of(task)
    task.batches = lambda *_: (batch for _ in itertools.count())  # type: ignore[method-assign]
    lines: list[Any] = []
    train(config, task, CPU, lambda line: lines.append(dict(line)))
    assert lines[-2]["l1"] < 0.5 * lines[0]["l1"]
    assert lines[-2]["codes_used"] >= 0.5  # plain squares have few colours


def test_dead_entries_are_drawn_of_latents(recipe: Recipe, tmp_path: Path) -> None:
    options = {"codebook_images": 2, "revive_below": 0.2}
    task = task_of(recipe("autoencoder", tmp_path / "run", autoencoder=options, first_stage=VQ))
    assert isinstance(task.network, VQModel) and task.codebook is not None
    batch = batch_of(task)
    list(task.losses(batch, 0))
    weight = task.network.quantize.embedding.weight
    latents = task.network.encode(batch[1]).mode().movedim(1, -1).flatten(0, -2)
    assert torch.cdist(weight, latents).amin(dim=1).max() < 1e-5  # the first batch makes the entries
    weight.data[3] = 100.0
    for _ in range(4):
        list(task.losses(batch, 0))
    assert torch.cdist(weight[3:4], latents).min() < 1e-5
    assert task.codebook.state.uses[3] == 1


def test_a_codebook_is_a_first_stage_that_draws(
    recipe: Recipe, latent: Recipe, trained: Trained, tmp_path: Path
) -> None:
    path = trained(recipe("autoencoder", tmp_path / "vq", first_stage=VQ, loop=SHORT))
    config = latent(tmp_path / "run", loop={**SHORT, "preview_images": 16}, diffusion={"autoencoder": path})
    model = sfumato.load(trained(config), device="cpu")
    assert isinstance(model.autoencoder, VQModel)
    assert sfumato.generate(model, sfumato.Request(prompt="a square", seed=1)).images[0].size == (8, 8)


def test_scores_tell_of_latents_and_codes(recipe: Recipe, tmp_path: Path) -> None:
    task = task_of(recipe("autoencoder", tmp_path / "run", first_stage=VQ))
    scores = task.evaluate()
    assert scores == task.evaluate()
    assert 1 / 16 <= scores["held_out_codes_used"] <= 1 <= scores["held_out_perplexity"] <= 16
    latents = task.network.encode(Pixels(task.held_out, 0).fixed(list(range(len(task.held_out))))).mode()
    for channel in range(2):
        assert scores[f"held_out_latent_std_{channel}"] == pytest.approx(latents[:, channel].std().item())
    back = task.network.decode(latents).clamp(-1, 1).detach()
    pictures = Pixels(task.held_out, 0).fixed(list(range(len(task.held_out))))
    error = (back - pictures).square().mean(dim=(1, 2, 3))
    assert scores["held_out_psnr"] == pytest.approx(float((10 * torch.log10(4 / error)).mean()), abs=1e-4)


def test_worst_tiles() -> None:
    pairs = torch.zeros(2, 3, 1, 8, 8)
    pairs[1, 1, 0, 2:4, 6:8] = 1.0
    pairs[1, 2, 0, 0, 0] = 0.5
    tiles = worst_tiles(pairs, 2)
    assert tiles.shape == (2, 2, 1, 8, 8)
    assert torch.equal(tiles[1, 0], torch.ones(1, 8, 8)) and torch.equal(tiles[0], torch.zeros(2, 1, 8, 8))
    assert torch.equal(tiles[1, 1, 0, :4, :4], torch.full((4, 4), 0.5)) and tiles[1, 1].sum() == 8


class Halves(nn.Module):
    """A first stage whose latents are the mean colours of 2x2 pixels, three and a half times."""

    config = AutoencoderConfig(embed_dim=3, ch=32, ch_mult=(1, 1))

    def encode(self, x: Tensor) -> Any:
        return Latents(3.5 * nn.functional.avg_pool2d(x, 2) + 0.1)

    def decode(self, z: Tensor) -> Tensor:
        return nn.functional.interpolate((z - 0.1) / 3.5, scale_factor=2.0)

    def parameters(self, recurse: bool = True) -> Any:
        return iter([nn.Parameter(torch.zeros(()))])


def pictures_of(count: int) -> Tensor:
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(count)) * 2 - 1
    return nn.functional.interpolate(small, scale_factor=2.0)


def test_the_matrix_and_the_scale_are_those_of_the_latents() -> None:
    network: Any = Halves()
    spread, matrix = measured(network, [pictures_of(30), pictures_of(40)])
    latents = network.encode(torch.cat([pictures_of(30), pictures_of(40)])).mode()
    assert spread.scale * latents.std().item() == pytest.approx(1, rel=1e-2)
    assert spread.std == pytest.approx(latents.std(dim=(0, 2, 3)).tolist(), rel=1e-2)
    colours = torch.einsum(
        "bzhw,zc->bchw", latents * spread.scale, torch.tensor(scaled(matrix, spread.scale)[:-1])
    )
    colours = colours + torch.tensor(matrix[-1]).view(-1, 1, 1)
    small = nn.functional.avg_pool2d(torch.cat([pictures_of(30), pictures_of(40)]), 2)
    assert torch.allclose(colours, small, atol=1e-5)


def test_the_scale_counts_the_posterior_s_own_spread() -> None:
    torch.manual_seed(0)
    network = AutoencoderKL(AutoencoderConfig(ch=4, ch_mult=(1, 2), num_groups=2, attn_type="none")).eval()
    pictures = pictures_of(300)
    spread, _ = measured(network, pictures.split(50))
    with torch.no_grad():
        posterior = network.encode(pictures)
        drawn = posterior.sample(torch.Generator().manual_seed(0)) * spread.scale
    assert drawn.std().item() == pytest.approx(1, rel=0.01)
    assert posterior.mode().std().item() * spread.scale < 0.9


def test_a_distilled_decoder_comes_near_its_teacher() -> None:
    network: Any = Halves()
    batches = [pictures_of(16) for _ in range(60)]
    student = distil(network, batches, 60, 0.5, seed=1)
    again = distil(network, batches, 60, 0.5, seed=1)
    for first, second in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)
    pictures = pictures_of(9)
    with torch.no_grad():
        found = student(network.encode(pictures).mode() * 0.5)
    assert found.shape == pictures.shape
    assert (found - pictures).abs().mean() < 0.5 * pictures.abs().mean()
    assert sum(value.numel() for value in student.state_dict().values()) * 2 < 300_000


def test_what_is_left_previews_latents(
    first_stage: Path, latent: Recipe, trained: Trained, tmp_path: Path
) -> None:
    file = load_file(first_stage / "model.safetensors", torch.float32)
    config = file.config
    assert config.latent_rgb is not None and len(config.latent_rgb) == 3 and config.preview is not None
    assert config.latent_spread is not None and [len(row) for row in config.latent_spread] == [2, 2]
    whole = sfumato.load(trained(latent(tmp_path / "run", loop=SHORT)), device="cpu")
    folder = convert(open_anything(tmp_path / "run"), tmp_path / "folder", layout="diffusers")
    assert len(folder.left_out["preview decoder"]) == 10 and "preview" not in folder.parts
    assert sfumato.load(tmp_path / "folder", device="cpu").config.preview is None
    assert (whole.config.preview, whole.config.latent_rgb) == (config.preview, config.latent_rgb)
    latents = torch.randn(2, 2, 4, 4)
    parts: dict[str, nn.Module] = {
        name: m for name in ("unet", "autoencoder", "text") if (m := whole.part(name))
    }
    bare = dataclasses.replace(whole.config, preview=None, latent_rgb=None)
    slow = sfumato.StableDiffusion(bare, parts)
    assert torch.equal(slow.preview_latents(latents), slow.decode_latents(latents).clamp(-1, 1))
    matrix = dataclasses.replace(bare, latent_rgb=((1.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.25)))
    colours = sfumato.StableDiffusion(matrix, parts).preview_latents(latents)
    assert torch.allclose(colours[:, 0], latents[:, 0].clamp(-1, 1)) and colours.shape == (2, 3, 4, 4)
    assert torch.allclose(colours[:, 1], (latents[:, 1] / 2).clamp(-1, 1)) and bool(
        (colours[:, 2] == 0.25).all()
    )
    both = sfumato.StableDiffusion(
        dataclasses.replace(matrix, preview=config.preview), {**parts, "preview": file.module("preview")}
    )
    assert both.preview_latents(latents).shape == (2, 3, 8, 8)
    assert torch.equal(both.preview_latents(latents), file.module("preview")(latents).clamp(-1, 1))


def test_a_conversion_keeps_the_preview_decoder_where_the_layout_can(
    first_stage: Path, tmp_path: Path
) -> None:
    opened = open_anything(first_stage)
    kept = convert(opened, tmp_path / "kept.safetensors")
    before, after = (read_tensors(path)[0] for path in (first_stage / "model.safetensors", kept.path))
    names = [name for name in before if name.startswith("preview_decoder.")]
    assert kept.parts["preview"] == len(names) == 10
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert open_anything(kept.path).config == opened.config
    left = convert(opened, tmp_path / "folder", layout="diffusers", only="vae")
    assert set(left.parts) == {"autoencoder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perceptual": "lpips"}, "needs vgg and lpips"),
        ({"perceptual": "clip"}, "needs perceptual_model"),
        ({"perceptual": "ssim", "vgg": "vgg16.pth"}, "vgg is given without lpips"),
        ({"perceptual": "ssim", "perceptual_model": "model.safetensors"}, "does not read it"),
        ({"adversarial": "hinge"}, "needs 24 pixels a side"),
    ],
)
def test_recipes_that_do_not_fit(
    recipe: Recipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_task(recipe("autoencoder", tmp_path / "run", autoencoder=changes), CPU)


def test_whole_models_at_once_have_no_last_layer(recipe: Recipe, tmp_path: Path) -> None:
    for changes in ({"autoencoder": PAPER}, {"first_stage": VQ}):
        config = recipe("autoencoder", tmp_path / "run", loop={"parallel": "fsdp"}, **changes)
        with pytest.raises(InputError, match="fsdp"):
            make_task(config, CPU)
