"""The U-Net against diffusers' UNet2DConditionModel, and its own seams, switches and errors."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from sfumato.nn.attention import attend
from sfumato.nn.layers import ResBlock, timestep_embedding
from sfumato.nn.unet import Patch, UNet, UNetConfig

BASE = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=2,
    attention_resolutions=(1, 2),
    channel_mult=(1, 2, 2),
    num_heads=4,
    use_spatial_transformer=True,
    context_dim=24,
    num_groups=16,
)
PLAIN = replace(BASE, use_spatial_transformer=False, context_dim=None, num_res_blocks=1, channel_mult=(1, 2))
SD15 = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=320,
    num_res_blocks=2,
    attention_resolutions=(4, 2, 1),
    channel_mult=(1, 2, 4, 4),
    num_heads=8,
    use_spatial_transformer=True,
    context_dim=768,
)
SD2 = replace(
    SD15, num_heads=-1, num_head_channels=64, context_dim=1024, use_linear_in_transformer=True, legacy=False
)
SDXL = replace(
    SD2,
    channel_mult=(1, 2, 4),
    attention_resolutions=(4, 2),
    transformer_depth=(1, 2, 10),
    context_dim=2048,
    adm_in_channels=2816,
)


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(network: nn.Module) -> None:
    """Every weight redrawn, the zero-initialised ones too, so that no branch is silent."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            matrix = parameter.ndim > 1
            parameter.copy_(values / parameter[0].numel() ** 0.5 if matrix else parameter + values / 8)


def build(config: UNetConfig) -> UNet:
    network = UNet(config).eval()
    randomize(network)
    return network


def inputs(config: UNetConfig, *size: int) -> dict[str, Tensor]:
    given = {"x": seeded(1, 2, config.in_channels, *size), "timesteps": torch.tensor([3.0, 741.5])}
    if config.context_dim is not None:
        given["context"] = seeded(2, 2, 7, config.context_dim)
    return given


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# Parity with diffusers

LEAVES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def native_name(config: UNetConfig, foreign: str) -> str:
    """Our name of a weight of diffusers' network."""
    module, _, leaf = foreign.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{leaf}"
    side, level, kind, i, rest = _parts(foreign)
    blocks = [config.residual_blocks(n) for n in range(len(config.channel_mult))]
    if side == "mid":
        place = f"middle_block.{2 * i if kind == 'resnets' else 1}"
    elif side == "down":
        number = (
            1 + sum(count + 1 for count in blocks[:level]) + (blocks[level] if kind == "downsamplers" else i)
        )
        place = f"input_blocks.{number}.{int(kind == 'attentions')}"
    else:
        reverse = blocks[::-1]
        number = sum(count + 1 for count in reverse[:level])
        number += reverse[level] if kind == "upsamplers" else i
        attended = 2 ** (len(blocks) - 1 - level) in config.attention_resolutions
        place = (
            f"output_blocks.{number}.{1 + attended if kind == 'upsamplers' else int(kind == 'attentions')}"
        )
    name = rest.partition(".")[0]
    if kind == "downsamplers":
        rest = rest.replace("conv", "op")
    return f"{place}.{rest.replace(name, LEAVES[name], 1) if kind == 'resnets' else rest}"


def _parts(foreign: str) -> tuple[str, int, str, int, str]:
    match = re.fullmatch(r"(\w+?)_blocks?(?:\.(\d))?\.(\w+)\.(\d)\.(.+)", foreign)
    assert match, foreign
    side, level, kind, i, rest = match.groups()
    return side, int(level or 0), kind, int(i), rest


def diffusers_twin(config: UNetConfig, **extra: Any) -> tuple[UNet, UNet2DConditionModel]:
    """Both networks of one configuration with equal weights."""
    attended = [2**level in config.attention_resolutions for level in range(len(config.channel_mult))]
    heads = [config.heads(m * config.model_channels)[0] for m in config.channel_mult]
    theirs = UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=tuple(m * config.model_channels for m in config.channel_mult),
        layers_per_block=config.num_res_blocks,  # pyright: ignore[reportArgumentType]
        down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in attended[::-1]),
        # Under a misleading name, the number of heads.
        attention_head_dim=tuple(heads),  # pyright: ignore[reportArgumentType]
        cross_attention_dim=config.context_dim,  # pyright: ignore[reportArgumentType]
        transformer_layers_per_block=config.transformer_depth,  # pyright: ignore[reportArgumentType]
        use_linear_projection=config.use_linear_in_transformer,
        norm_num_groups=config.num_groups,
        resnet_time_scale_shift="scale_shift" if config.use_scale_shift_norm else "default",
        **extra,
    )
    randomize(theirs.eval())
    ours = UNet(config).eval()
    ours.load_state_dict({native_name(config, name): value for name, value in theirs.state_dict().items()})
    return ours, theirs


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, (8, 12)),  # as Stable Diffusion 1: convolutions around the transformers, a number of heads
        (
            {"num_heads": -1, "num_head_channels": 8, "use_linear_in_transformer": True, "legacy": False},
            (12, 8),
        ),
        ({"num_res_blocks": (1, 2, 1), "use_scale_shift_norm": True, "in_channels": 9}, (4, 16)),
        ({"attention_resolutions": (2, 4), "transformer_depth": (1, 2, 3)}, (8, 16)),
    ],
)
def test_equals_diffusers(change: dict[str, Any], size: tuple[int, int]) -> None:
    config = replace(BASE, **change)
    ours, theirs = diffusers_twin(config)
    given = inputs(config, *size)
    with torch.no_grad():
        expected = theirs(given["x"], given["timesteps"], given["context"]).sample
        assert 0.3 < expected.std() < 3
        assert difference(ours(**given), expected) <= 1e-5


def test_equals_diffusers_with_labels() -> None:
    config = replace(BASE, num_classes=6)
    ours, theirs = diffusers_twin(config, num_class_embeds=6)
    given, labels = inputs(config, 8, 12), torch.tensor([5, 0])
    with torch.no_grad():
        expected = theirs(given["x"], given["timesteps"], given["context"], class_labels=labels).sample
        assert difference(ours(**given, vector=labels), expected) <= 1e-5
        assert difference(ours(**given, vector=labels.flip(0)), expected) > 1e-3


def test_equals_diffusers_with_a_projected_vector() -> None:
    config = replace(BASE, num_classes="sequential", adm_in_channels=20)
    extra = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20}
    ours, theirs = diffusers_twin(config, **extra)
    given, vector = inputs(config, 8, 12), seeded(3, 2, 20)
    with torch.no_grad():
        expected = theirs(given["x"], given["timesteps"], given["context"], class_labels=vector).sample
        assert difference(ours(**given, vector=vector), expected) <= 1e-5


def test_equals_diffusers_as_sdxl() -> None:
    config = replace(
        BASE,
        attention_resolutions=(2, 4),
        transformer_depth=(1, 2, 3),
        num_heads=-1,
        num_head_channels=16,
        use_linear_in_transformer=True,
        adm_in_channels=10 + 6 * 8,
    )
    ours, theirs = diffusers_twin(
        config,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=10 + 6 * 8,
    )
    given, pooled = inputs(config, 8, 12), seeded(3, 2, 10)
    sizes = torch.tensor([[1024.0, 768, 0, 0, 1024, 768], [512, 512, 64, 0, 512, 512]])
    vector = torch.cat([pooled, timestep_embedding(sizes.flatten(), 8).reshape(2, -1)], dim=1)
    with torch.no_grad():
        expected = theirs(
            given["x"],
            given["timesteps"],
            given["context"],
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample
        assert difference(ours(**given, vector=vector), expected) <= 1e-5


def test_residuals_equal_diffusers() -> None:
    ours, theirs = diffusers_twin(BASE)
    given = inputs(BASE, 8, 12)
    shapes: list[torch.Size] = []
    record = Patch(encoder=lambda i, h: (shapes.append(h.shape), h)[1])
    with torch.no_grad():
        plain = ours(**given, patch=record)
        residuals = [seeded(10 + i, *shape) for i, shape in enumerate([*shapes, shapes[-1]])]
        expected = theirs(
            given["x"],
            given["timesteps"],
            given["context"],
            down_block_additional_residuals=tuple(residuals[:-1]),
            mid_block_additional_residual=residuals[-1],
        ).sample
        assert difference(ours(**given, residuals=residuals), expected) <= 1e-5
        assert difference(plain, expected) > 1e-2


@pytest.mark.parametrize(
    ("config", "count"),
    [(SD15, 859_520_964), (SD2, 865_910_724), (SDXL, 2_567_463_684)],
    ids=["1.5", "2", "XL"],
)
def test_parameter_counts(config: UNetConfig, count: int) -> None:
    with torch.device("meta"):
        network = UNet(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


# What this network has of its own


@pytest.mark.parametrize(("dims", "size"), [(1, (8,)), (2, (4, 6)), (3, (3, 4, 6))])
@pytest.mark.parametrize("use_linear", [False, True])
def test_transformer_attends_over_any_rank(dims: int, size: tuple[int, ...], use_linear: bool) -> None:
    config = replace(BASE, dims=dims, channel_mult=(1, 2), use_linear_in_transformer=use_linear)
    network, given = build(config), inputs(config, *size)
    with torch.no_grad():
        output = network(**given)
        moved = network(**{**given, "context": given["context"].flip(1)})
        other = network(**{**given, "context": -given["context"]})
    assert output.shape == given["x"].shape
    assert difference(moved, output) < 1e-5, "the order of the tokens carries no meaning"
    assert difference(other, output) > 1e-2


def test_rank_three_with_one_slice_equals_rank_two() -> None:
    """A volume one deep meets the kernels' middle slices alone, so that it is a picture."""
    flat, deep = build(replace(BASE, dims=2)), UNet(replace(BASE, dims=3)).eval()
    state = {}
    for name, value in deep.state_dict().items():
        source = flat.state_dict()[name]
        state[name] = torch.zeros_like(value)
        if value.ndim == 5:
            state[name][:, :, value.shape[2] // 2] = source
        else:
            state[name] = source
    deep.load_state_dict(state)
    given = inputs(BASE, 8, 12)
    with torch.no_grad():
        output = deep(**{**given, "x": given["x"][:, :, None]})
        assert difference(output[:, :, 0], flat(**given)) <= 1e-5


def test_without_context_dim_both_attentions_look_at_the_picture() -> None:
    config = replace(BASE, context_dim=None, channel_mult=(1, 2))
    network, given = build(config), inputs(config, 4, 6)
    lengths = []

    def record(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths.append((q.shape[2], k.shape[2]))
        return attend(name, q, k, v)

    with torch.no_grad():
        assert torch.isfinite(network(**given, patch=Patch(attention=record))).all()
    assert lengths and all(queries == keys for queries, keys in lengths)
    assert {queries for queries, _ in lengths} == {24, 6}


@pytest.mark.parametrize("config", [BASE, PLAIN, replace(PLAIN, use_new_attention_order=True)])
def test_patches_are_called_under_state_dict_names(config: UNetConfig) -> None:
    network, given = build(config), inputs(config, 8, 12)
    attended: list[str] = []
    encoded: list[int] = []
    skipped: list[int] = []

    def attention(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended.append(name)
        return attend(name, q, k, v)

    def encoder(i: int, h: Tensor) -> Tensor:
        encoded.append(i)
        return h

    def skip(i: int, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        skipped.append(i)
        return h, skip

    with torch.no_grad():
        plain = network(**given)
        assert torch.equal(network(**given, patch=Patch()), plain)
        assert torch.equal(network(**given, patch=Patch(attention, encoder, skip)), plain)
    suffix = "to_q" if config.use_spatial_transformer else "qkv"
    keys = [name for name in network.state_dict() if name.endswith(f".{suffix}.weight")]
    assert attended == [name.removesuffix(f".{suffix}.weight") for name in keys]
    assert encoded == list(range(len(network.input_blocks)))
    assert skipped == list(range(len(network.output_blocks)))


def test_patches_act_where_they_are_called() -> None:
    network, given = build(BASE), inputs(BASE, 8, 12)
    middle = "middle_block.1.transformer_blocks.0.attn1"
    seen: dict[str, Tensor] = {}

    def perturbed(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v if name == middle else attend(name, q, k, v)

    def shifted(i: int, h: Tensor) -> Tensor:
        return h + 1 if i == 2 else h

    def watched(i: int, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        seen[f"skip {i}"] = skip
        return h, skip

    residuals: list[Tensor] = []
    patches = [
        Patch(attention=perturbed),
        Patch(encoder=shifted),
        Patch(skip=lambda i, h, skip: (h, skip * 0 if i == 1 else skip)),
        Patch(skip=lambda i, h, skip: (h * 0 if i == 1 else h, skip)),
    ]
    with torch.no_grad():
        plain = network(**given, patch=Patch(encoder=lambda i, h: (residuals.append(h), h)[1], skip=watched))
        outputs = [plain, *(network(**given, patch=patch) for patch in patches)]
        # The encoder's last output is the decoder's first skip, and takes its residual before the patch.
        assert torch.equal(seen["skip 0"], residuals[-1])
        network(**given, patch=Patch(skip=watched), residuals=[*residuals, residuals[-1]])
        assert torch.equal(seen["skip 0"], 2 * residuals[-1])
    for i, one in enumerate(outputs):
        assert all(difference(one, other) > 1e-4 for other in outputs[:i])


def test_gradient_checkpointing_recomputes_and_changes_no_gradient() -> None:
    config = replace(BASE, channel_mult=(1, 2), num_res_blocks=1, dropout=0.1)
    network, given = build(config).train(), inputs(config, 4, 8)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for module in network.modules():
        if isinstance(module, ResBlock):
            module.register_forward_pre_hook(count)
    gradients, counts = [], []
    for switch in (False, True):
        network.gradient_checkpointing = switch
        network.zero_grad()
        calls = 0
        torch.manual_seed(0)  # the dropout's draws come from the global generator
        network(**given).square().mean().backward()
        counts.append(calls)
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert counts[1] == 2 * counts[0]
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    with torch.no_grad():
        calls = 0
        network(**given)
    assert calls == counts[0]


@pytest.mark.parametrize("config", [BASE, replace(PLAIN, use_scale_shift_norm=True, resblock_updown=True)])
def test_bfloat16_and_channels_last(config: UNetConfig) -> None:
    network, given = build(config), inputs(config, 8, 12)
    with torch.no_grad():
        expected = network(**given)
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        given["x"] = given["x"].to(memory_format=torch.channels_last)
        output = network(**given)
        assert difference(output, expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            mixed = network(**given)
        assert mixed.dtype == torch.float32
        assert 0 < difference(mixed, expected) < 0.1 * expected.abs().max()
        half = {name: value.bfloat16() for name, value in given.items() if name != "timesteps"}
        low = network.bfloat16()(timesteps=given["timesteps"], **half)
        assert low.dtype == torch.bfloat16
        assert difference(low.float(), expected) < 0.1 * expected.abs().max()
    network.float().train()
    with torch.autocast("cpu", torch.bfloat16):
        network(**given).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("use_spatial_transformer", [False, True])
def test_channels_last_is_kept_to_the_end(use_spatial_transformer: bool) -> None:
    config = BASE if use_spatial_transformer else PLAIN
    network = build(config)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    given = inputs(config, 8, 12)
    strays: list[str] = []

    def watch(name: str) -> Callable[[object, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: object, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.ndim == 4 and not output.is_contiguous(memory_format=torch.channels_last):
                strays.append(name)

        return hook

    for name, module in network.named_modules():
        if not isinstance(module, UNet):
            module.register_forward_hook(watch(name))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(**{**given, "x": given["x"].to(memory_format=torch.channels_last)})
    assert strays == []


@pytest.mark.parametrize("config", [BASE, PLAIN, replace(BASE, use_linear_in_transformer=True)])
def test_every_branch_ends_in_a_zero_layer(config: UNetConfig) -> None:
    network = UNet(config)
    kernels = {name: value for name, value in network.named_parameters() if value.ndim > 1}
    zero = {name for name, value in kernels.items() if not value.any()}
    assert zero == {
        name for name in kernels if re.search(r"(out_layers\.3|\.proj_out|^out\.2)\.weight$", name)
    }


def test_starts_at_zero_and_dropout_is_for_training_only() -> None:
    network, given = UNet(replace(BASE, dropout=0.5)).eval(), inputs(BASE, 4, 8)
    with torch.no_grad():
        assert not network(**given).any()
        randomize(network)
        assert torch.equal(network(**given), network(**given))
        network.train()
        assert not torch.equal(network(**given), network(**given))


def test_timestep_embedding() -> None:
    embedded = timestep_embedding(torch.tensor([0, 999], dtype=torch.int64), 7)
    assert embedded.shape == (2, 7) and embedded.dtype == torch.float32
    assert embedded[0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    frequencies = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    assert difference(embedded[1, 3:6], torch.sin(999 * frequencies).float()) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(timestep_embedding(torch.tensor([0, 999]), 7), embedded)


def test_depth_of_the_middle_is_its_own() -> None:
    config = replace(BASE, transformer_depth=(1, 2, 3))
    for change, depth in ({}, 3), ({"transformer_depth_middle": 1}, 1):
        with torch.device("meta"):
            keys = UNet(replace(config, **change)).state_dict().keys()
        found = {name.split(".")[3] for name in keys if name.startswith("middle_block.1.transformer_blocks.")}
        assert found == {str(block) for block in range(depth)}


def test_lists_and_zero_classes_are_normalised() -> None:
    config = replace(BASE, attention_resolutions=[1, 2], channel_mult=[1, 2, 2], num_classes=0)
    assert config == BASE and hash(config) == hash(BASE)
    assert replace(BASE, adm_in_channels=8).num_classes == "sequential"


def test_continuous_class() -> None:
    config = replace(BASE, num_classes="continuous")
    network, given = build(config), inputs(config, 4, 8)
    with torch.no_grad():
        low, high = (network(**given, vector=torch.full((2, 1), value)) for value in (0.1, 0.9))
    assert network.state_dict()["label_emb.weight"].shape == (128, 1)
    assert difference(low, high) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": -1}, "num_head_channels=-1: one must be positive"),
        ({"num_heads": 0, "num_head_channels": 8}, "num_heads=0"),
        ({"dims": 4}, "dims=4"),
        ({"use_spatial_transformer": False}, "context_dim=24 needs use_spatial_transformer"),
        ({"num_groups": 12}, "num_groups=12 must divide model_channels=32"),
        ({"num_res_blocks": (1, 2)}, "num_res_blocks=.1, 2. must be one number, or 3"),
        ({"transformer_depth": (1,) * 4}, "transformer_depth"),
        ({"num_classes": "sequential"}, "adm_in_channels=None"),
        ({"num_classes": 3, "adm_in_channels": 8}, "num_classes=3"),
    ],
)
def test_contradictory_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, **change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(BASE, num_heads=64), "num_heads=64"),
        (replace(BASE, num_head_channels=64), "num_head_channels=64"),
        (replace(PLAIN, num_heads=5), "no such heads in 32 channels"),
        (replace(PLAIN, num_heads=5, legacy=False), "no such heads"),
        (replace(PLAIN, num_head_channels=12), "num_head_channels=12"),
        (replace(PLAIN, num_heads_upsample=5), "no such heads"),
    ],
)
def test_heads_that_do_not_fit(config: UNetConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        UNet(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 4, 13, 12)},
            r"\(13, 12\) must be a multiple of \(4, 4\).\nThe nearest is \(12, 12\)",
        ),
        ({"x": torch.zeros(2, 4, 1, 12)}, r"The nearest is \(4, 12\)"),
        ({"x": torch.zeros(2, 3, 8, 12)}, r"\(2, 3, 8, 12\); this network takes \(b, 4, h, w\)"),
        ({"x": torch.zeros(2, 4, 8)}, r"takes \(b, 4, h, w\)"),
        ({"context": None}, r"context \(b, tokens, 24\); got none"),
        ({"context": torch.zeros(2, 7, 16)}, r"got \(2, 7, 16\)"),
        ({"vector": torch.zeros(2, 8)}, "without classes"),
        ({"residuals": (torch.zeros(2, 32, 8, 12),)}, "Got 1 residuals; this network takes none or 10"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    network = build(BASE)
    with pytest.raises(ValueError, match=message):
        network(**{**inputs(BASE, 8, 12), **change})


@pytest.mark.parametrize(
    ("change", "vector", "message"),
    [
        ({"num_classes": 6}, None, r"\(b,\) integer labels below 6; got none"),
        ({"num_classes": 6}, torch.zeros(2), "integer labels"),
        ({"adm_in_channels": 8}, torch.zeros(2, 9), r"vector \(b, 8\) of floats; got \(2, 9\)"),
        ({"adm_in_channels": 8}, None, "got none"),
    ],
)
def test_vectors_that_do_not_fit(change: dict[str, Any], vector: Tensor | None, message: str) -> None:
    network = build(replace(BASE, **change))
    with pytest.raises(ValueError, match=message):
        network(**inputs(BASE, 8, 12), vector=vector)


def test_volumes_keep_their_depth() -> None:
    config = replace(PLAIN, dims=3)
    network, given = build(config), inputs(config, 3, 4, 6)
    depths: list[int] = []
    with torch.no_grad():
        network(**given, patch=Patch(encoder=lambda i, h: (depths.append(h.shape[2]), h)[1]))
    assert set(depths) == {3}
    with pytest.raises(ValueError, match=r"multiple of \(1, 2, 2\)"):
        network(**inputs(config, 3, 4, 5))


def test_a_context_is_refused_where_none_is_attended_to() -> None:
    network = build(PLAIN)
    with pytest.raises(ValueError, match="without context_dim"):
        network(**inputs(PLAIN, 8, 12), context=torch.zeros(2, 7, 24))
