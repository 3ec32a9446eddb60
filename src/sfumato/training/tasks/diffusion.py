"""Training the denoiser: predict the noise (or v, or x0) of a noised sample (Ho et al. 2020, algorithm 1).

Text transformer or table of classes, where the recipe has one, are trained along with the U-Net.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.checkpoints.load import ModelFile, copy_into, load_file
from sfumato.checkpoints.save import save_file
from sfumato.conditioning import Conditioning
from sfumato.generation import complete
from sfumato.model import StableDiffusion
from sfumato.nn.unet import UNet
from sfumato.presets import ModelConfig
from sfumato.request import Request
from sfumato.runtime import channels_last, training_attention
from sfumato.training import objective
from sfumato.training.config import TrainingConfig
from sfumato.training.data import WHOLE, Dataset, Position, Share, groups
from sfumato.training.latents import Pixels, Progress
from sfumato.training.loop import Loss
from sfumato.training.memorised import Memory
from sfumato.training.objective import Drawn
from sfumato.training.sheets import save_classes
from sfumato.training.tasks import diffusion_parts as parts
from sfumato.training.tasks.conditions import Captions, Labels, joined
from sfumato.training.tasks.diffusion_parts import Batch
from sfumato.training.tasks.diffusion_sheet import sheet
from sfumato.training.tasks.shown import Inpainting

EVALUATED = 512  # held-out samples that a score is the mean of


class DiffusionTask:
    """A U-Net and what conditions it, in a finished autoencoder's latents or in pixels.

    progress: is told (encoded, of) while the pictures are encoded. warnings: what will go wrong with the
    recipe. Raises `InputError` for a recipe whose parts do not fit together.
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
        options, data = config.diffusion, (dataset, held_out)
        start = None if options.start_from is None else load_file(options.start_from, torch.float32)
        told = parts.told(config, data, start, device)
        self.unet = UNet(parts.network_config(config, told))
        if start is not None:
            parts.start_unet(self.unet, start, str(options.start_from))
            for each in told:
                for part, module in each.modules.items() if isinstance(each, Labels) else ():
                    copy_into(module, start.module(part).state_dict(), f"{options.start_from} does not fit")
        self.unet.to(device)
        if config.loop.channels_last:
            channels_last(self.unet)
        self.unet.gradient_checkpointing = config.loop.gradient_checkpointing
        self.forward = torch.compile(self.unet) if config.loop.compile else self.unet
        self.modules: dict[str, nn.Module] = {"unet": self.unet}
        self.frozen: dict[str, nn.Module] = {}
        for each in told:
            (self.modules if each.trained else self.frozen).update(each.modules)
        self.captions = next((each for each in told if isinstance(each, Captions)), None)
        self.labels = next((each for each in told if isinstance(each, Labels)), None)
        self.memory: Memory | None = None

        # First stage: frozen. Its latents are made last, for that takes minutes.
        first_stage = None if options.autoencoder is None else load_file(options.autoencoder, torch.float32)
        self.digest = dataset.digest + (first_stage.identity if first_stage else "")
        self.digest += self.captions.frozen if self.captions else ""
        self.model = self._model(first_stage)
        self.schedule = self.model.schedule
        objective.check(options, self.schedule)
        self.warnings = objective.warnings(options, self.schedule)
        self.shown = parts.shown(config, self.model, data)
        self.conditions = [*told, *self.shown]
        self.source, self.held_out_source = parts.samples(config, self.model, data, first_stage, progress)

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {"denoiser": [p for module in self.modules.values() for p in module.parameters()]}

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Batch, None, None]:
        order = groups(self.dataset, self.config.seed, seen, size, share)
        if self.shown:
            masked = any(isinstance(each, Inpainting) and each.masked for each in self.shown)
            return parts.with_pictures(self.source, self.dataset, self.config.data.workers, order, masked)
        return parts.without_pictures(self.source, order)

    def losses(self, batch: Batch, seen: int) -> Iterator[Loss]:
        places, clean, pictures = batch
        options = self.config.diffusion
        chance = objective.drawn_batch(options, self.schedule, places, clean.shape[1:])
        with training_attention(self.device):  # in the backward pass too, which may run the network again
            given = joined([each.training(places, pictures) for each in self.conditions])
            errors = self._errors(clean, chance, given)
            weights = objective.weights(options, self.schedule, chance.t).to(self.device)
            loss = (errors * weights).mean()
            plain = {} if options.weighting == "none" else {"error": errors.mean()}
            yield "denoiser", loss, {"loss": loss, **plain}

    def evaluate(self) -> dict[str, float]:
        """Held-out error without weights, over all timesteps and in ranges of them, with fixed noise."""
        count = min(EVALUATED, len(self.held_out))
        stride = len(self.held_out) // count
        errors, times = [], []
        for indices in parts.alike(self.held_out, [index * stride for index in range(count)], 64):
            first, last = self.config.diffusion.timestep_range or (0, self.schedule.num_timesteps - 1)
            t = torch.tensor([first + index * 997 % (last - first + 1) for index in indices])
            clean = self.held_out_source.fixed(indices)
            generators = [Position(self.config.seed, -1, i).generator("held out") for i in indices]
            noise = torch.stack([torch.randn(clean.shape[1:], generator=each) for each in generators])
            given = self._held_out_conditions(indices)
            errors.append(self._errors(clean, Drawn(noise, noise, t), given))
            times.append(t)
        return objective.held_out_scores(torch.cat(errors), torch.cat(times), self.schedule)

    def preview(self, path: Path) -> dict[str, float]:
        """A sheet drawn by default: prompts, classes, or held-out pictures and what was made of them.

        Beside it what was drawn above the training pictures that it is most like, see `Memory`.
        """
        names = self.labels and self.labels.names
        drawn = sheet(path, self.model, self.config, self.held_out, self.shown, names)
        if not self.config.diffusion.nearest or self.shown:
            return {}
        self.memory = self.memory or Memory(self.dataset, self.held_out)
        found = self.memory.nearest(drawn)
        self.memory.sheet(drawn, found, path.with_name(f"{path.stem}-nearest.png"))
        return found.scores

    def finish(self, path: Path) -> None:
        """Write the model file; beside it the names of its classes, in the order of their numbers."""
        states = {part: module.state_dict() for part, module in (self.modules | self.frozen).items()}
        for part in ("autoencoder", "preview"):
            if (module := self.model.part(part)) is not None:
                states[part] = module.state_dict()
        save_file(path, self.model.config, states, torch.float16)
        if self.labels is not None:
            save_classes(path.with_name("classes.tsv"), self.labels.names)

    def _errors(self, clean: Tensor, chance: Drawn, given: Conditioning) -> Tensor:
        """The error of every sample, (b,) float32."""
        clean, chance = clean.to(self.device), chance.to(self.device)
        x = objective.noised(self.schedule, clean, chance)
        if given.concat is not None:
            x = torch.cat([x, given.concat.to(x)], dim=1)
        t = chance.t.to(self.device, torch.float32)
        raw = self.forward(x, t, context=given.context, vector=given.vector)
        return objective.errors(self.config.diffusion, self.schedule, raw, clean, chance)

    def _held_out_conditions(self, indices: list[int]) -> Conditioning:
        pictures = Pixels(self.held_out, 0).fixed(indices) if self.shown else None
        return joined([each.held_out(indices, pictures) for each in self.conditions])

    def _model(self, first_stage: ModelFile | None) -> StableDiffusion:
        """What is trained, as a model that draws; checks what would else fail at the first preview."""
        options, shape = self.config.diffusion, self.config.data.shape
        text, classes = self.captions, self.labels and self.labels.network
        config = ModelConfig(
            name=self.config.name,
            unet=self.unet.config,
            autoencoder=first_stage and first_stage.config.autoencoder,
            text=text and text.network.config,
            tokenizer=text and text.tokenizer.to_json(),
            schedule=self.config.schedule,
            prediction=options.prediction,
            latent_scale=first_stage.config.latent_scale if first_stage else 1.0,
            image_size=shape,
            defaults={"guidance": options.guidance, "steps": options.steps, "sampler": options.sampler},
            notices=self.config.notices,
            classes=classes and classes.config,
            clip_skip=text.layer if text else 1,
            text_normed=text.normed if text else True,
            preview=first_stage and first_stage.config.preview,
            latent_rgb=first_stage and first_stage.config.latent_rgb,
            latent_spread=first_stage and first_stage.config.latent_spread,
            concat=parts.concat_kind(options),
            no_class=options.classes == "vector",
        )
        modules = self.modules | self.frozen
        if first_stage is not None:
            modules["autoencoder"] = first_stage.module("autoencoder").to(self.device)
            channels_last(modules["autoencoder"])  # twice as fast on a CPU
            if config.preview is not None:
                modules["preview"] = first_stage.module("preview").to(self.device)
        model = StableDiffusion(config, modules)
        parts.check_channels(self.config, self.unet.config, first_stage)
        model.latent_shape(*shape)
        complete(model, Request(prompt=""))
        return model
