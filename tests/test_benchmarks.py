"""The benchmarks' own arithmetic: exact counts, the released models' sizes, the gate of equality."""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script of `benchmarks/`, which is no package; its modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


def test_a_guided_step_of_stable_diffusion_has_803_gmac(load: Load) -> None:
    # Attention included; without its two products per head, published counts say 339 G for one sample.
    flops, releases = load("flops"), load("releases")
    unet = flops.build(flops.UNet, releases.FAMILIES["sd1"].unet)
    inputs = [torch.empty(2, *shape, device="meta") for shape in ((4, 64, 64), (), (77, 768))]
    macs = flops.count(lambda: unet(*inputs))
    assert sum(macs.values()) == flops.unet_macs(unet, 2, 64) == 803_273_441_280
    assert (sum(macs.values()) - macs["attention"]) / 2 == pytest.approx(338.6e9, rel=1e-3)


def test_decoder_and_text_counts(load: Load) -> None:
    flops, releases = load("flops"), load("releases")
    autoencoder = flops.build(flops.AutoencoderKL, releases.FAMILIES["sd1"].autoencoder)
    encoder = flops.build(flops.CLIPTextEncoder, flops.CLIPTextConfig())
    assert flops.decoder_macs(autoencoder, 64) == pytest.approx(1257.3e9, rel=1e-4)
    assert flops.encoder_macs(autoencoder, 512) == pytest.approx(558.3e9, rel=1e-4)
    assert flops.text_macs(encoder, 1) == pytest.approx(6.65e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "prefix", "parameters"),
    [
        ("sd1", "", 1_066_235_307),
        ("sd1", "model.diffusion_model.", 859_520_964),
        ("sd2-v", "model.diffusion_model.", 865_910_724),
        ("sdxl", "model.diffusion_model.", 2_567_463_684),
        ("sdxl", "conditioner.embedders.1.", 694_659_841),
    ],
)
def test_the_families_have_the_released_numbers_of_parameters(
    load: Load, name: str, prefix: str, parameters: int
) -> None:
    releases = load("releases")
    named = releases.shapes(releases.FAMILIES[name])
    assert (
        sum(math.prod(s) for n, s, d in named if n.startswith(prefix) and d.is_floating_point) == parameters
    )


def test_weights_follow_from_the_seed_and_no_layer_is_silent(load: Load, tmp_path: Path) -> None:
    weights, releases = load("weights"), load("releases")
    family = releases.tiny(releases.FAMILIES["sd1"])
    weights.write_safetensors(tmp_path / "a.safetensors", family, seed=3)
    written = load_file(tmp_path / "a.safetensors")
    drawn = dict(weights.tensors(family, seed=3))
    assert written.keys() == drawn.keys()
    assert all(torch.equal(written[name], drawn[name]) for name in drawn)
    assert all(tensor.float().std() > 0 for tensor in drawn.values() if tensor.numel() > 1)
    other = weights.value("first_stage_model.quant_conv.weight", (8, 8, 1, 1), torch.float32, seed=4)
    assert not torch.equal(other, drawn["first_stage_model.quant_conv.weight"])


@pytest.mark.parametrize(
    ("kind", "error", "equal"),
    [
        ("unet", 5e-5, True),
        ("unet", 3e-4, False),
        ("picture", 1e-3, True),
        ("picture", 1e-2, False),
        ("unet", float("nan"), False),
    ],
)
def test_no_time_counts_where_results_differ(
    load: Load, tmp_path: Path, kind: str, error: float, equal: bool
) -> None:
    compare = load("compare")
    ours, reference = tmp_path / "ours.safetensors", tmp_path / "reference.safetensors"
    result = torch.linspace(-1, 1, 100)
    save_file({"result": result}, reference)
    save_file({"result": result + error}, ours)
    assert compare.difference(compare.Case(kind), ours, reference)["equal"] is equal
