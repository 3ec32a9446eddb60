"""Keys of LoRA files as people have them, and the layers of released models that they mean."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


from sfumato.checkpoints.addons.names import find_layer, names_of
from sfumato.families import FAMILIES


@pytest.mark.parametrize("family", ["sd1", "sd2-base", "sdxl"])
def test_every_layer_of_a_released_model_has_one_name_with_underscores(family: str) -> None:
    config = FAMILIES[family]
    for part in ("unet", "text", "text2"):
        if (own := getattr(config, part)) is not None:
            names = names_of(part, own)
            real = {target.name for layer in names.dotted.values() for target in layer.values()}
            assert len(real) > 100
            spelled: dict[str, set[str]] = {}
            for layer in names.underscored.values():
                for target in layer.values():
                    spelled.setdefault(target.layout + target.name, set()).add(target.layout)
            for name, layer in names.dotted.items():
                other = names.underscored.get(name.replace(".", "_"))
                assert other is None or other is layer, f"two layers are called {name}"


KEYS: Mapping[str, Mapping[str, str]] = {  # of files that people have -> our tensor
    "sd1": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q":
            "unet input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q":
            "unet input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "lora_unet_mid_block_attentions_0_proj_in": "unet middle_block.1.proj_in",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj":
            "unet output_blocks.11.1.transformer_blocks.0.ff.net.0.proj",
        "lora_unet_down_blocks_0_downsamplers_0_conv": "unet input_blocks.3.0.op",
        "lora_unet_up_blocks_0_upsamplers_0_conv": "unet output_blocks.2.1.conv",
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut": "unet input_blocks.4.0.skip_connection",
        "lora_unet_down_blocks_1_resnets_0_time_emb_proj": "unet input_blocks.4.0.emb_layers.1",
        "lora_unet_conv_in": "unet input_blocks.0.0",
        "lora_unet_time_embedding_linear_1": "unet time_embed.0",
        "lora_te_text_model_encoder_layers_11_mlp_fc1": "text text_model.encoder.layers.11.mlp.fc1",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora":
            "unet middle_block.1.transformer_blocks.0.attn2.to_out.0",
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora":
            "unet middle_block.1.transformer_blocks.0.attn2.to_k",
        "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora":
            "text text_model.encoder.layers.3.self_attn.out_proj",
        "base_model.model.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v":
            "unet output_blocks.3.1.transformer_blocks.0.attn1.to_v",
        "base_model.model.text_model.encoder.layers.3.self_attn.v_proj":
            "text text_model.encoder.layers.3.self_attn.v_proj",
        "lycoris_conv_out": "unet out.2",
        "unet.base_model.model.conv_out": "unet out.2",
        "lora_unet.mid_block.resnets.1.conv2": "unet middle_block.2.out_layers.3",
        "diffusion_model.middle_block.2.out_layers.3": "unet middle_block.2.out_layers.3",
    },
    "sd2-base": {
        "lora_te_text_model_encoder_layers_22_self_attn_k_proj":
            "text text_model.encoder.layers.22.self_attn.k_proj",
        "lora_te_text_model_encoder_layers_23_self_attn_k_proj": "unused last layer",
        "text_encoder.text_model.encoder.layers.23.mlp.fc2": "unused last layer",
        "lora_te_transformer_resblocks_5_mlp_c_fc": "text text_model.encoder.layers.5.mlp.fc1",
        "lora_unet_mid_block_attentions_0_proj_in": "unet middle_block.1.proj_in",
    },
    "sdxl": {
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k":
            "unet input_blocks.8.1.transformer_blocks.9.attn2.to_k",
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_k":
            "unet input_blocks.8.1.transformer_blocks.9.attn2.to_k",
        "lora_unet_label_emb_0_0": "unet label_emb.0.0",
        "lora_unet_add_embedding_linear_1": "unet label_emb.0.0",
        "lora_unet_output_blocks_2_2_conv": "unet output_blocks.2.2.conv",
        "lora_te1_text_model_encoder_layers_11_mlp_fc2": "text text_model.encoder.layers.11.mlp.fc2",
        "lora_te2_text_model_encoder_layers_31_mlp_fc2": "text2 text_model.encoder.layers.31.mlp.fc2",
        "lora_te2_text_projection": "text2 text_projection",
        "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj":
            "text2 text_model.encoder.layers.31.self_attn.out_proj",
        "clip_g.text_model.encoder.layers.0.mlp.fc1": "text2 text_model.encoder.layers.0.mlp.fc1",
    },
}  # fmt: skip


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, keys in KEYS.items() for key in keys])
def test_keys_of_released_loras_find_their_layers(family: str, key: str) -> None:
    found = find_layer(key, FAMILIES[family])
    assert found is not None, key
    expected = KEYS[family][key]
    if isinstance(found, str):
        assert found == expected
    else:
        target = found["weight"]
        (pair,) = target.pairs
        assert f"{target.part} {pair.native}" == expected + ".weight"


@pytest.mark.parametrize("key", ["", "lora_unet_", "lora_te2_text_projection", "unet", "lora_unet_attn1_to_q",
                                 "base_model.model.", "lora_unet_down_blocks_9_resnets_0_conv1"])  # fmt: skip
def test_keys_of_nothing_find_nothing(key: str) -> None:
    assert find_layer(key, FAMILIES["sd1"]) is None
