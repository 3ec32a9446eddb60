"""Gradients of fine-tuning against the same training written with diffusers, transformers and PEFT."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from finetune_models import METHODS, SD1, UNET, tables, written

from sfumato.checkpoints.controls.layouts import control_pairs
from sfumato.checkpoints.layouts.tables import pairs, to_foreign
from sfumato.training import objective
from sfumato.training.config import TrainingConfig
from sfumato.training.finetune import FinetuneTask
from sfumato.training.finetune.inversion import Inversion
from sfumato.training.finetune.lora import Lora
from sfumato.training.finetune.task import Samples
from sfumato.training.optimizers import make_optimizers
from sfumato.training.run import make_task
from sfumato.training.settings_loop import OptimizerConfig

CPU = torch.device("cpu")
# Groups of one channel would take away what the biases and the timestep add, and gradients would be rounding.
GROUPED = replace(UNET, num_groups=4)
MODEL = replace(SD1, unet=GROUPED)
ZERO = ("k_proj.bias",)  # a number added to all scores of a query changes no attention
RATE = 0.1  # of one step of SGD


@pytest.fixture
def task(pictures: Path, tmp_path: Path) -> Callable[..., FinetuneTask]:
    """A function of (method, finetune keys) that gives the task of a recipe for the small model."""
    model = written(tmp_path, MODEL)

    def make(method: str, **more: Any) -> FinetuneTask:
        values = tables(model, tmp_path / "run", pictures, **{**METHODS[method], **more})
        made = make_task(TrainingConfig.model_validate(values), CPU)
        assert isinstance(made, FinetuneTask)
        for network in (made.model.unet, *made.base.text_parts.values(), *made.modules.values()):
            network.double()  # rounding is no part of what is compared
        return made

    return make


def their_unet(task: FinetuneTask) -> nn.Module:
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    own = {
        name: value.detach().clone()
        for name, value in task.base.reopened().module("unet").state_dict().items()
    }
    unet.load_state_dict(to_foreign(pairs("unet", GROUPED, "diffusers"), own))
    return unet.double().requires_grad_(False)


def their_text(task: FinetuneTask) -> Any:
    text = SD1.text
    assert text is not None
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            eos_token_id=text.eos_token_id,
        )
    ).eval()
    own = task.base.reopened().module("text").state_dict()
    names = model.state_dict().keys()
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    model.load_state_dict(
        {name: own["text_model." + name.removeprefix("text_model.")].clone() for name in names}
        if prefix
        else {name: own[f"text_model.{name}"].clone() for name in names}
    )
    return model.double().requires_grad_(False)


def their_loss(
    task: FinetuneTask, samples: Samples, answer: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Mean squared error of eps, with diffusers' scheduler; the noise and the timesteps are the task's."""
    scheduler: Any = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    shape = samples.clean.shape[1:]
    chance = objective.drawn_batch(task.objective, task.schedule, samples.order, shape)
    noisy = scheduler.add_noise(samples.clean, chance.noise, chance.t)
    captions = [task._caption(place) or "" for place in samples.order]
    tokenizer = task.model.tokenizer
    assert tokenizer is not None
    tokens = tokenizer.batch(captions, 16)[0]
    return F.mse_loss(answer(noisy.double(), chance.t, tokens).float(), chance.noise)


def ours(task: FinetuneTask, samples: Samples) -> dict[str, Tensor]:
    """The gradients of the task's loss by the names of its parameters."""
    batch = next(task.batches(0, 4))
    ((_, loss, _),) = task.losses(batch._replace(pictures=samples), 0)
    named = {
        f"{part}.{name}": p for part, each in task.modules.items() for name, p in each.named_parameters()
    }
    loss.backward(inputs=list(named.values()))
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


def assert_near(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Within 1e-5 of each tensor's norm; those that are zero in theory are next to nothing on both sides."""
    assert found.keys() == wanted.keys()
    most = max(float(value.norm()) for value in wanted.values())
    for name, value in wanted.items():
        if name.endswith(ZERO):
            assert max(value.norm(), found[name].norm()) < 1e-6 * most
        else:
            assert float((found[name] - value).norm()) <= 1e-5 * float(value.norm()), name


def weights(task: FinetuneTask) -> dict[str, Tensor]:
    """What is trained, as it is now, by the names of `ours`."""
    return {
        f"{part}.{name}": p.detach().clone()
        for part, each in task.modules.items()
        for name, p in each.named_parameters()
    }


def step(task: FinetuneTask, *theirs: nn.Module) -> None:
    """One step of SGD on both sides; ours by the run's own optimizer."""
    config = OptimizerConfig(name="sgd", learning_rate=RATE, betas=(0.0, 0.0), weight_decay=0.0)
    for optimizer in make_optimizers(config, task.optimized(), task.modules).values():
        optimizer.step()
    for network in theirs:
        torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=RATE).step()


def assert_stepped(
    before: Mapping[str, Tensor], found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    """Every weight is theirs after the step, and its change is theirs, within 1e-5 of the norm of each."""
    assert before.keys() == found.keys() == wanted.keys()
    for name, value in wanted.items():
        change = value - before[name]
        difference = float((found[name] - value).norm())
        assert difference <= 1e-5 * float(value.norm()), name
        assert difference <= 1e-5 * float(change.norm()) or name.endswith(ZERO), name


def first_samples(task: FinetuneTask) -> Samples:
    return next(task.batches(0, 4)).pictures


def text_states(text: Any, tokens: Tensor) -> Tensor:
    return text(input_ids=tokens).last_hidden_state


def test_whole_networks(task: Callable[..., FinetuneTask]) -> None:
    made = task("full")
    samples = first_samples(made)
    unet, text = their_unet(made).requires_grad_(True), their_text(made).requires_grad_(True)
    their_loss(made, samples, lambda x, t, tokens: unet(x, t, text_states(text, tokens)).sample).backward()
    wanted = {f"unet.{name}": p.grad for name, p in unet.named_parameters() if p.grad is not None}
    found = ours(made, samples)
    own = {name.removeprefix("unet."): value for name, value in found.items() if name.startswith("unet.")}
    given = to_foreign(pairs("unet", GROUPED, "diffusers"), own)
    assert_near({f"unet.{name}": value for name, value in given.items()}, wanted)
    theirs = {
        name.removeprefix("text_model."): p.grad for name, p in text.named_parameters() if p.grad is not None
    }
    text_found = {
        name.removeprefix("text.text_model."): value
        for name, value in found.items()
        if name.startswith("text.")
    }
    assert_near(text_found, theirs)
    # One step of SGD from equal weights and gradients.
    before = weights(made)
    step(made, unet, text)
    after = weights(made)

    def of_unet(named: dict[str, Tensor]) -> Mapping[str, Tensor]:
        own = {name.removeprefix("unet."): value for name, value in named.items() if name.startswith("unet.")}
        return to_foreign(pairs("unet", GROUPED, "diffusers"), own)

    def of_text(named: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name.removeprefix("text.text_model."): value
            for name, value in named.items()
            if name.startswith("text.")
        }

    assert_stepped(of_unet(before), of_unet(after), {name: p.detach() for name, p in unet.named_parameters()})
    stepped = {name.removeprefix("text_model."): p.detach() for name, p in text.named_parameters()}
    assert_stepped(of_text(before), of_text(after), stepped)
    assert len(of_unet(after)) + len(of_text(after)) == len(after)


@pytest.mark.parametrize("kind", ["attention", "convolutions"])
def test_lora_against_peft(task: Callable[..., FinetuneTask], kind: str) -> None:
    made = task("lora", lora={"rank": 2, "alpha": 3.0, "targets": kind, "text": True})
    method = made.method
    assert isinstance(method, Lora)
    samples = first_samples(made)
    networks: dict[str, Any] = {"unet": their_unet(made), "text": their_text(made)}
    links: dict[tuple[str, str], Any] = {}  # our change -> their layer
    for part, network in networks.items():
        theirs = {pair.native: pair.foreign[0] for pair in pairs(part, getattr(MODEL, part), "diffusers")}
        modules = dict(network.named_modules())
        layers: dict[str, tuple[str, str]] = {}
        for place in method.factors:
            if place[0] == part:
                name = theirs[f"{place[1]}.weight"].removesuffix(".weight")
                layers[name if name in modules else name.removeprefix("text_model.")] = place
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=sorted(layers))
        networks[part] = peft.get_peft_model(network, config)
        for name, place in layers.items():
            layer = networks[part].base_model.model.get_submodule(name)
            links[place], factors = layer, method.factors[place]
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert down.shape == factors.down.shape and up.shape == factors.up.shape
            # Both start uniform within the same bounds, and at zero.
            bound = 1 / math.sqrt(down[0].numel())
            assert max(down.abs().max(), factors.down.abs().max()) <= bound
            assert not up.any() and not factors.up.any()
            generator = torch.Generator().manual_seed(factors.up.numel())
            nn.init.normal_(factors.up, std=0.3, generator=generator)
            down.data, up.data = factors.down.detach().clone(), factors.up.detach().clone()
    answer = networks["unet"]
    their_loss(
        made, samples, lambda x, t, tokens: answer(x, t, text_states(networks["text"], tokens)).sample
    ).backward()
    wanted: dict[str, Tensor] = {}
    for (part, name), layer in links.items():
        key = f"{part}.{name.replace('.', '_')}"
        wanted[f"{key}.down"] = layer.lora_A["default"].weight.grad
        wanted[f"{key}.up"] = layer.lora_B["default"].weight.grad
    assert_near(ours(made, samples), wanted)
    before = weights(made)
    step(made, *networks.values())
    stepped: dict[str, Tensor] = {}
    for (part, name), layer in links.items():
        key = f"{part}.{name.replace('.', '_')}"
        stepped[f"{key}.down"] = layer.lora_A["default"].weight.detach()
        stepped[f"{key}.up"] = layer.lora_B["default"].weight.detach()
    assert_stepped(before, weights(made), stepped)


def test_a_change_starts_as_pefts_does_from_the_same_numbers() -> None:
    from sfumato.training.finetune.low_rank import Factors

    for layer in (nn.Linear(12, 8), nn.Conv2d(4, 6, 3, padding=1)):
        generator = torch.Generator().manual_seed(5)
        factors = Factors(layer, 3, 3.0, 0.0, generator)
        shell = nn.Sequential(layer)
        adapted = peft.get_peft_model(shell, peft.LoraConfig(r=3, target_modules=["0"]))
        wrapped: Any = adapted.base_model.model
        down = wrapped[0].lora_A["default"]
        torch.manual_seed(5)
        down.reset_parameters()
        assert torch.equal(down.weight, factors.down)


def test_the_rows_of_a_word(task: Callable[..., FinetuneTask]) -> None:
    made = task("textual_inversion")
    method = made.method
    assert isinstance(method, Inversion)
    samples = first_samples(made)
    unet, text = their_unet(made), their_text(made)
    table = text.get_input_embeddings()
    count = table.weight.shape[0]
    grown = torch.cat([table.weight.detach(), method.vectors["text"].detach()]).requires_grad_(True)
    tokenizer = made.model.tokenizer
    assert tokenizer is not None
    pim = tokenizer.encode("pim")

    def placed(tokens: Tensor) -> Tensor:
        """Rows in which the word's tokens are those of its two vectors."""
        rows = []
        for row in tokens.tolist():
            found: list[int] = []
            while row:
                if row[: len(pim)] == pim:
                    found, row = [*found, count, count + 1], row[len(pim) :]
                else:
                    found, row = [*found, row[0]], row[1:]
            end = tokenizer.end_id
            found = (found + [end] * 16)[:16] if end in found[:16] else [*found[:15], end]
            rows.append(found)
        return torch.tensor(rows)

    def answer(x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        ids = placed(tokens)
        handle = table.register_forward_hook(lambda module, inputs, output: grown[ids])
        states = text(input_ids=ids.clamp(max=count - 1)).last_hidden_state
        handle.remove()
        return unet(x, t, states).sample

    their_loss(made, samples, answer).backward()
    assert grown.grad is not None
    assert_near(ours(made, samples), {"embedding.text": grown.grad[count:]})


def test_a_control_network(task: Callable[..., FinetuneTask]) -> None:
    made = task("controlnet")
    control = made.modules["control"]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in control.named_parameters():
        if name.startswith(("zero_convs", "middle_block_out")) or not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2, generator=generator)  # zeros give most gradients zero
    samples = first_samples(made)
    unet, text = their_unet(made), their_text(made)
    theirs = diffusers.ControlNetModel(
        in_channels=2, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2, norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
    )  # fmt: skip
    theirs.double().load_state_dict(to_foreign(control_pairs(control.config), control.state_dict()))  # type: ignore[arg-type]
    assert samples.hints is not None
    hints = samples.hints.double()

    def answer(x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        states = text_states(text, tokens)
        down, middle = theirs(x, t, states, hints, return_dict=False)
        return unet(
            x, t, states, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample

    their_loss(made, samples, answer).backward()
    found = {name.removeprefix("control."): value for name, value in ours(made, samples).items()}
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert_near(to_foreign(control_pairs(control.config), found), wanted)  # type: ignore[arg-type]
