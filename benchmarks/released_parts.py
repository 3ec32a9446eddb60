"""One part of one released model on one side, in a process of its own: its answers go to a file.

Run by `soak/released.py`: python released_parts.py SIDE PART FAMILY SOURCE OUTPUT [--tiny]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from compare_side import noise
from releases import FAMILIES, Family, tiny

LATENT = 32  # side; a quarter of the released size in area, and every level of every network is used
SIZE = (512, 768)  # (height, width) in pixels, which SDXL is told
TEXTS = [  # without "!", which transformers takes for padding where OpenCLIP's padding is that token
    "a red apple",
    "",
    "An oil painting of a fox in a snowy forest, 35mm, (detailed), by no-one's hand; café, naïve: 東京 2024",
    "a very long description of a harbour at dawn with many small boats, " * 12,
]
Answers = dict[str, Tensor]


def ours_unet(family: Family, source: Path) -> Answers:
    """Two noised latents with the conditions that the family takes."""
    from sfumato.text.encode import Sizes

    model = _model(family, source)
    x, timesteps, context, pooled = unet_inputs(family)
    vector = None if pooled is None else torch.cat([pooled, Sizes(SIZE).vector().expand(2, -1)], dim=1)
    return {"raw": model.unet(x, timesteps, context, vector)}


def reference_unet(family: Family, source: Path) -> Answers:
    """The same by diffusers."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    network: Any = UNet2DConditionModel.from_pretrained(
        str(source), subfolder="unet", torch_dtype=torch.float32
    )
    x, timesteps, context, pooled = unet_inputs(family)
    sizes = torch.tensor([[*SIZE, 0, 0, *SIZE]] * 2)
    added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
    return {"raw": network(x, timesteps, context, added_cond_kwargs=added).sample}


def unet_inputs(family: Family) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Latents, timesteps, context, and for SDXL the pooled vector."""
    unet = family.unet
    assert unet.context_dim is not None
    pooled = None if unet.adm_in_channels is None else noise((2, unet.adm_in_channels - 6 * 256), 3)
    context = noise((2, 77, unet.context_dim), 2)
    return noise((2, unet.in_channels, LATENT, LATENT), 1), torch.tensor([17, 801]), context, pooled


def ours_vae(family: Family, source: Path) -> Answers:
    """A picture to mean and log-variance of its latents, and latents to a picture."""
    autoencoder: Any = _model(family, source).autoencoder
    posterior = autoencoder.encode(_picture())
    return {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "decoded": autoencoder.decode(noise((1, 4, LATENT, LATENT), 5)),
    }


def reference_vae(family: Family, source: Path) -> Answers:
    """The same by diffusers."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    autoencoder: Any = AutoencoderKL.from_pretrained(str(source), subfolder="vae", torch_dtype=torch.float32)
    posterior = autoencoder.encode(_picture()).latent_dist
    return {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "decoded": autoencoder.decode(noise((1, 4, LATENT, LATENT), 5)).sample,
    }


def ours_text(family: Family, source: Path) -> Answers:
    """What the U-Net is told of `TEXTS`, from strings on: the last layer, and the one before it."""
    model = _model(family, source)
    found: Answers = {}
    for skip in (1, 2):
        condition = model.encode_prompt(TEXTS, clip_skip=skip, **({"size": SIZE} if family.xl else {}))
        found[f"layer_{skip}"] = condition.context
        if condition.vector is not None:
            found[f"pooled_{skip}"] = condition.vector[:, : -6 * 256]
    return found


def reference_text(family: Family, source: Path) -> Answers:
    """The same by transformers: SDXL takes layers as they are and joins two towers, others norm them."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def states(number: str, kind: Any) -> tuple[Any, Any]:
        tokenizer: Any = CLIPTokenizer.from_pretrained(str(source / f"tokenizer{number}"))
        encoder = kind.from_pretrained(str(source / f"text_encoder{number}"), dtype=torch.float32)
        tokens = tokenizer(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return encoder, encoder(tokens.input_ids, output_hidden_states=True)

    encoder, output = states("", CLIPTextModel)
    if not family.xl:
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return {"layer_1": output.last_hidden_state, "layer_2": norm(output.hidden_states[-2])}
    _, second = states("_2", CLIPTextModelWithProjection)
    found: Answers = {}
    for skip in (1, 2):
        parts = [output.hidden_states[-skip], second.hidden_states[-skip]]
        found |= {f"layer_{skip}": torch.cat(parts, dim=-1), f"pooled_{skip}": second.text_embeds}
    return found


def _model(family: Family, source: Path) -> Any:
    """The model; single files are told the prediction, which a folder has to tell of itself."""
    import sfumato

    wanted = "v" if family.prediction == "v_prediction" else "eps"
    model = sfumato.load(source, device="cpu", prediction=None if source.is_dir() else wanted)
    assert (model.prediction, model.latent_scale) == (wanted, family.latent_scale)
    return model


def _picture() -> Tensor:
    return noise((1, 3, 8 * LATENT, 8 * LATENT), 4).clamp(-1, 1)


PARTS = {
    ("ours", "unet"): ours_unet,
    ("ours", "vae"): ours_vae,
    ("ours", "text"): ours_text,
    ("reference", "unet"): reference_unet,
    ("reference", "vae"): reference_vae,
    ("reference", "text"): reference_text,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "reference"])
    parser.add_argument("part", choices=["unet", "vae", "text"])
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    family = cast(Family, FAMILIES[options.family])
    family = tiny(family) if options.tiny else family
    with torch.inference_mode():
        answers = PARTS[options.side, options.part](family, options.source)
    save_file({name: answer.clone() for name, answer in answers.items()}, options.output)


if __name__ == "__main__":
    main()
