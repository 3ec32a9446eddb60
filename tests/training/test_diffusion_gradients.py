"""Loss, gradients and one SGD step against diffusers and transformers, from the same weights and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from sfumato.checkpoints.layouts.tables import pairs, to_foreign
from sfumato.training.config import TrainingConfig
from sfumato.training.objective import Drawn, drawn_batch
from sfumato.training.run import make_task
from sfumato.training.tasks.diffusion import DiffusionTask

CPU = torch.device("cpu")
BAR = 1e-5  # of each tensor's norm
RATE = 0.1
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # ours -> diffusers'
UNET = {
    "model_channels": 16, "num_groups": 4, "dropout": 0.0, "use_linear_in_transformer": True,
    "use_spatial_transformer": True, "num_heads": 2,
}  # fmt: skip
# Softmax ignores what is added to all of a query's scores, which is all that the bias of the keys does.
ZERO = "self_attn.k_proj.bias"
Recipe = Callable[..., TrainingConfig]


def prepared(config: TrainingConfig) -> DiffusionTask:
    """The task with every weight redrawn, those that start at zero too, so that no gradient is zero."""
    task = make_task(config, CPU)
    assert isinstance(task, DiffusionTask)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in task.modules.values():
            for parameter in module.parameters():
                values = torch.randn(parameter.shape, generator=generator)
                matrix = parameter.ndim > 1
                parameter.copy_(values / parameter[0].numel() ** 0.5 if matrix else parameter + values / 8)
    return task


def twin(task: DiffusionTask) -> UNet2DConditionModel:
    """diffusers' network with the weights of ours."""
    unet = task.unet.config
    attended = [2**level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
    if unet.context_dim is None:
        assert not any(attended)
    middle: dict[str, Any] = {} if unet.context_dim else {"mid_block_type": "UNetMidBlock2D"}
    theirs = UNet2DConditionModel(
        sample_size=4,
        in_channels=unet.in_channels,
        out_channels=unet.out_channels,
        block_out_channels=tuple(m * unet.model_channels for m in unet.channel_mult),
        layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in attended[::-1]),
        attention_head_dim=2,
        cross_attention_dim=unet.context_dim or 8,  # pyright: ignore[reportArgumentType]
        use_linear_projection=True,
        norm_num_groups=4,
        num_class_embeds=unet.num_classes if isinstance(unet.num_classes, int) else None,
        **middle,
    )
    theirs.load_state_dict(foreign(task, "unet", task.unet.state_dict()))
    return theirs


def text_twin(task: DiffusionTask) -> CLIPTextModel:
    """transformers' text transformer with the weights of ours."""
    assert task.captions is not None
    text = task.captions.network.config
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=text.vocab_size, hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size, bos_token_id=0,
            num_hidden_layers=text.num_hidden_layers, num_attention_heads=text.num_attention_heads,
            max_position_embeddings=text.max_position_embeddings, hidden_act=text.hidden_act,
            eos_token_id=text.eos_token_id, attention_dropout=0.0,
        )
    )  # fmt: skip
    weights = foreign(task, "text", task.captions.network.state_dict())
    theirs.load_state_dict({name: weights[name] for name in weights if name in theirs.state_dict()})
    return theirs


def foreign(task: DiffusionTask, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names, and in the shapes, of diffusers."""
    variant = "bare" if part == "text" else ""
    return to_foreign(pairs(part, getattr(task.model.config, part), "diffusers", variant), tensors)


def their_loss(
    task: DiffusionTask, unet: nn.Module, clean: Tensor, chance: Drawn, **conditions: Tensor
) -> Tensor:
    """The loss as the reference's training scripts have it."""
    options = task.config.diffusion
    scheduler: Any = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=NAMES[options.prediction],  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    t = chance.t
    noisy = scheduler.add_noise(clean, chance.noise, t)  # pyright: ignore[reportArgumentType]
    answer = unet(noisy, t, **conditions).sample
    target = {"eps": chance.noise, "x0": clean}.get(options.prediction)
    if target is None:
        target = scheduler.get_velocity(clean, chance.noise, t)  # pyright: ignore[reportArgumentType]
    if options.weighting == "none":
        return F.mse_loss(answer, target)
    snr = compute_snr(scheduler, t)
    weight = torch.stack([snr, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0]
    weight = weight / {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[options.prediction]
    return (F.mse_loss(answer, target, reduction="none").mean(dim=[1, 2, 3]) * weight).mean()


def compared(task: DiffusionTask, part: str, ours: nn.Module, theirs: nn.Module) -> int:
    """Compares all gradients, and the weights after a step of plain descent; how many there were."""
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    found, seen = foreign(task, part, gradients), 0
    before = foreign(task, part, {name: p.detach().clone() for name, p in ours.named_parameters()})
    torch.optim.SGD(ours.parameters(), lr=RATE).step()
    torch.optim.SGD(theirs.parameters(), lr=RATE).step()
    after = foreign(task, part, {name: p.detach() for name, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        expected = parameter.grad
        assert expected is not None, name
        if name.endswith(ZERO):
            assert float(found[name].norm()) < 1e-6 and float(expected.norm()) < 1e-6
            continue
        norm = float(expected.norm())
        assert norm > 1e-6, name
        assert float((found[name].reshape(expected.shape) - expected).norm()) <= BAR * norm, name
        step, weight = float((after[name] - before[name]).norm()), parameter.detach()
        rounding = 2e-7 * float(weight.norm())
        assert step > 0 and float((after[name] - weight).norm()) <= BAR * step + rounding, name
        seen += 1
    return seen


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_text_to_latents(latent: Recipe, tmp_path: Path, prediction: str, weighting: str) -> None:
    options = {"prediction": prediction, "weighting": weighting, "caption_dropout": 0.0}
    task = prepared(latent(tmp_path / "run", diffusion=options, unet=UNET, loop={"channels_last": False}))
    assert task.captions is not None
    source = task.batches(0, 4)
    places, clean, _ = batch = next(source)
    source.close()
    ((_, loss, _),) = task.losses(batch, 0)
    loss.backward()

    chance = drawn_batch(task.config.diffusion, task.schedule, places, clean.shape[1:])
    unet, text = twin(task), text_twin(task)
    tokens = torch.stack([task.captions.tokens(task.captions.caption(place)) for place in places])
    context = text(tokens).last_hidden_state
    expected = their_loss(task, unet, clean, chance, encoder_hidden_states=context)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert compared(task, "unet", task.unet, unet) > 90
    assert compared(task, "text", task.captions.network, text) > 15


def test_pixels_without_conditions(pixel: Recipe, tmp_path: Path) -> None:
    unet = {**UNET, "attention_resolutions": [], "middle": "residual", "use_spatial_transformer": False}
    task = prepared(pixel(tmp_path / "run", unet=unet, loop={"channels_last": False}))
    source = task.batches(0, 4)
    places, clean, _ = batch = next(source)
    source.close()
    ((_, loss, _),) = task.losses(batch, 0)
    loss.backward()
    chance = drawn_batch(task.config.diffusion, task.schedule, places, clean.shape[1:])
    theirs = twin(task)
    expected = their_loss(task, theirs, clean, chance, encoder_hidden_states=torch.zeros(4, 1, 8))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert compared(task, "unet", task.unet, theirs) > 40
