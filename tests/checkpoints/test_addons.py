"""LoRA put on a model and taken off: every key accounted for, the base the same bit by bit afterwards."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from addon_files import CONV, NORM, QUERY, digest, dotted, draw, everything, kohya, layers, one, weight, write

from sfumato.checkpoints.addons.apply import Lora, Weighted, apply_addons, merged, read_lora, read_weighted
from sfumato.checkpoints.build import NETWORKS
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.files import sha256
from sfumato.checkpoints.layouts.tables import pairs, prefix, to_foreign
from sfumato.checkpoints.load import ModelFile, open_model
from sfumato.cli import main
from sfumato.errors import CheckpointError, InputError, NumericalError
from sfumato.presets import ModelConfig
from sfumato.runtime import channels_last

CYCLES = int(os.environ.get("SFUMATO_CYCLES", "20"))  # a soak test takes 1,000


@pytest.fixture(scope="module")
def model(sd_file: Path) -> ModelFile:
    return open_model(sd_file)


@pytest.fixture(scope="module")
def whole(model: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> Lora:
    """Of every layer of the U-Net and the text encoder."""
    return read_lora(everything(model, tmp_path_factory.mktemp("lora") / "everything.safetensors"))


@pytest.fixture
def untouched(model: ModelFile) -> Iterator[None]:
    before = digest(model)
    yield
    assert digest(model) == before


# What is added


def test_the_changes_are_those_of_the_formula(model: ModelFile, tmp_path: Path) -> None:
    factors = one(alpha=1.5) | one(CONV, (32, 32, 3, 3), alpha=1.5)
    path = write(tmp_path / "a.safetensors", kohya("lora_unet_", factors))
    base = {name: weight(model, f"{name}.weight").clone() for name in factors}
    with apply_addons(model.config, model.modules, [Weighted(read_lora(path), 0.7, 0.0)]):
        for name, own in base.items():
            expected = own.double() + 0.7 * factors[name].change.double()
            torch.testing.assert_close(
                weight(model, f"{name}.weight").double(), expected, rtol=1e-6, atol=1e-6
            )


def test_several_add_up_in_any_order(model: ModelFile, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{seed}.safetensors", kohya("lora_unet_", one(seed=seed))) for seed in (1, 2, 3)
    ]
    strengths = (1.0, -0.5, 0.25)
    loras = [Weighted(read_lora(path), strength) for path, strength in zip(paths, strengths, strict=True)]
    made = []
    for order in (loras, loras[::-1], [loras[1], loras[0], loras[2]]):
        with apply_addons(model.config, model.modules, order):
            made.append(weight(model, f"{QUERY}.weight").clone())
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    total = sum(one(seed=seed)[QUERY].change * each for seed, each in enumerate(strengths, 1))
    torch.testing.assert_close(made[0], weight(model, f"{QUERY}.weight") + total)


def test_the_two_weights_are_those_of_unet_and_text(model: ModelFile, tmp_path: Path) -> None:
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    factors, words = one(), draw({text: (64, 64)})
    path = write(tmp_path / "a.safetensors", kohya("lora_unet_", factors) | kohya("lora_te_", words))
    base, own = weight(model, f"{QUERY}.weight").clone(), weight(model, f"{text}.weight", "text").clone()
    with apply_addons(model.config, model.modules, [Weighted(read_lora(path), 0.5, -2.0)]):
        torch.testing.assert_close(weight(model, f"{QUERY}.weight"), base + 0.5 * factors[QUERY].change)
        torch.testing.assert_close(weight(model, f"{text}.weight", "text"), own - 2.0 * words[text].change)


@pytest.mark.parametrize("spelling", ["alone", "pattern", "stabilised", "null"])
def test_alpha_from_the_settings_of_peft(spelling: str, model: ModelFile, tmp_path: Path) -> None:
    """In the file, as diffusers writes it, or beside it."""
    factors = one(alpha=3.0)  # of rank 3: what a file without any alpha means
    settings = {
        "alone": {"unet.lora_alpha": 6, "unet.r": 3, "text_encoder.lora_alpha": 100},
        "pattern": {"unet.lora_alpha": 100, "unet.alpha_pattern": {QUERY.rpartition(".")[2]: 6}},
        "stabilised": {"unet.lora_alpha": 6, "unet.use_rslora": True},
        "null": {"unet.lora_alpha": None, "unet.alpha_pattern": None},
    }[spelling]
    scale = {"stabilised": 6 / math.sqrt(3), "null": 1.0}.get(spelling, 2.0)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write(path, dotted("unet.", factors), lora_adapter_metadata=json.dumps(settings))
    assert [adapter.scale for adapter in read_lora(path).adapters] == [pytest.approx(scale)]
    beside = tmp_path / "adapter_model.safetensors"
    write(beside, dotted("base_model.model.", factors))
    config = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith("unet.")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    assert [adapter.scale for adapter in read_lora(beside).adapters] == [pytest.approx(scale)]


def test_settings_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for text in (
        "[]", "{", '{"unet.r": 0}', '{"unet.lora_alpha": "many"}', '{"unet.lora_alpha": NaN}', "[" * 5000,
        '{"unet.alpha_pattern": {"down_blocks.*to_q": 4}}',
    ):  # fmt: skip
        write(path, dotted("unet.", one()), lora_adapter_metadata=text)
        with pytest.raises(CheckpointError, match=str(path)):
            read_lora(path)


LYCORIS: Mapping[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "LoHa": (QUERY, {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}),
    "LoHa of a kernel": (
        CONV,
        {
            "hada_w1_a": (2, 32), "hada_w1_b": (2, 32), "hada_t1": (2, 2, 3, 3),
            "hada_w2_a": (2, 32), "hada_w2_b": (2, 32), "hada_t2": (2, 2, 3, 3),
        },
    ),
    "LoKr": (QUERY, {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}),
    "LoKr of a kernel": (CONV, {"lokr_w1": (4, 4), "lokr_w2": (8, 8, 3, 3)}),
    "LoCon with a core": (
        CONV,
        {
            "lora_down.weight": (2, 32, 1, 1), "lora_mid.weight": (2, 2, 3, 3),
            "lora_up.weight": (32, 2, 1, 1),
        },
    ),
    "difference": (CONV, {"diff": (32, 32, 3, 3), "diff_b": (32,)}),
    "norm": (NORM, {"w_norm": (32,), "b_norm": (32,)}),
    "bias of a LoRA": (
        CONV, {"lora_A.weight": (2, 32, 3, 3), "lora_B.weight": (32, 2, 1, 1), "lora_B.bias": (32,)}
    ),
}  # fmt: skip


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("kind", LYCORIS)
def test_every_kind_changes_its_layer_and_leaves_it(kind: str, model: ModelFile, tmp_path: Path) -> None:
    """What each kind computes, tests/nn/test_lora.py compares with its paper."""
    name, shapes = LYCORIS[kind]
    generator = torch.Generator().manual_seed(2)
    tensors = {slot: torch.randn(shape, generator=generator) for slot, shape in shapes.items()}
    path = write(
        tmp_path / "a.safetensors", {f"unet.{name}.{slot}": value for slot, value in tensors.items()}
    )
    base = {
        end: weight(model, f"{name}.{end}").clone()
        for end in ("weight", "bias")
        if "attn" not in name or end != "bias"
    }
    with apply_addons(model.config, model.modules, [Weighted(read_lora(path), 2.0)]):
        if kind in ("difference", "norm"):
            for end, value in zip(("weight", "bias"), tensors.values(), strict=True):
                torch.testing.assert_close(weight(model, f"{name}.{end}"), base[end] + 2 * value)
        elif kind == "LoHa":
            product = (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (
                tensors["hada_w2_a"] @ tensors["hada_w2_b"]
            )
            torch.testing.assert_close(weight(model, f"{name}.weight"), base["weight"] + 2 * product)
        elif kind == "LoKr":
            product = torch.kron(tensors["lokr_w1"], tensors["lokr_w2_a"] @ tensors["lokr_w2_b"])
            torch.testing.assert_close(weight(model, f"{name}.weight"), base["weight"] + 2 * product)
        else:
            assert (weight(model, f"{name}.weight") - base["weight"]).abs().mean() > 0.1
        if kind == "bias of a LoRA":
            torch.testing.assert_close(
                weight(model, f"{name}.bias"), base["bias"] + 2 * tensors["lora_B.bias"]
            )


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("key", "of_inputs"),
    [
        ("dora_scale", False),
        ("dora_scale", True),
        ("lora_magnitude_vector", False),
        ("lora_magnitude_vector.default.weight", False),
    ],
)
def test_a_decomposed_lora_has_the_magnitudes_of_its_file(
    key: str, of_inputs: bool, model: ModelFile, tmp_path: Path
) -> None:
    """Liu et al. 2024: at weight 1 every output (or input) has the norm that the file says."""
    magnitude = torch.linspace(1, 2, 32)
    stored = magnitude[None, :, None, None] if of_inputs else magnitude[:, None, None, None]
    stored = stored if key == "dora_scale" else magnitude[None, :, None, None]  # PEFT's shape of a kernel
    tensors = kohya("lora_unet_", one(CONV, (32, 32, 3, 3)))
    path = write(tmp_path / "a.safetensors", {**tensors, f"lora_unet_{CONV.replace('.', '_')}.{key}": stored})
    base = weight(model, f"{CONV}.weight").clone()
    with apply_addons(model.config, model.modules, [Weighted(read_lora(path))]):
        whole = weight(model, f"{CONV}.weight").clone()
    norms = whole.transpose(0, 1).flatten(1).norm(dim=1) if of_inputs else whole.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, magnitude)
    with apply_addons(model.config, model.modules, [Weighted(read_lora(path), 0.25)]):
        torch.testing.assert_close(weight(model, f"{CONV}.weight"), base + 0.25 * (whole - base))


def test_a_change_of_one_matrix_for_three_goes_to_all_three(sd_config: ModelConfig, tmp_path: Path) -> None:
    """OpenCLIP joins query, key and value; the change of the whole is cut like the whole."""
    config = open_clip(sd_config)
    parts = networks(config)
    key, width = "text_encoder.transformer.resblocks.1.attn.in_proj", 64
    factors = draw({key: (3 * width, width)})[key]
    path = write(tmp_path / "a.safetensors", dotted("", {key: factors}))
    names = [f"text_model.encoder.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    base = [parts["text"].get_parameter(name).data.clone() for name in names]
    with apply_addons(config, parts, [Weighted(read_lora(path))]):
        for name, own, change in zip(names, base, factors.change.chunk(3), strict=True):
            torch.testing.assert_close(parts["text"].get_parameter(name).data, own + change)


def test_a_change_of_one_of_three_matrices_leaves_the_others(sd_config: ModelConfig, tmp_path: Path) -> None:
    """Plain attention joins query, key and value, head by head; diffusers keeps them apart."""
    assert sd_config.unet is not None
    unet = replace(sd_config.unet, use_spatial_transformer=False, context_dim=None)
    config = replace(sd_config, unet=unet)
    parts = networks(config)
    name = "input_blocks.1.1.qkv.weight"
    factors = draw({"down_blocks.0.attentions.0.to_k": (32, 32)})
    path = write(tmp_path / "a.safetensors", dotted("unet.", factors))
    base = parts["unet"].get_parameter(name).data.clone()
    with apply_addons(config, parts, [Weighted(read_lora(path))]):
        change = parts["unet"].get_parameter(name).data - base
    by_head = change.reshape(8, 3, 4, 32)
    torch.testing.assert_close(
        by_head[:, 1].reshape(32, 32), next(iter(factors.values())).change, rtol=1e-4, atol=1e-6
    )
    assert not by_head[:, 0].any() and not by_head[:, 2].any()


def open_clip(config: ModelConfig) -> ModelConfig:
    """With a text encoder of OpenCLIP's."""
    assert config.text is not None
    return replace(config, text=replace(config.text, pad_token_id=0, hidden_act="gelu"))


def networks(config: ModelConfig) -> dict[str, nn.Module]:
    """The parts of a model in memory, with random weights."""
    found: dict[str, nn.Module] = {}
    generator = torch.Generator().manual_seed(0)
    for part in ("unet", "autoencoder", "text"):
        found[part] = NETWORKS[part](getattr(config, part)).requires_grad_(False)
        for parameter in found[part].parameters():
            parameter.normal_(std=0.05, generator=generator)
    return found


# What is restored


@pytest.mark.usefixtures("untouched")
def test_the_weights_are_the_same_bits_after_many_times(model: ModelFile, whole: Lora) -> None:
    before, own = digest(model), whole
    storages = {name: value.data_ptr() for name, value in model.module("unet").named_parameters()}
    for cycle in range(CYCLES):
        with apply_addons(model.config, model.modules, [Weighted(own, 0.1 + cycle / 7, -0.3)]):
            pass
    assert digest(model) == before
    assert storages == {name: value.data_ptr() for name, value in model.module("unet").named_parameters()}


def test_the_file_under_the_weights_stays(model: ModelFile, sd_file: Path, whole: Lora) -> None:
    before = sha256(sd_file)
    with apply_addons(model.config, model.modules, [Weighted(whole, 3.0, 3.0)]):
        assert sha256(sd_file) == before
        again = open_model(sd_file)
        assert not torch.equal(weight(again, f"{QUERY}.weight"), weight(model, f"{QUERY}.weight"))
    assert sha256(sd_file) == before


@pytest.mark.usefixtures("untouched")
def test_an_error_inside_restores_too(model: ModelFile, whole: Lora) -> None:
    with (
        pytest.raises(KeyError),
        apply_addons(model.config, model.modules, [Weighted(whole)]),
    ):
        raise KeyError("mine")


@pytest.mark.usefixtures("untouched")
def test_it_nests(model: ModelFile, tmp_path: Path) -> None:
    first, second = (
        Weighted(read_lora(write(tmp_path / f"{seed}.safetensors", kohya("lora_unet_", one(seed=seed)))))
        for seed in (1, 2)
    )
    name = f"{QUERY}.weight"
    with apply_addons(model.config, model.modules, [first]):
        outer = weight(model, name).clone()
        with apply_addons(model.config, model.modules, [second]):
            torch.testing.assert_close(weight(model, name), outer + one(seed=2)[QUERY].change)
        assert torch.equal(weight(model, name), outer)


class Lazy(Mapping[str, nn.Module]):
    """Networks that must not be asked for; neither may `in` be."""

    def __init__(self, parts: Mapping[str, nn.Module], allowed: set[str]) -> None:
        self.parts, self.allowed = parts, allowed

    def __getitem__(self, part: str) -> nn.Module:
        assert part in self.allowed, f"{part} was loaded"
        return self.parts[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def test_parts_are_asked_for_only_where_something_changes(model: ModelFile, whole: Lora) -> None:
    own = whole
    for allowed, unet, text in ((set(), 0, 0), ({"unet"}, 1, 0), ({"text"}, 0, 1), ({"unet", "text"}, 1, 1)):
        with apply_addons(model.config, Lazy(model.modules, allowed), [Weighted(own, unet, text)]):
            pass
    with apply_addons(model.config, Lazy(model.modules, set()), []):
        pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_changed_in_float32(dtype: torch.dtype, sd_file: Path, whole: Lora) -> None:
    narrow = open_model(sd_file, dtype=dtype)
    before = digest(narrow)
    base = weight(narrow, f"{QUERY}.weight").clone()
    change = draw(layers(narrow.module("unet")))[QUERY].change
    with apply_addons(narrow.config, narrow.modules, [Weighted(whole)]):
        made = weight(narrow, f"{QUERY}.weight")
        assert made.dtype == dtype
        torch.testing.assert_close(made, (base.float() + change).to(dtype), rtol=1e-2, atol=1e-3)
    assert digest(narrow) == before


def test_what_a_narrow_format_cannot_hold_is_refused(sd_file: Path, whole: Lora) -> None:
    narrow = open_model(sd_file, dtype=torch.float16)
    before = digest(narrow)
    with (
        pytest.raises(NumericalError, match="float16"),
        apply_addons(narrow.config, narrow.modules, [Weighted(whole, 1e6)]),
    ):
        pytest.fail("it was applied")
    assert digest(narrow) == before


def test_the_layout_in_memory_stays(sd_file: Path, whole: Lora) -> None:
    model = open_model(sd_file)
    channels_last(model.module("unet"))
    before = digest(model)
    with apply_addons(model.config, model.modules, [Weighted(whole)]):
        made = weight(model, f"{CONV}.weight")
        assert made.is_contiguous(memory_format=torch.channels_last) and not made.is_contiguous()
    assert digest(model) == before


def test_a_model_that_was_moved_meanwhile_stays_where_it_is(sd_file: Path, whole: Lora) -> None:
    model = open_model(sd_file)
    base = weight(model, f"{QUERY}.weight").clone()
    with apply_addons(model.config, model.modules, [Weighted(whole)]):
        model.module("unet").to(torch.bfloat16)
    assert torch.equal(weight(model, f"{QUERY}.weight"), base.bfloat16())


# What is written


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_merged_weights_are_the_applied_ones(
    layout: str, model: ModelFile, sd_file: Path, whole: Lora, tmp_path: Path
) -> None:
    loras = [Weighted(whole, 0.8, 0.4)]
    out = tmp_path / ("merged.safetensors" if layout == "ldm" else "merged")
    convert(merged(open_model(sd_file).opened, loras), out)
    written = open_model(out)
    with apply_addons(model.config, model.modules, loras):
        for part in ("unet", "text", "autoencoder"):
            own, other = (each.module(part).state_dict() for each in (model, written))
            assert all(torch.equal(own[name], other[name]) for name in own), part
    assert not torch.equal(weight(written, f"{QUERY}.weight"), weight(model, f"{QUERY}.weight"))


def test_merging_into_joined_matrices(sd_config: ModelConfig, tmp_path: Path) -> None:
    """A file in OpenCLIP's layout: the change of k goes into its rows of the matrix for all three."""
    config = open_clip(sd_config)
    assert config.unet is not None
    unet = replace(config.unet, model_channels=64, num_heads=-1, num_head_channels=64)  # heads as in SD 2
    config = replace(config, unet=unet)
    parts = networks(config)
    tensors: dict[str, Tensor] = {}
    for part, module in parts.items():
        table = pairs(part, getattr(config, part), "ldm")
        foreign = to_foreign(table, module.state_dict())
        tensors |= {prefix(part, "ldm", config) + name: tensor for name, tensor in foreign.items()}
    source = write(tmp_path / "open.safetensors", tensors)
    name = "text_model.encoder.layers.0.self_attn.k_proj"
    factors = draw({name: (64, 64)})
    path = write(tmp_path / "a.safetensors", kohya("lora_te_", factors))
    convert(merged(open_model(source).opened, [Weighted(read_lora(path))]), tmp_path / "out.safetensors")
    written = open_model(tmp_path / "out.safetensors").module("text").state_dict()
    for key, value in parts["text"].state_dict().items():
        expected = value + factors[name].change if key == f"{name}.weight" else value
        torch.testing.assert_close(written[key], expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.safetensors", (1.0, 1.0)),
        ("a.safetensors:0.8", (0.8, 0.8)),
        ("a.safetensors:0.8:-.5", (0.8, -0.5)),
        ("a:2", (2.0, 2.0)),
        ("a", (1.0, 1.0)),
        ("odd:1:0.5", (0.5, 0.5)),
    ],
)
def test_a_lora_as_a_command_line_gives_it(
    words: str, expected: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's own colons and numbers are its name where a file has it."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "odd:1"):
        write(tmp_path / name, kohya("lora_unet_", one()))
    found = read_weighted(words, tmp_path)
    assert (found.unet, found.text) == expected


def test_a_lora_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file 'x'"):
        read_weighted("x:0.8")
    with pytest.raises(InputError, match="there is no 'x'"):
        read_weighted("x:0.8", tmp_path)


def test_convert_merges_from_the_command_line(
    sd_file: Path, whole: Lora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = whole.path.stem, tmp_path / "out.safetensors"
    words = ["convert", str(sd_file), str(out), "--only", "text", "--lora", f"{name}:0.25"]
    assert main([*words, "--lora-dir", str(whole.path.parent)]) == 0
    assert f"merged, {name}: U-Net 0.25" in capsys.readouterr().out
    key = "text_model.encoder.layers.0.mlp.fc1"
    base, made = (open_model(path).module("text").get_parameter(f"{key}.weight") for path in (sd_file, out))
    change = draw(layers(open_model(sd_file).module("text")))[key].change
    torch.testing.assert_close(made, base + 0.25 * change)
    assert main(["convert", str(sd_file), str(tmp_path / "b.safetensors"), "--lora", "none:1"]) == 2
    assert not (tmp_path / "b.safetensors").exists()
