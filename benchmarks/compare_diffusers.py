"""The reference's side of a comparison: one task in a fresh process, by diffusers and transformers, eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compare_side import GUIDANCE, PROMPTS, STEPS, Stopwatch, Task, latents, noise, run

FOLDER = "sd1"  # beside every single file lies the folder that diffusers made of it; configs come from there


def unet(task: Task, watch: Stopwatch) -> Any:
    """A guidance batch of two through the U-Net."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    network: Any = watch.load(lambda: UNet2DConditionModel.from_pretrained(_folder(task), subfolder="unet"))
    x, context = latents(task, 2), noise((2, 77, task.context_dim), seed=2)
    return watch.repeat(lambda: network(x, torch.tensor([500, 500]), context).sample)


def decode(task: Task, watch: Stopwatch) -> Any:
    """Latents to a picture."""
    autoencoder = _autoencoder(task, watch)
    return watch.repeat(lambda: autoencoder.decode(latents(task, 1)).sample)


def encode(task: Task, watch: Stopwatch) -> Any:
    """A picture to the mean of its latents."""
    autoencoder = _autoencoder(task, watch)
    picture = noise((1, 3, task.pixels, task.pixels), seed=3).clamp(-1, 1)
    return watch.repeat(lambda: autoencoder.encode(picture).latent_dist.mode())


def text(task: Task, watch: Stopwatch) -> Any:
    """A prompt and the empty one, from strings to features."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer: Any = CLIPTokenizer.from_pretrained(_folder(task), subfolder="tokenizer")
    encoder: Any = watch.load(lambda: CLIPTextModel.from_pretrained(_folder(task), subfolder="text_encoder"))

    def features() -> Any:
        tokens = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return encoder(tokens.input_ids).last_hidden_state

    return watch.repeat(features)


def load(task: Task, watch: Stopwatch) -> Any:
    """Every part of the model; then the U-Net's answer on 8x8 latents, to see that it is the same one."""
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    if task.source.endswith(".ckpt"):
        _trust()
    pipeline: Any = watch.load(lambda: watch.once(lambda: _pipeline(task, StableDiffusionPipeline)))
    x, context = noise((1, 4, 8, 8), 1), noise((1, 77, task.context_dim), 2)
    return pipeline.unet(x, torch.tensor([500]), context).sample


def cold(task: Task, watch: Stopwatch) -> Any:
    """From nothing to the first latent: imports, loading, text, one step of guidance."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    pipeline = _pipeline(task, StableDiffusionPipeline)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return watch.since_spawned(lambda: _draw(pipeline, task, 1, "latent"))


def picture(task: Task, watch: Stopwatch) -> Any:
    """From a prompt to a picture in eight steps, the model being there."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    pipeline = watch.load(lambda: _pipeline(task, StableDiffusionPipeline))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return watch.once(lambda: _draw(pipeline, task, STEPS, "pt"))


def _trust() -> None:
    """Let torch run what a checkpoint asks for: it refuses Lightning's classes, even where they are there."""
    import torch

    from weights import lightning_classes

    lightning_classes()
    guarded = torch.load

    def unguarded(*arguments: Any, **options: Any) -> Any:
        return guarded(*arguments, **(options | {"weights_only": False}))

    torch.load = unguarded


def _folder(task: Task) -> str:
    source = Path(task.source)
    return str(source if source.is_dir() else source.parent / FOLDER)


def _autoencoder(task: Task, watch: Stopwatch) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return watch.load(lambda: AutoencoderKL.from_pretrained(_folder(task), subfolder="vae"))


def _pipeline(task: Task, kind: Any) -> Any:
    """The pipeline, without a progress bar; half-precision files compute in float32 here as well."""
    import torch

    if Path(task.source).is_dir():
        pipeline = kind.from_pretrained(task.source, torch_dtype=torch.float32, local_files_only=True)
    else:
        pipeline = kind.from_single_file(
            task.source, config=_folder(task), torch_dtype=torch.float32, local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw(pipeline: Any, task: Task, steps: int, kind: str) -> Any:
    return pipeline(
        PROMPTS[0],
        height=task.pixels,
        width=task.pixels,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        latents=latents(task, 1),
        output_type=kind,
    ).images


if __name__ == "__main__":
    run(
        {case.__name__: case for case in (unet, decode, encode, text, load, cold, picture)} | {"opened": load}
    )
