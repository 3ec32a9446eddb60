"""Controls around a network: against diffusers end to end, by rows, steps and modes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from sfumato.checkpoints.controls.layouts import control_pairs
from sfumato.checkpoints.layouts.tables import pairs, to_foreign
from sfumato.conditioning import Conditioning
from sfumato.diffusion.control import Influence
from sfumato.diffusion.guidance import cfg, guided
from sfumato.diffusion.noise import ImageNoise
from sfumato.diffusion.prediction import Network, Predictor
from sfumato.diffusion.samplers import sampler
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError
from sfumato.generation.control import Control, Controlled, Shown, clip_pixels, controlled, shown, with_shown
from sfumato.nn.clip_vision import CLIPVisionConfig, CLIPVisionEncoder
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.nn.ip_adapter import IPAdapter, IPAdapterConfig
from sfumato.nn.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sfumato.nn.unet import Patch, UNet, UNetConfig

CONFIG = UNetConfig(
    in_channels=4, out_channels=4, model_channels=16, num_res_blocks=1, attention_resolutions=(1, 2),
    channel_mult=(1, 2), num_heads=2, use_spatial_transformer=True, context_dim=12, num_groups=8,
)  # fmt: skip
HINTED = ControlNetConfig(CONFIG, hint_widths=(4, 6))
BLOCKS: dict[str, Any] = {
    "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "layers_per_block": 1, "cross_attention_dim": 12, "attention_head_dim": 2, "norm_num_groups": 8,
}  # fmt: skip
SCHEDULE = Schedule(ScheduleConfig())
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28,
    patch_size=7, projection_dim=20,
)  # fmt: skip


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(network: Any, seed: int = 0, deviation: float = 0.1) -> Any:
    for parameter in network.parameters():
        generator = torch.Generator().manual_seed(parameter.numel() + seed)
        nn.init.normal_(parameter, std=deviation, generator=generator)
    return network.eval().requires_grad_(False)


UNET: UNet = draw(UNet(CONFIG))
FIRST: ControlNet = draw(ControlNet(HINTED), 1)
SECOND: ControlNet = draw(ControlNet(HINTED), 2)
ADAPTER: T2IAdapter = draw(T2IAdapter(T2IAdapterConfig(channels=(16, 32), num_res_blocks=1)), 3)
PROMPTER: IPAdapter = draw(IPAdapter(IPAdapterConfig((16, 32, 32, 32, 16, 16, 32), 12, 20)), 4, 0.3)
EYE: CLIPVisionEncoder = draw(CLIPVisionEncoder(VISION), 5, 0.2)
X, T = seeded(0, 2, 4, 8, 8), torch.tensor([3.0, 700.0])
HINT = seeded(1, 1, 3, 16, 16).sigmoid()
BIG = seeded(2, 1, 3, 64, 64).sigmoid()
CONDS = {
    "cond": Conditioning(context=seeded(3, 2, 5, 12)),
    "uncond": Conditioning(context=seeded(4, 2, 5, 12)),
}


def network(
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    /,
    *,
    patch: Patch | None = None,
    residuals: Sequence[Tensor] = (),
) -> Tensor:
    """As the model's own network seam, with the block seam and residuals open."""
    return UNET(x, t, cond.context, residuals=residuals, patch=patch)


def under(controls: Sequence[Control], active: tuple[bool, ...] | None = None) -> Controlled:
    return Controlled(network, UNET, tuple(controls), active or (True,) * len(controls))


def seen_by(control: Control, picture: Tensor = HINT, **options: Any) -> Shown:
    return shown(control, picture, **options)


def cond_of(*seen: Shown, branch: str = "cond") -> Conditioning:
    return with_shown(CONDS, seen, 2)[branch]


def raw(controls: Sequence[Control], *seen: Shown, branch: str = "cond") -> Tensor:
    return under(controls)(X, T, cond_of(*seen, branch=branch))


PLAIN = UNET(X, T, CONDS["cond"].context)


def theirs(kind: Any, config: Any, network: nn.Module) -> Any:
    table = control_pairs(config) if kind is diffusers.ControlNetModel else pairs("unet", config, "diffusers")
    more: dict[str, Any] = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
    if kind is diffusers.ControlNetModel:
        more = {"conditioning_embedding_out_channels": (4, 6)}
    reference = kind(**BLOCKS, **more).eval()
    reference.load_state_dict(to_foreign(table, network.state_dict()))
    return reference


def reference_run(controls: list[Control], x: Tensor, steps: int, scale: float) -> Tensor:
    """DDIM as diffusers' ControlNet pipeline runs it; "control" is what it calls guess mode."""
    unet = theirs(diffusers.UNet2DConditionModel, CONFIG, UNET)
    nets = [theirs(diffusers.ControlNetModel, HINTED, control.network) for control in controls]
    scheduler: Any = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    contexts = {name: cond.context for name, cond in CONDS.items()}
    for i, t in enumerate(scheduler.timesteps):
        predicted: dict[str, Tensor] = {}
        for name, context in contexts.items():
            down, middle = None, None
            for net, control in zip(nets, controls, strict=True):
                asked = control.influence
                keep = 1.0 - float(i / steps < asked.start or (i + 1) / steps > asked.end)
                more, last = net(
                    x, t, context, HINT.repeat(2, 1, 1, 1), asked.weight * keep, return_dict=False
                )
                if asked.mode == "control":
                    fading = [0.825 ** (len(more) - j) for j in range(len(more) + 1)]
                    share = 0.0 if name == "uncond" else 1.0
                    more = [share * one * fade for one, fade in zip(more, fading[:-1], strict=True)]
                    last = share * last * fading[-1]
                down = more if down is None else [a + b for a, b in zip(down, more, strict=True)]
                middle = last if middle is None else middle + last
            predicted[name] = unet(
                x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
            ).sample
        eps = predicted["uncond"] + scale * (predicted["cond"] - predicted["uncond"])
        x = scheduler.step(eps, t, x).prev_sample
    return x


@pytest.mark.parametrize(
    "influences",
    [
        [Influence(0.5)],
        [Influence(1.3)],
        [Influence(0.8, 0.0, 0.5), Influence(0.6, 0.25, 1.0)],
        [Influence(1.0, mode="control"), Influence(0.5)],
    ],
)
@torch.no_grad()
def test_ddim_with_controlnets_is_that_of_diffusers(influences: list[Influence]) -> None:
    nets = [FIRST, SECOND][: len(influences)]
    controls = [Control(net, influence) for net, influence in zip(nets, influences, strict=True)]
    start, steps, scale = seeded(9, 2, 4, 8, 8), 4, 3.0
    expected = reference_run(controls, start, steps, scale)
    # The timesteps of diffusers' DDIM, "leading" with an offset of 1, and its last level, that of timestep 0.
    levels = [SCHEDULE.sigma(t) for t in (751, 501, 251, 1, 0)]

    def predictor(network: Network) -> Predictor:
        return Predictor(network, SCHEDULE, "eps")

    model = controlled(network, UNET, controls, levels, predictor)
    conds = with_shown(CONDS, [seen_by(control) for control in controls], 2)
    denoise = guided({name: (model, cond) for name, cond in conds.items()}, cfg(scale))
    begin = start * (1 + levels[0] ** 2) ** 0.5
    noise = ImageNoise([0, 1], (4, 8, 8), device=torch.device("cpu"))
    *_, last = sampler("ddim")(denoise, begin, levels, noise, eta=0.0)
    found = last.x / (1 + last.target**2) ** 0.5
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= 1e-4
    plain = predictor(network)
    denoise = guided({name: (plain, cond) for name, cond in CONDS.items()}, cfg(scale))
    *_, free = sampler("ddim")(denoise, begin, levels, noise, eta=0.0)
    assert (free.x / (1 + free.target**2) ** 0.5 - expected).abs().max() > 0.01


def test_several_add_up() -> None:
    one, other = Control(FIRST), Control(SECOND, Influence(0.5))
    residuals = [
        a + 0.5 * b
        for a, b in zip(
            FIRST(X, T, HINT.repeat(2, 1, 1, 1), CONDS["cond"].context),
            SECOND(X, T, HINT.repeat(2, 1, 1, 1), CONDS["cond"].context), strict=True,
        )
    ]  # fmt: skip
    expected = UNET(X, T, CONDS["cond"].context, residuals=residuals)
    assert (raw([one, other], seen_by(one), seen_by(other)) - expected).abs().max() <= 1e-5


def test_weights_are_of_each_sample() -> None:
    """A sample whose weight is 0 is drawn as without control, one beside it is not."""
    control = Control(FIRST, Influence(mode="control"))
    sides = with_shown(CONDS, [seen_by(control)], 2)
    rows = [hint[:1] for side in sides.values() for hint in side.hints or ()]
    mixed = replace(sides["cond"], hints=(torch.cat(rows),))
    found = under([control])(X, T, mixed)
    assert (found[1] - PLAIN[1]).abs().max() <= 1e-6
    assert (found[0] - PLAIN[0]).abs().max() > 0.01
    assert (found[0] - raw([control], seen_by(control))[0]).abs().max() <= 1e-5


def test_a_mask_says_where_it_counts() -> None:
    control, mask = Control(FIRST), torch.ones(1, 1, 16, 16)
    assert torch.equal(raw([control], seen_by(control, mask=mask)), raw([control], seen_by(control)))
    nowhere = raw([control], seen_by(control, mask=torch.zeros(1, 1, 16, 16)))
    assert (nowhere - PLAIN).abs().max() <= 1e-6


def test_what_is_not_active_is_not_asked() -> None:
    def fail(*_: object) -> None:
        raise AssertionError("it was asked")

    silent: Any = ControlNet(HINTED)
    silent.forward = fail
    controls = [Control(FIRST), Control(silent)]
    cond = cond_of(seen_by(controls[0]), seen_by(controls[1]))
    assert torch.equal(under(controls, (True, False))(X, T, cond), raw(controls[:1], seen_by(controls[0])))
    with pytest.raises(AssertionError):
        under(controls)(X, T, cond)


def test_t2i_adapters_add_their_features() -> None:
    control = Control(ADAPTER, Influence(0.5, mode="control"))
    seen = seen_by(control, BIG)
    assert len(seen.conditional) == 2
    assert torch.equal(seen.conditional[1], ADAPTER(BIG)[1] * 0.5)
    assert (raw([control], seen) - PLAIN).abs().max() > 0.003
    assert torch.equal(
        raw([control], seen, branch="uncond"), UNET(X, T, CONDS["uncond"].context)
    )  # features of zeros


def test_ip_adapters_add_their_tokens() -> None:
    control = Control(PROMPTER, Influence(0.8))
    pixels = clip_pixels([Image.effect_noise((40, 50), 90), Image.effect_noise((40, 50), 90)], 28)
    seen = seen_by(control, pixels, image_encoder=EYE)
    assert seen.conditional[0].shape == (1, 8, 12)  # four tokens of each picture, in one row
    assert torch.equal(seen.unconditional[0][:, :4], PROMPTER(torch.zeros(1, 20)))
    assert (raw([control], seen) - PLAIN).abs().max() > 0.003


def test_plus_adapters_take_a_picture_of_zeros_for_none() -> None:
    network = draw(IPAdapter(replace(PROMPTER.config, kind="plus", image_dim=32, num_heads=1)), 6)
    pixels = clip_pixels([Image.effect_noise((40, 50), 90)], 28)
    seen = seen_by(Control(network), pixels, image_encoder=EYE)
    assert torch.equal(seen.unconditional[0], network(EYE(torch.zeros(1, 3, 28, 28)).hidden_states[-2]))
    assert torch.equal(seen.conditional[0], network(EYE(pixels).hidden_states[-2]))


def test_all_kinds_at_once_whatever_their_order() -> None:
    kinds = [Control(FIRST), Control(ADAPTER), Control(PROMPTER)]
    seen = [seen_by(kinds[0]), seen_by(kinds[1], BIG)]
    seen.append(seen_by(kinds[2], clip_pixels([Image.effect_noise((40, 50), 90)], 28), image_encoder=EYE))
    found = [
        raw([kinds[i] for i in order], *(seen[i] for i in order))
        for order in itertools.permutations(range(3))
    ]
    assert all((one - found[0]).abs().max() <= 1e-5 for one in found[1:])
    alone = [raw([kind], one) for kind, one in zip(kinds, seen, strict=True)]
    assert all((one - found[0]).abs().max() > 1e-3 for one in alone)


def test_number_formats_may_differ() -> None:
    control = Control(draw(ControlNet(HINTED).to(torch.bfloat16), 1))
    found = raw([control], seen_by(control))
    assert found.dtype == torch.float32
    assert (found - raw([Control(FIRST)], seen_by(Control(FIRST)))).abs().max() < 0.3


def test_conditions_without_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="need 1 hints; the conditions hold 0"):
        under([Control(FIRST)])(X, T, CONDS["cond"])


def test_an_ip_adapter_needs_an_image_encoder() -> None:
    with pytest.raises(InputError, match="no image encoder"):
        shown(Control(PROMPTER), torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize("size", [(64, 64), (100, 61), (37, 90), (224, 224), (333, 250)])
def test_pictures_reach_clip_as_in_transformers(size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected: Any = processor(images=picture, return_tensors="pt").pixel_values
    assert (clip_pixels([picture], 56) - expected).abs().max() <= 1e-5
