"""Training the denoiser: predict the noise (or v, or x0) of a noised latent (Ho et al. 2020, algorithm 1).

The text transformer, where the recipe has one, is trained along with the U-Net.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.checkpoints.load import ModelFile, copy_into, load_file
from sfumato.checkpoints.save import save_file
from sfumato.diffusion.prediction import paired
from sfumato.errors import InputError
from sfumato.generation import complete, draw
from sfumato.model import StableDiffusion
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.presets import ModelConfig
from sfumato.request import Request
from sfumato.runtime import channels_last, training_attention
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.config import TrainingConfig
from sfumato.training.data import WHOLE, Dataset, Position, Share, groups
from sfumato.training.latents import Batch, CachedLatents, Pixels, Progress, Source
from sfumato.training.loop import Loss
from sfumato.training.sheets import save_sheet

EVALUATED = 512  # held-out samples that a score is the mean of
BINS = 4  # ranges of timesteps scored apart
SHOWN = 32  # pictures on a sheet where the recipe has no prompts


class DiffusionTask:
    """U-Net and text transformer on captioned pictures, in a finished autoencoder's latents or in pixels.

    progress: is told (encoded, of) while the pictures are encoded. Raises `InputError` for a recipe whose
    parts do not fit together.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dataset: Dataset,
        held_out: Dataset,
        device: torch.device,
        progress: Progress = lambda done, of: None,
    ) -> None:
        self.config, self.device = config, device
        self.dataset, self.held_out = dataset, held_out
        unet_config = _checked(config)
        path = config.diffusion.start_from
        start = None if path is None else load_file(path, torch.float32)
        self.tokenizer = self._tokenizer(start)
        self.text = self._text_encoder()
        self.unet = UNet(unet_config)
        self.modules: dict[str, nn.Module] = {"unet": self.unet}
        if self.text is not None:
            self.modules["text"] = self.text
        for module in self.modules.values():
            module.to(device)
        if config.loop.channels_last:
            channels_last(self.unet)
        self.unet.gradient_checkpointing = config.loop.gradient_checkpointing
        self.forward = torch.compile(self.unet) if config.loop.compile else self.unet
        if start is not None:
            for part, module in self.modules.items():
                copy_into(module, start.module(part).state_dict(), f"{path} does not fit [{part}]")

        # First stage: frozen. Its latents are made last, for that takes minutes.
        path = config.diffusion.autoencoder
        first_stage = None if path is None else load_file(path, torch.float32)
        self.digest = dataset.digest + (first_stage.identity if first_stage else "")
        self.model = self._model(first_stage)
        self.schedule = self.model.schedule
        self.prediction = paired(config.diffusion.prediction, self.schedule)
        self.source, self.held_out_source = self._sources(first_stage, progress)

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"denoiser": [p for module in self.modules.values() for p in module.parameters()]}

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Batch, None, None]:
        return self.source.batches(groups(self.dataset, self.config.seed, seen, size, share))

    def losses(self, batch: Batch, seen: int) -> Iterator[Loss]:
        order, clean = batch
        noise, times, captions = [], [], []
        for place in order:
            generator = place.generator("diffusion")
            noise.append(torch.randn(clean.shape[1:], generator=generator))
            times.append(torch.randint(self.schedule.num_timesteps, (), generator=generator))
            choices = self.dataset.captions(place.index) or [""]
            dropped = float(torch.rand((), generator=generator)) < self.config.diffusion.caption_dropout
            captions.append(
                "" if dropped else choices[int(torch.randint(len(choices), (), generator=generator))]
            )
        with training_attention(self.device):  # in the backward pass too, which may run the network again
            loss = self._errors(clean, torch.stack(noise), torch.stack(times), captions).mean()
            yield "denoiser", loss, {"loss": loss}

    def evaluate(self) -> dict[str, float]:
        """Held-out mean squared error, over all timesteps and in ranges of them, with fixed noise."""
        count = min(EVALUATED, len(self.held_out))
        stride = len(self.held_out) // count
        errors, times = [], []
        for start in range(0, count, 64):
            indices = [index * stride for index in range(start, min(start + 64, count))]
            t = torch.tensor([index * 997 % self.schedule.num_timesteps for index in indices])
            clean = self.held_out_source.fixed(indices)
            noise = torch.stack(
                [
                    torch.randn(
                        clean.shape[1:], generator=Position(self.config.seed, -1, i).generator("held out")
                    )
                    for i in indices
                ]
            )
            captions = [(self.held_out.captions(index) or [""])[0] for index in indices]
            errors.append(self._errors(clean, noise, t, captions))
            times.append(t)
        error, time = torch.cat(errors).cpu(), torch.cat(times) * BINS // self.schedule.num_timesteps
        by_time = {
            f"held_out_loss_{part}": float(error[time == part].mean()) for part in time.unique().tolist()
        }
        return {"held_out_loss": float(error.mean()), **by_time}

    def preview(self, path: Path) -> None:
        """A sheet drawn by default: the recipe's prompts, or held-out captions where it has none."""
        prompts = list(self.config.diffusion.prompts)
        if not prompts:
            stride = max(1, len(self.held_out) // SHOWN)
            shown = range(0, len(self.held_out), stride)[:SHOWN]
            captions = [self.held_out.captions(index) or [""] for index in shown]
            prompts = ["" if self.text is None else choices[0] for choices in captions]
        save_sheet(path, draw(self.model, prompts, seeds=range(len(prompts))), columns=8)

    def finish(self, path: Path) -> None:
        parts = {part: module.state_dict() for part, module in self.modules.items()}
        if self.model.autoencoder is not None:
            parts["autoencoder"] = self.model.autoencoder.state_dict()
        save_file(path, self.model.config, parts, torch.float16)

    def _errors(self, clean: Tensor, noise: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        """Squared error of every sample, (b,) float32."""
        clean, noise, t = clean.to(self.device), noise.to(self.device), t.to(self.device)
        alpha, sigma = self.schedule.alpha_sigma(t, clean)
        context = None
        if self.text is not None:
            rows = [self.tokens[c] if c in self.tokens else self._tokens([c])[0] for c in captions]
            context = self.text(torch.stack(rows).to(self.device)).last_hidden_state
        raw = self.forward(alpha * clean + sigma * noise, t.float(), context=context)
        target = self.prediction.target(clean, noise, alpha, sigma)
        return F.mse_loss(raw.float(), target, reduction="none").flatten(1).mean(dim=1)

    def _tokenizer(self, start: ModelFile | None) -> Tokenizer | None:
        """That of the model to start from, CLIP's, or one learned from the captions; None without [text]."""
        text, vocabulary = self.config.text, self.config.diffusion.vocabulary
        if text is None:
            return None
        if start is not None:
            start.module("text")  # a model without one cannot be started from
            assert start.config.tokenizer is not None
            return Tokenizer.from_json(start.config.tokenizer)
        if vocabulary == "clip":
            return Tokenizer.clip()
        return Tokenizer.train(self._captions(), vocabulary, text.max_position_embeddings)

    def _text_encoder(self) -> CLIPTextEncoder | None:
        """The text transformer for the tokenizer; looks up the tokens of every caption once and for all."""
        if self.tokenizer is None or self.config.text is None:
            return None
        self.tokens = {caption: self._tokens([caption])[0] for caption in ["", *self._captions()]}
        tokenizer = self.tokenizer
        ends = {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
        return CLIPTextEncoder(dataclasses.replace(self.config.text, vocab_size=tokenizer.vocab_size, **ends))

    def _captions(self) -> list[str]:
        return sorted({text for index in range(len(self.dataset)) for text in self.dataset.captions(index)})

    def _tokens(self, captions: list[str]) -> Tensor:
        assert self.tokenizer is not None and self.config.text is not None
        return self.tokenizer.batch(captions, self.config.text.max_position_embeddings)[0]

    def _model(self, first_stage: ModelFile | None) -> StableDiffusion:
        """What is trained, as a model that draws; checks what would else fail at the first preview."""
        options, shape = self.config.diffusion, self.config.data.shape
        config = ModelConfig(
            name=self.config.name,
            unet=self.unet.config,
            autoencoder=first_stage and first_stage.config.autoencoder,
            text=self.text and self.text.config,
            tokenizer=self.tokenizer and self.tokenizer.to_json(),
            schedule=self.config.schedule,
            prediction=options.prediction,
            latent_scale=first_stage.config.latent_scale if first_stage else 1.0,
            image_size=shape,
            defaults={"guidance": options.guidance, "steps": options.steps, "sampler": options.sampler},
            notices=self.config.notices,
        )
        parts = dict(self.modules)
        if first_stage is not None:
            parts["autoencoder"] = first_stage.module("autoencoder").to(self.device)
            channels_last(parts["autoencoder"])  # twice as fast on a CPU
        model = StableDiffusion(config, parts)
        _check_channels(self.config.data.channels, self.unet.config, config.autoencoder)
        model.latent_shape(*shape)
        complete(model, Request(prompt=""))
        return model

    def _sources(self, first_stage: ModelFile | None, progress: Progress) -> tuple[Source, Source]:
        """The samples of the training and of the held-out pictures."""
        if first_stage is None or self.model.autoencoder is None:
            workers = self.config.data.workers
            return Pixels(self.dataset, workers), Pixels(self.held_out, workers)
        shape = self.model.latent_shape(*self.config.data.shape)
        train, test = (
            CachedLatents(
                dataset,
                self.model.autoencoder,
                self.model.latent_scale,
                shape,
                self.config.out / f"latents-{name}.safetensors",
                first_stage.identity,
                progress,
            )
            for dataset, name in ((self.dataset, "train"), (self.held_out, "test"))
        )
        return train, test


def _checked(config: TrainingConfig) -> UNetConfig:
    """The U-Net of a recipe that can be trained on pictures with captions."""
    unet, text = config.unet, config.text
    if unet is None:
        raise InputError("a diffusion run needs a [unet] table", "See configs/ for one.")
    if unet.dims != 2 or unet.num_classes is not None:
        raise InputError(
            f"unet.dims is {unet.dims} and num_classes {unet.num_classes}; captions need 2 and none",
            "Leave both out.",
        )
    if unet.context_dim != (text and text.hidden_size):
        raise InputError(
            f"unet.context_dim is {unet.context_dim}, text.hidden_size {text and text.hidden_size}",
            "Make them equal, or leave out both context_dim and the [text] table.",
        )
    if text is None and any(config.diffusion.prompts):
        raise InputError(
            "diffusion.prompts are given, but the recipe has no [text] table", "Add it, or leave them out."
        )
    return unet


def _check_channels(pictures: int, unet: UNetConfig, autoencoder: AutoencoderConfig | None) -> None:
    if autoencoder is not None and autoencoder.in_channels != pictures:
        raise InputError(
            f"data.channels is {pictures}, the autoencoder's pictures have {autoencoder.in_channels}",
            "Set data.channels to that number.",
        )
    samples = pictures if autoencoder is None else autoencoder.embed_dim
    if (unet.in_channels, unet.out_channels) != (samples, samples):
        raise InputError(
            f"unet.in_channels is {unet.in_channels} and out_channels {unet.out_channels}, "
            f"but the samples have {samples} channels",
            "Set both to that number.",
        )
