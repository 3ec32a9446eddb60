"""LoRA that do not fit: every key is accounted for, and nothing is changed."""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from addon_files import (
    CONV,
    KOHYA,
    NORM,
    QUERY,
    Factors,
    applied,
    digest,
    draw,
    everything,
    kohya,
    one,
    weight,
    write,
)

from sfumato.checkpoints.addons.apply import Lora, Weighted, apply_addons, fit, read_lora
from sfumato.checkpoints.addons.names import names_of
from sfumato.checkpoints.load import ModelFile, open_model
from sfumato.errors import CheckpointError, InputError, UnsafeCheckpointError
from sfumato.families import FAMILIES


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


def test_every_key_is_used_ignored_or_unknown(model: ModelFile, whole: Lora, tmp_path: Path) -> None:
    found = fit(whole, model.config)
    assert not found.unknown and not found.ignored
    used = {name for change in found.changes for name in change.adapter.names}
    assert len(used) == whole.num_keys
    bundled = {"bundle_emb.cat.string_to_param.*": torch.ones(1, 64)}
    tensors = kohya("lora_unet_", one()) | bundled | {"what": torch.ones(1)}
    odd = read_lora(write(tmp_path / "odd.safetensors", tensors))
    found = fit(odd, model.config)
    assert found.ignored == {"bundled embeddings": ("bundle_emb.cat.string_to_param.*",)}
    assert found.unknown == ("what",) and odd.num_keys == 5


REFUSED: Mapping[str, tuple[dict[str, Tensor], str]] = {
    "one key too many": (kohya("lora_unet_", one()) | {"lora_unet_zzz.alpha": torch.ones(())}, "zzz"),
    "an odd key": (kohya("lora_unet_", one()) | {"oft_blocks": torch.ones(2)}, "oft_blocks"),
    "another shape": (kohya("lora_unet_", one(shape=(32, 16))), "3 of its 3 keys"),
    "a second text encoder": (
        kohya("lora_te2_", draw({"text_model.encoder.layers.0.mlp.fc1": (128, 64)})), "lora_te2",
    ),
    "a bias where none is": ({f"unet.{QUERY}.diff_b": torch.ones(32)}, "diff_b"),
    "magnitudes": (
        kohya("lora_unet_", one()) | {f"{KOHYA}.dora_scale": torch.ones(5, 1)}, "dora_scale",
    ),
    "half a pair": ({f"{KOHYA}.lora_down.weight": torch.ones(2, 32)}, "lacks lora_up"),
    "ranks": (
        {f"{KOHYA}.lora_down.weight": torch.ones(2, 32), f"{KOHYA}.lora_up.weight": torch.ones(32, 3)},
        "ranks",
    ),
    "no rank": (
        {
            f"{KOHYA}.lora_down.weight": torch.ones(0, 32), f"{KOHYA}.lora_up.weight": torch.ones(32, 0),
            f"{KOHYA}.alpha": torch.ones(()),
        },
        "its rank is 0",
    ),
    "two kinds": (
        {f"{KOHYA}.lora_down.weight": torch.ones(2, 32), f"{KOHYA}.diff": torch.ones(32, 32)}, "not one kind",
    ),
    "infinite": ({f"unet.{QUERY}.diff": torch.full((32, 32), math.inf)}, "not finite"),
    "no number": ({f"unet.{QUERY}.diff": torch.full((32, 32), math.nan)}, "not finite"),
    "infinite alpha": (
        {**kohya("lora_unet_", one()), f"{KOHYA}.alpha": torch.tensor(math.inf)}, "not finite",
    ),
    "alphas": (
        {**kohya("lora_unet_", one()), f"{KOHYA}.alpha": torch.ones(2)}, "alpha has 2 numbers",
    ),
    "whole numbers": ({f"unet.{QUERY}.diff": torch.ones(32, 32, dtype=torch.int32)}, "int32"),
    "an embedding": ({"emb_params": torch.ones(2, 64)}, "textual inversion"),
    "a model": ({"model.diffusion_model.out.2.bias": torch.ones(4), "x": torch.ones(1)}, "no LoRA"),
}  # fmt: skip


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    case: str, model: ModelFile, tmp_path: Path
) -> None:
    tensors, reason = REFUSED[case]
    path = write(tmp_path / "odd.safetensors", tensors)
    good = write(tmp_path / "good.safetensors", kohya("lora_unet_", one()))
    with pytest.raises(CheckpointError, match=reason) as caught:  # noqa: SIM117
        with apply_addons(
            model.config, model.modules, [Weighted(read_lora(good)), Weighted(read_lora(path))]
        ):
            pytest.fail("it was applied")
    assert str(path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("family", "title"), [("sd1", "Stable Diffusion 1"), ("sd2-base", "Stable Diffusion 2"), ("sdxl", "SDXL")]
)
def test_the_base_that_a_lora_was_made_for_is_named(
    family: str, title: str, model: ModelFile, tmp_path: Path
) -> None:
    config = FAMILIES[family].unet
    names = names_of("unet", config).dotted
    shapes = {
        name: layer["weight"].shape for name, layer in names.items()
        if name.startswith("mid_block.attentions") and name.endswith((".to_k", ".to_q")) and "weight" in layer
    }  # fmt: skip
    factors = {
        name: Factors(torch.ones(1, shape[1]), torch.ones(shape[0], 1), 1.0) for name, shape in shapes.items()
    }
    path = write(tmp_path / "other.safetensors", kohya("lora_unet_", factors))
    with (
        pytest.raises(CheckpointError, match=f"made for {title}"),
        apply_addons(model.config, model.modules, [Weighted(read_lora(path))]),
    ):
        pytest.fail("it was applied")


def test_a_lora_of_a_diffusion_transformer_is_called_that(model: ModelFile, tmp_path: Path) -> None:
    path = write(
        tmp_path / "f.safetensors", kohya("lora_unet_double_blocks_0_", {"img_attn_qkv": one()[QUERY]})
    )
    with (
        pytest.raises(CheckpointError, match="diffusion transformer"),
        apply_addons(model.config, model.modules, [Weighted(read_lora(path))]),
    ):
        pytest.fail("it was applied")


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_no_numbers(number: float, model: ModelFile, whole: Lora) -> None:
    with (
        pytest.raises(InputError, match="weights"),
        apply_addons(model.config, model.modules, [Weighted(whole, number)]),
    ):
        pytest.fail("it was applied")


def test_a_pickle_that_acts_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"cposix\nsystem\n(Vtouch {canary}\ntR.".encode()
    path = tmp_path / "lora.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lora/data.pkl", b"\x80\x02" + code)
        archive.writestr("lora/version", b"3\n")
    with pytest.raises(UnsafeCheckpointError):
        read_lora(path)
    assert not canary.exists()


def test_a_pickled_lora_is_read(tmp_path: Path, model: ModelFile) -> None:
    tensors = kohya("lora_unet_", one())
    torch.save(tensors, tmp_path / "a.pt")
    torch.save({"state_dict": tensors}, tmp_path / "a.ckpt")
    for name in ("a.pt", "a.ckpt"):
        assert len(fit(read_lora(tmp_path / name), model.config).changes) == 1


def test_the_second_name_of_a_layer_is_left_out(model: ModelFile, tmp_path: Path) -> None:
    """Some files hold their layers under two programs' names."""
    first = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": one()[QUERY]}
    tensors = kohya("lora_unet_", first) | kohya("lora_unet_", one())
    found = fit(read_lora(write(tmp_path / "a.safetensors", tensors)), model.config)
    assert len(found.changes) == 1 and not found.unknown
    assert {rule: len(names) for rule, names in found.ignored.items()} == {"second name of a layer": 3}


SIDES = st.lists(st.sampled_from([0, 1, 2, 3, 16, 32, 288]), max_size=5)
SHAPES = SIDES.map(tuple).filter(lambda shape: math.prod(shape) < 20_000)
SLOTS = st.sampled_from([
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.x.weight", "lora_B.bias", "alpha",
    "diff", "diff_b", "w_norm", "b_norm", "dora_scale", "lora_magnitude_vector", "hada_w1_a", "hada_w1_b",
    "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2",
    "lokr_w2_a", "lokr_w2_b", "lokr_t2", "oft_blocks", "", ".weight", "lora.up.weight", "up.weight",
])  # fmt: skip
LAYERS = st.sampled_from([QUERY, CONV, NORM])
FITTING = {  # so that some pass the first checks
    "lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "hada_w1_a": (32, 2), "hada_w1_b": (2, 32),
    "hada_w2_a": (32, 2), "hada_w2_b": (2, 32), "lokr_w1": (16, 16), "lokr_w2_a": (2, 3), "lokr_w2_b": (3, 2),
    "diff": (32, 32), "alpha": (), "dora_scale": (32, 1),
}  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), layer=LAYERS, slots=st.sets(SLOTS, min_size=1, max_size=6))
def test_any_tensors_are_applied_or_refused(
    data: st.DataObject, layer: str, slots: set[str], model: ModelFile, tmp_path: Path
) -> None:
    """No shape leads to anything but a LoRA that fits or a `CheckpointError`; the weights stay."""
    before = weight(model, f"{layer}.weight").clone()
    tensors = {}
    for slot in sorted(slots):
        known = slot in FITTING and data.draw(st.booleans())
        shape = FITTING[slot] if known else data.draw(SHAPES)
        tensors[f"unet.{layer}.{slot}"] = torch.full(shape, 0.5)
    path = write(tmp_path / "a.safetensors", tensors)
    try:
        applied(model, Weighted(read_lora(path)))
    except CheckpointError as error:
        event(error.message[-20:] if "cannot be read" in error.message else "refused")
    else:
        event("applied")
    assert torch.equal(weight(model, f"{layer}.weight"), before)
