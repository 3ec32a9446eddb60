"""The U-Net against recorded answers of latent diffusion's own code; see fixtures/make_ldm_unet.py."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfumato.nn.unet import UNet, UNetConfig

FIXTURES = Path(__file__).parent / "fixtures"
ENTRIES = json.loads((FIXTURES / "ldm_unet.json").read_text(encoding="utf-8"))
OUTPUTS = load_file(FIXTURES / "ldm_unet.safetensors")
RULES = runpy.run_path(str(FIXTURES / "make_ldm_unet.py"))


@pytest.mark.parametrize("index", range(len(ENTRIES)))
def test_keys_shapes_and_outputs(index: int) -> None:
    entry = ENTRIES[index]
    network = UNet(UNetConfig(**entry["config"])).eval()
    state = network.state_dict()
    lines = RULES["key_lines"](state)
    assert lines == entry.get("keys", lines)
    assert RULES["digest"](lines) == entry["keys_sha256"]
    network.load_state_dict({name: RULES["seeded_weight"](name, tuple(v.shape)) for name, v in state.items()})
    with torch.no_grad():
        output = network(**RULES["seeded_inputs"](entry["config"], entry["size"]))
    assert (output - OUTPUTS[str(index)]).abs().max().item() <= 1e-5


def test_fixture_covers_every_option() -> None:
    configs = [entry["config"] for entry in ENTRIES]
    wanted = {
        "dims": {1, 2, 3},
        "num_res_blocks": {1, 2},
        "conv_resample": {False, True},
        "num_classes": {None, 5},
        "use_scale_shift_norm": {False, True},
        "resblock_updown": {False, True},
        "use_spatial_transformer": {False, True},
        "transformer_depth": {1, 2},
        "context_dim": {None, 12, 24},
        "use_new_attention_order": {False, True},
        "legacy": {False, True},
        "num_heads_upsample": {-1, 4},
    }
    for name, values in wanted.items():
        assert {config[name] for config in configs} == values, name
    plain_orders = {c["use_new_attention_order"] for c in configs if not c["use_spatial_transformer"]}
    assert len(configs) >= 30 and plain_orders == {False, True}
