"""The text transformer of LDM's 1.45 B model against diffusers' LDMBertModel."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import Tensor

from sfumato.errors import InputError
from sfumato.nn.bert import BERTConfig, BERTEmbedder

RULES = runpy.run_path(str(Path(__file__).parent / "fixtures" / "make_ldm_unet.py"))
TINY = BERTConfig(n_embed=24, n_layer=3, vocab_size=60, max_seq_len=12, heads=2, dim_head=8)


def embedder_of(config: BERTConfig) -> tuple[BERTEmbedder, dict[str, Tensor]]:
    """An embedder whose weights depend on their names alone, and its state."""
    embedder = BERTEmbedder(config).eval()
    state = {name: RULES["seeded_weight"](name, tuple(v.shape)) for name, v in embedder.state_dict().items()}
    for name in ("transformer.token_emb.weight", "transformer.pos_emb.emb.weight"):
        state[name] = state[name] * config.n_embed**0.5
    embedder.load_state_dict(state)
    return embedder, state


def reference(config: BERTConfig, state: dict[str, Tensor]) -> Any:
    """diffusers' model with the same weights, given to its modules one by one."""
    model: Any = LDMBertModel(
        LDMBertConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len,
            encoder_layers=config.n_layer,
            encoder_ffn_dim=4 * config.n_embed,
            encoder_attention_heads=config.heads,
            head_dim=config.dim_head,
            d_model=config.n_embed,
        )
    )
    left = {name.removeprefix("transformer."): value for name, value in state.items()}

    def fill(module: Any, name: str) -> None:
        for kind, _ in list(module.named_parameters(recurse=False)):
            getattr(module, kind).data = left.pop(f"{name}.{kind}")

    fill(model.model.embed_tokens, "token_emb")
    fill(model.model.embed_positions, "pos_emb.emb")
    fill(model.model.layer_norm, "norm")
    for i, layer in enumerate(model.model.layers):
        first, second = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        fill(layer.self_attn_layer_norm, f"{first}.0")
        for theirs, ours in (
            ("q_proj", "to_q"),
            ("k_proj", "to_k"),
            ("v_proj", "to_v"),
            ("out_proj", "to_out"),
        ):
            fill(getattr(layer.self_attn, theirs), f"{first}.1.{ours}")
        fill(layer.final_layer_norm, f"{second}.0")
        fill(layer.fc1, f"{second}.1.net.0.0")
        fill(layer.fc2, f"{second}.1.net.2")
    assert not left
    return model.eval()


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (TINY, 12),
        (TINY, 5),
        (BERTConfig(n_embed=16, n_layer=1, vocab_size=30, max_seq_len=77, heads=8, dim_head=4), 77),
    ],
)
def test_equal_to_diffusers(config: BERTConfig, length: int) -> None:
    embedder, state = embedder_of(config)
    tokens = torch.randint(config.vocab_size, (3, length), generator=torch.Generator().manual_seed(length))
    tokens[:, -2:] = 0  # paddings are attended to like any other token
    with torch.no_grad():
        context = embedder(tokens)
        expected = reference(config, state)(tokens)[0]
    assert context.shape == (3, length, config.n_embed) and 0.3 < context.std() < 3
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-5)


def test_names_are_those_of_the_released_model() -> None:
    names = set(BERTEmbedder(TINY).state_dict())
    first, second = "transformer.attn_layers.layers.0.", "transformer.attn_layers.layers.1."
    both = ("weight", "bias")
    assert {name for name in names if name.startswith((first, second))} == {
        *(f"{first}{part}.{kind}" for part in ("0", "1.to_out") for kind in both),
        *(f"{first}1.to_{part}.weight" for part in "qkv"),
        *(f"{second}{part}.{kind}" for part in ("0", "1.net.0.0", "1.net.2") for kind in both),
    }
    assert {name for name in names if ".layers." not in name} == {
        "transformer.token_emb.weight",
        "transformer.pos_emb.emb.weight",
        "transformer.norm.weight",
        "transformer.norm.bias",
    }


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(InputError, match="13 tokens; this text encoder takes 12"):
        embedder_of(TINY)[0](torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(InputError, match="n_layer is 0"):
        BERTConfig(n_layer=0)
