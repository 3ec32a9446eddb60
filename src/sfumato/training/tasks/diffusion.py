"""Training the denoiser: predict the noise (or v, or x0) of a noised latent, given its caption (Ho et al. 2020, alg. 1).

The text transformer, where the recipe has one, is trained along with the U-Net.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.checkpoints.load import load_file
from sfumato.checkpoints.save import save_file
from sfumato.diffusion.prediction import paired
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import InputError
from sfumato.generation import draw
from sfumato.model import StableDiffusion
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.presets import ModelConfig
from sfumato.runtime import training_attention
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.config import TrainingConfig
from sfumato.training.data import Dataset, Position, positions
from sfumato.training.latents import CachedLatents, Pictures
from sfumato.training.sheets import save_sheet

EVALUATED = 512  # held-out samples that a score is the mean of
BINS = 4  # ranges of timesteps scored apart

Batch = tuple[list[Position], Tensor]


class DiffusionTask:
    """U-Net and text transformer on captioned pictures, in the latent space of a finished autoencoder or in pixels."""

    def __init__(
        self,
        config: TrainingConfig,
        unet: UNetConfig,
        dataset: Dataset,
        held_out: Dataset,
        device: torch.device,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.config, self.device = config, device
        self.dataset, self.held_out = dataset, held_out
        options = config.diffusion
        self.schedule = Schedule(config.schedule)
        self.prediction = paired(options.prediction, self.schedule)

        # First stage: frozen.
        autoencoder, scale, self.digest = None, 1.0, dataset.digest
        if options.autoencoder is not None:
            first_stage = load_file(options.autoencoder, torch.float32)
            module = first_stage.modules["autoencoder"]
            assert isinstance(module, AutoencoderKL)
            autoencoder, scale = module.to(device), first_stage.config.latent_scale
            self.digest += first_stage.digest
            self.source, self.held_out_source = (
                CachedLatents(
                    part,
                    module,
                    scale,
                    config.out / f"latents-{name}.safetensors",
                    first_stage.digest,
                    device,
                    progress,
                )
                for part, name in ((dataset, "train"), (held_out, "test"))
            )
        else:
            self.source, self.held_out_source = (
                Pictures(part, config.data.workers) for part in (dataset, held_out)
            )

        # Text: the tokens of every caption, so that a batch only looks them up.
        self.tokenizer, text = None, None
        if config.text is not None:
            if unet.context_dim != config.text.hidden_size:
                raise InputError(
                    f"unet.context_dim is {unet.context_dim}, text.hidden_size is {config.text.hidden_size}",
                    "Make them equal.",
                )
            captions = sorted(
                {caption for index in range(len(dataset)) for caption in dataset.captions(index)}
            )
            self.tokenizer = (
                Tokenizer.clip()
                if options.vocabulary == "clip"
                else Tokenizer.train(captions, options.vocabulary, config.text.max_position_embeddings)
            )
            text_config = dataclasses.replace(
                config.text, vocab_size=self.tokenizer.vocab_size, eos_token_id=self.tokenizer.end_id
            )
            text = CLIPTextEncoder(text_config)
            self.tokens = {caption: self._tokens([caption])[0] for caption in ["", *captions]}
        elif unet.context_dim is not None:
            raise InputError(
                "the U-Net has a context_dim but the recipe has no [text] table",
                "Add it, or drop context_dim.",
            )

        format = (
            torch.channels_last if config.loop.channels_last and unet.dims == 2 else torch.contiguous_format
        )
        network = UNet(unet).to(device=device, memory_format=format)  # type: ignore[call-overload]
        network.gradient_checkpointing = config.loop.gradient_checkpointing
        self.modules: dict[str, nn.Module] = {"unet": network} | (
            {} if text is None else {"text": text.to(device)}
        )
        self.forward = torch.compile(network) if config.loop.compile else network
        if options.start_from is not None:
            self._start_from(options.start_from)
        self.model_config = ModelConfig(
            name=config.name,
            unet=unet,
            autoencoder=None if autoencoder is None else autoencoder.config,
            text=None if text is None else text.config,
            tokenizer=None if self.tokenizer is None else self.tokenizer.to_json(),
            schedule=config.schedule,
            prediction=options.prediction,
            latent_scale=scale,
            image_size=config.data.shape,
            defaults={"guidance": options.guidance, "steps": options.steps, "sampler": options.sampler},
            notices=config.notices,
        )
        self.model = StableDiffusion(
            self.model_config,
            {**self.modules} | ({} if autoencoder is None else {"autoencoder": autoencoder}),
        )

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"denoiser": [p for module in self.modules.values() for p in module.parameters()]}

    def batches(self, seen: int, size: int) -> Iterator[Batch]:
        return self.source.batches(positions(self.dataset.order, self.config.seed, seen), size)

    def losses(self, batch: Batch, seen: int) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
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
        loss = self._errors(clean, torch.stack(noise), torch.stack(times), captions).mean()
        yield "denoiser", loss, {"loss": loss}

    def evaluate(self) -> dict[str, float]:
        """Held-out mean squared error, over all timesteps and in ranges of them; the same noise every time."""
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
        """A sheet drawn by the default sampler: the recipe's prompts, or held-out captions where it has none."""
        stride = max(1, len(self.held_out) // 32)
        found = [
            (self.held_out.captions(index) or [""])[0] for index in range(0, len(self.held_out), stride)
        ][:32]
        prompts = list(self.config.diffusion.prompts) or found
        pictures = draw(self.model, prompts, seeds=list(range(len(prompts))))
        save_sheet(path, pictures, columns=8)

    def finish(self, path: Path) -> None:
        parts = {part: module.state_dict() for part, module in self.modules.items()}
        if self.model.autoencoder is not None:
            parts["autoencoder"] = self.model.autoencoder.state_dict()
        save_file(path, self.model_config, parts, torch.float16)

    def _errors(self, clean: Tensor, noise: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        """Squared error of every sample, (b,) float32."""
        clean, noise, t = clean.to(self.device), noise.to(self.device), t.to(self.device)
        alpha, sigma = self.schedule.alpha_sigma(t, clean)
        context = None
        with training_attention(self.device):
            if self.tokenizer is not None:
                tokens = torch.stack(
                    [self.tokens[c] if c in self.tokens else self._tokens([c])[0] for c in captions]
                )
                context = self.modules["text"](tokens.to(self.device)).last_hidden_state
            raw = self.forward(alpha * clean + sigma * noise, t.float(), context=context)
        target = self.prediction.target(clean, noise, alpha, sigma)
        return F.mse_loss(raw.float(), target, reduction="none").flatten(1).mean(dim=1)

    def _tokens(self, captions: list[str]) -> Tensor:
        assert self.tokenizer is not None and self.config.text is not None
        return self.tokenizer.batch(captions, self.config.text.max_position_embeddings)[0]

    def _start_from(self, path: Path) -> None:
        """Begin with the U-Net and text transformer of a finished model of the same shape and tokens."""
        file = load_file(path, torch.float32)
        tokenizer = None if self.tokenizer is None else self.tokenizer.to_json()
        if file.config.tokenizer != tokenizer:
            raise InputError(
                f"{path} has another tokenizer than this data gives",
                "Use the same pictures, or train afresh.",
            )
        for part, module in self.modules.items():
            module.load_state_dict(file.modules[part].state_dict(), strict=True)
