"""Super-resolution files told by names and shapes: ESRGAN old and new, compact; others refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.checkpoints.upscaler import load_upscaler
from sfumato.errors import CheckpointError
from sfumato.nn.esrgan import CompactConfig, CompactNet, RRDBConfig, RRDBNet

State = dict[str, Tensor]
OUTER = ("conv_hr", "conv_last")


def old_names(state: State, blocks: int, ups: int) -> State:
    """ESRGAN's first code: a sequence of numbered layers, rectifiers and resizings counted."""
    places = {"conv_first": 0, "conv_hr": 2 + 3 * ups, "conv_last": 4 + 3 * ups}
    places |= {f"conv_up{up + 1}": 3 + 3 * up for up in range(ups)}
    found = {}
    for name, tensor in state.items():
        if name.startswith("body."):
            _, block, dense, conv, kind = name.split(".")
            found[f"model.1.sub.{block}.{dense.upper()}.{conv}.0.{kind}"] = tensor
        elif name.startswith("conv_body."):
            found[f"model.1.sub.{blocks}.{name.split('.')[1]}"] = tensor
        else:
            stem, kind = name.split(".")
            found[f"model.{places[stem]}.{kind}"] = tensor
    return found


def second_names(state: State, blocks: int, ups: int) -> State:
    """ESRGAN's second code."""
    found = {}
    for name, tensor in state.items():
        new = name.replace("body.", "RRDB_trunk.", 1) if name.startswith("body.") else name
        new = re.sub(r"\.rdb(\d)", r".RDB\1", new)
        for ours, theirs in (("conv_body", "trunk_conv"), ("conv_hr", "HRconv"), ("conv_up", "upconv")):
            new = new.replace(ours, theirs)
        found[new] = tensor
    return found


def as_is(state: State, blocks: int, ups: int) -> State:
    return state


RRDB = {
    "x4": RRDBConfig(num_features=8, num_blocks=2, num_growth=4),
    "x2 of pixels unshuffled": RRDBConfig(num_features=8, num_blocks=2, num_growth=4, unshuffle=2),
    "x1 of pixels unshuffled": RRDBConfig(num_features=8, num_blocks=1, num_growth=4, unshuffle=4),
    "x2 of one doubling": RRDBConfig(num_features=8, num_blocks=3, num_growth=4, num_upsamplings=1),
    "x1": RRDBConfig(num_features=8, num_blocks=1, num_growth=4, num_upsamplings=0),
    "x8": RRDBConfig(num_features=8, num_blocks=1, num_growth=4, num_upsamplings=3),
    "grey": RRDBConfig(1, 1, num_features=8, num_blocks=1, num_growth=4),
}


@pytest.mark.parametrize("naming", [old_names, second_names, as_is])
@pytest.mark.parametrize("name", RRDB)
def test_every_esrgan_is_told_and_loaded(
    tmp_path: Path, name: str, naming: Callable[[State, int, int], State]
) -> None:
    config = RRDB[name]
    network = RRDBNet(config)
    save_file(
        naming(network.state_dict(), config.num_blocks, config.num_upsamplings),
        path := tmp_path / "a.safetensors",
    )
    loaded = load_upscaler(path)
    assert loaded.network.config == config
    assert (loaded.scale, loaded.multiple, loaded.channels) == (
        config.scale, config.unshuffle, config.out_channels,
    )  # fmt: skip
    x = torch.rand(1, config.in_channels, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.network(x), network(x))
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("nesting", ["params", "params_ema", None])
def test_compact_files_of_torch_in_any_nesting(tmp_path: Path, scale: int, nesting: str | None) -> None:
    network = CompactNet(CompactConfig(num_features=8, num_convs=2, scale=scale))
    state: Any = network.state_dict()
    torch.save(state if nesting is None else {nesting: state}, tmp_path / "compact.pth")
    loaded = load_upscaler(tmp_path / "compact.pth")
    assert loaded.network.config == network.config and loaded.kind == "compact, 2 layers"


def test_averaged_weights_go_first_and_wrappers_are_taken_off(tmp_path: Path) -> None:
    networks = [RRDBNet(RRDB["x4"]) for _ in range(2)]
    state = {
        key: {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
        for key, network in zip(("params", "params_ema"), networks, strict=True)
    }
    torch.save(state, tmp_path / "both.pth")
    loaded = load_upscaler(tmp_path / "both.pth", dtype=torch.float64)
    last = loaded.network.state_dict()["conv_last.weight"]
    assert last.dtype == torch.float64
    assert torch.equal(last.float(), networks[1].conv_last.weight)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    network = CompactNet(CompactConfig(num_features=8, num_convs=1)).half()
    save_file(network.state_dict(), tmp_path / "half.safetensors")
    loaded = load_upscaler(tmp_path / "half.safetensors").network
    assert loaded.state_dict()["body.0.weight"].dtype == torch.float32


def damaged(change: Callable[[State], object]) -> State:
    state = dict(RRDBNet(RRDB["x4"]).state_dict())
    change(state)
    return state


DAMAGED: dict[str, tuple[Callable[[State], object], str]] = {
    "one tensor is missing": (lambda s: s.pop("body.0.rdb2.conv3.bias"), "missing|names 2 blocks"),
    "a stranger's tensor": (lambda s: s.update({"body.0.attention.weight": torch.zeros(1)}), "unexpected"),
    "a block's number is beyond": (
        lambda s: s.update({"body.9999.rdb1.conv1.bias": torch.zeros(4)}), "not numbered",
    ),
    "another shape": (lambda s: s.update({"conv_hr.weight": torch.zeros(8, 8, 5, 5)}), "shape"),
    "no values at all": (lambda s: s.update({"conv_first.weight": torch.zeros(())}), "no upscaler"),
    "channels that do not fit": (
        lambda s: s.update({"conv_last.weight": torch.zeros(2, 8, 3, 3)}), "takes 3",
    ),
    "not finite": (lambda s: s["conv_hr.bias"].fill_(float("nan")), "not finite"),
    "another network": (lambda s: [s.pop(name) for name in list(s) if "first" in name], "holds no upscaler"),
    "a width beyond all memory": (
        lambda s: s.update({"conv_first.weight": torch.zeros(2**40, 3, 0, 0)}), "cannot be built|shape",
    ),
    "no channels": (lambda s: s.update({"conv_last.weight": torch.zeros(0, 8, 3, 3)}), "no upscaler"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, message = DAMAGED[name]
    save_file({key: value.clone() for key, value in damaged(change).items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_upscaler(tmp_path / "a.safetensors")


def test_blocks_beyond_the_file_are_refused_before_they_are_built(tmp_path: Path) -> None:
    state = damaged(lambda s: s.update({f"body.{i}.x": torch.zeros(1) for i in range(2, 5000)}))
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="names 5000 blocks"):
        load_upscaler(tmp_path / "a.safetensors")
