"""The reference's side of the training comparison: the loop of diffusers' train_text_to_image, small.

Its steps, in its order: decode, resize and normalise; encode by the autoencoder; noise; encode the text; the
U-Net, mean squared error, clipped gradients, AdamW, constant learning rate, exponential moving average.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import CLIPTextConfig, CLIPTextModel

from training_side import (
    BATCH,
    CHANNELS,
    CLIP_NORM,
    EMA_DECAY,
    GROUPS,
    HEAD_WIDTH,
    LEARNING_RATE,
    PIXELS,
    TEXT_HEADS,
    TEXT_INNER,
    TEXT_LAYERS,
    TEXT_WIDTH,
    TOKENS,
    VOCABULARY,
    WIDTHS,
    Watch,
    options,
    tell,
)

SCALE = 0.18215


class Captioned(Dataset[tuple[Tensor, Tensor]]):
    """Pictures of a folder with tokens; captions are tokenised before training, as the script does."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.png"))
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(VOCABULARY - 2, (len(self.paths), TOKENS), generator=generator)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.paths[index], formats=["PNG"]) as opened:
            picture = opened.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        return pixels, self.tokens[index]


def networks() -> tuple[Any, Any, Any]:
    """U-Net, autoencoder and text encoder of the recipe's sizes."""
    unet_options: dict[str, Any] = {
        "block_out_channels": WIDTHS,
        "attention_head_dim": tuple(width // HEAD_WIDTH for width in WIDTHS),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        norm_num_groups=GROUPS,
        **unet_options,
    )
    first_options: dict[str, Any] = {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    autoencoder = AutoencoderKL(
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        **first_options,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=TEXT_WIDTH, intermediate_size=TEXT_INNER,
            num_hidden_layers=TEXT_LAYERS, num_attention_heads=TEXT_HEADS, max_position_embeddings=TOKENS,
            bos_token_id=0, eos_token_id=VOCABULARY - 1, pad_token_id=VOCABULARY - 1,
        )
    )  # fmt: skip
    return unet, autoencoder.requires_grad_(False).eval(), text.requires_grad_(False).eval()


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    dataset = Captioned(given.work / "pictures")
    unet, autoencoder, text = networks()
    scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    loader: Any = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)

    def encoded(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return autoencoder.encode(pixels).latent_dist.sample() * SCALE

    kept = given.work / "reference-latents.safetensors"
    if given.encode:
        rows = [encoded(dataset[index][0][None]) for index in range(len(dataset))]
        save_file({"latents": torch.cat(rows)}, kept)
        return
    if given.cached:
        latents = load_file(kept)["latents"]
        loader = DataLoader(TensorDataset(latents, dataset.tokens), BATCH, shuffle=True, drop_last=True)
    watch, last, step = Watch(), 0.0, 0
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    rate = get_scheduler("constant", optimizer=optimizer)
    average = EMAModel(unet.parameters(), decay=EMA_DECAY)
    while step < given.steps:
        for sample, tokens in loader:
            latents = sample if given.cached else encoded(sample)
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),)).long()
            noisy = scheduler.add_noise(latents, noise, t)
            with torch.no_grad():
                context = text(tokens, return_dict=False)[0]
            answer = unet(noisy, t, context, return_dict=False)[0]
            loss = F.mse_loss(answer.float(), noise.float(), reduction="mean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), CLIP_NORM)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            average.step(unet.parameters())
            last, step = loss.item(), step + 1
            watch.step()
            if step == given.steps:
                break
    tell(watch, sum(p.numel() for p in unet.parameters()), last)


if __name__ == "__main__":
    main()
