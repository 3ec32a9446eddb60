"""The text transformer against transformers' CLIPTextModel and CLIPTextModelWithProjection."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig as ReferenceConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sfumato.errors import InputError
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder

RULES = runpy.run_path(str(Path(__file__).parent / "fixtures" / "make_ldm_unet.py"))
END = 90
TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 20, "eos_token_id": END,
}  # fmt: skip


def config_of(options: dict[str, Any]) -> CLIPTextConfig:
    """The tiny config with some of its options changed."""
    settings: dict[str, Any] = {**TINY, **options}
    return CLIPTextConfig(**settings)


def encoder_of(options: dict[str, Any]) -> tuple[CLIPTextEncoder, dict[str, Tensor]]:
    """An encoder whose weights depend on their names alone, norms included, and its state."""
    encoder = CLIPTextEncoder(config_of(options)).eval()
    state = {name: RULES["seeded_weight"](name, tuple(v.shape)) for name, v in encoder.state_dict().items()}
    for name in state:
        if "embedding" in name:
            state[name] = state[name] * TINY["hidden_size"] ** 0.5
    encoder.load_state_dict(state)
    return encoder, state


def reference_of(options: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """transformers' model with the same weights; it stands alone or under `text_model`, by its version."""
    options = {**TINY, "bos_token_id": 1, "pad_token_id": 0, **options}
    settings = ReferenceConfig(**options)
    projected = options.get("projection_dim") is not None
    model: Any = (CLIPTextModelWithProjection if projected else CLIPTextModel)(settings)
    expected = model.state_dict()
    if "text_model.final_layer_norm.weight" not in expected:
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
    model.load_state_dict(state)
    return model.eval()


def rows(length: int) -> Tensor:
    """Tokens of four rows: the end in several places, twice, last of all, and larger ids around it."""
    tokens = torch.randint(0, END, (4, length), generator=torch.Generator().manual_seed(length))
    tokens[:, -1] = END
    tokens[0, length // 2] = END
    tokens[1, 0] = END + 6
    tokens[2, length // 3] = END
    tokens[2, length // 2] = END + 3
    return tokens


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 20),
        ({"num_attention_heads": 1, "intermediate_size": 40}, 7),
        ({"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 5, "layer_norm_eps": 1e-3}, 13),
        ({"projection_dim": 24}, 20),
        ({"projection_dim": 32, "num_hidden_layers": 1}, 3),
    ],
)
def test_equal_to_transformers(options: dict[str, Any], length: int, act: str) -> None:
    options = options | {"hidden_act": act}
    encoder, state = encoder_of(options)
    reference = reference_of(options, state)
    tokens = rows(length)
    with torch.no_grad():
        ours = encoder(tokens)
        theirs = reference(tokens, output_hidden_states=True)
    assert len(ours.hidden_states) == encoder.config.num_hidden_layers + 1
    for state_, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(state_, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=0, atol=1e-5)
    pooled = theirs.text_embeds if "projection_dim" in options else theirs.pooler_output
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-5)
    assert 0.3 < ours.last_hidden_state.std() < 3


def test_names_are_those_of_stable_diffusion() -> None:
    names = set(CLIPTextEncoder(config_of({})).state_dict())
    assert {name for name in names if ".layers." not in name} == {
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.final_layer_norm.weight",
        "text_model.final_layer_norm.bias",
    }
    layer = "text_model.encoder.layers.2."
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    parts += ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")
    expected = {f"{layer}{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert {name for name in names if name.startswith(layer)} == expected
    projected = CLIPTextEncoder(config_of({"projection_dim": 8})).state_dict()
    assert set(projected) - names == {"text_projection.weight"}


def test_vit_l_14_has_123060480_parameters() -> None:
    with torch.device("meta"):
        encoder = CLIPTextEncoder(CLIPTextConfig())
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 123_060_480


def test_hidden_states_by_index() -> None:
    encoder, _ = encoder_of({})
    with torch.no_grad():
        output = encoder(rows(9))
        assert torch.equal(encoder.hidden_state(output, -2, normed=False), output.hidden_states[2])
        assert torch.equal(encoder.hidden_state(output, 2, normed=False), output.hidden_states[2])
        assert torch.equal(encoder.hidden_state(output, -1, normed=True), output.last_hidden_state)
        normed = encoder.hidden_state(output, -2, normed=True)
    expected = torch.nn.functional.layer_norm(
        output.hidden_states[2],
        (32,),
        encoder.text_model.final_layer_norm.weight,
        encoder.text_model.final_layer_norm.bias,
    )
    torch.testing.assert_close(normed, expected)
    for index in (4, -5):
        with pytest.raises(InputError, match="allowed are -4 to 3"):
            encoder.hidden_state(output, index, normed=True)


def test_pooled_at_the_first_end_and_not_at_the_largest_id() -> None:
    encoder, _ = encoder_of({})
    tokens = torch.tensor([[1, 96, 5, END, 3, END], [END, 96, 95, 94, 93, 92], [1, 2, 3, 4, 5, 6]])
    assert encoder.pooled_at(tokens).tolist() == [3, 0, 5]
    output = encoder(tokens)
    assert torch.equal(output.pooled, output.last_hidden_state[torch.arange(3), torch.tensor([3, 0, 5])])


def test_later_tokens_and_other_rows_change_nothing() -> None:
    encoder, _ = encoder_of({})
    tokens = rows(12)
    changed = tokens.clone()
    changed[:, 6:] = 7
    with torch.no_grad():
        before, after = encoder(tokens).last_hidden_state, encoder(changed).last_hidden_state
        alone = encoder(tokens[1:2, :6]).last_hidden_state
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    torch.testing.assert_close(before[1:2, :6], alone, rtol=0, atol=1e-6)
    assert (before[:, 6:] - after[:, 6:]).abs().amax() > 0.1


def test_trains_under_bfloat16() -> None:
    encoder, _ = encoder_of({"projection_dim": 8})
    tokens = rows(20)
    exact = encoder(tokens).last_hidden_state.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = encoder(tokens)
    assert (output.last_hidden_state - exact).norm() < 0.05 * exact.norm()
    (output.last_hidden_state.square().mean() + output.pooled.float().square().mean()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_start_weights_keep_the_states_at_scale() -> None:
    torch.manual_seed(0)
    encoder = CLIPTextEncoder(config_of({"hidden_size": 64, "num_hidden_layers": 12}))
    embedding = encoder.text_model.embeddings.token_embedding.weight
    assert 0.018 < embedding.std() < 0.022
    output = encoder(rows(20))
    assert all(state.std() < 1 for state in output.hidden_states)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_act": "quickgelu"}, "quick_gelu"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"eos_token_id": 97}, "vocabulary"),
    ],
)
def test_unfit_configs_say_why(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        config_of(options)


def test_too_many_tokens_say_how_many_are_allowed() -> None:
    encoder, _ = encoder_of({})
    with pytest.raises(InputError, match="21 tokens; the text encoder takes at most 20"):
        encoder(torch.zeros(1, 21, dtype=torch.long))
