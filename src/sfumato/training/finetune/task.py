"""The task of fine-tuning: captioned pictures, the model's own objective, and one of four things trained."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.checkpoints.load import open_model
from sfumato.errors import InputError
from sfumato.model import EMBEDDED, StableDiffusion
from sfumato.runtime import channels_last, training_attention
from sfumato.text.tokenizer import Tokenizer
from sfumato.training import objective
from sfumato.training.config import TrainingConfig
from sfumato.training.data import (
    WHOLE,
    CaptionRules,
    Dataset,
    Placed,
    Position,
    Share,
    caption,
    caption_rules,
    groups,
)
from sfumato.training.finetune.captions import check_conditions, sized
from sfumato.training.finetune.controlnet import Control
from sfumato.training.finetune.full import Full
from sfumato.training.finetune.hints import Hints
from sfumato.training.finetune.inversion import Inversion, with_word, with_word_kept
from sfumato.training.finetune.lora import Lora
from sfumato.training.finetune.method import DTYPES, Base, Method
from sfumato.training.finetune.prior import prior_dataset
from sfumato.training.latents import CachedLatents, Pixels, Progress, Source
from sfumato.training.loop import Loss
from sfumato.training.settings_finetune import FinetuneConfig
from sfumato.training.sheets import save_sheet

EVALUATED = 128  # held-out samples that a score is the mean of
TIMESTEPS = 4  # at which each is scored where there are few, one in every range
GOLDEN = (5**0.5 - 1) / 2  # whose multiples lie evenly in 0..1, however many
TOGETHER = 16  # of them in a network call
SHOWN = 8  # pictures on a sheet where the recipe has no prompts
METHODS: Mapping[str, Callable[[Base], Method]] = {
    "full": Full, "lora": Lora, "textual_inversion": Inversion, "controlnet": Control,
}  # fmt: skip
OTHER_NOISE = 0x7072696F72  # added to the seed of the class pictures' positions


class Samples(NamedTuple):
    """Clean samples (b, c, h, w) of a data set, where they stand, what a ControlNet is shown of them."""

    dataset: Dataset
    order: list[Position]
    clean: Tensor
    hints: Tensor | None = None


class Batch(NamedTuple):
    """What one step sees: pictures, and pictures of their class where those are asked for."""

    pictures: Samples
    prior: Samples | None


class FinetuneTask:
    """A model that there is, trained further on captioned pictures by `finetune.method`.

    progress: is told (done, of) while class pictures are drawn and pictures encoded. Raises `InputError` for
    a recipe whose parts do not fit together, `CheckpointError` for a model that cannot be opened.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dataset: Dataset,
        held_out: Dataset,
        device: torch.device,
        progress: Progress = lambda done, of: None,
    ) -> None:
        options = config.finetune
        if options is None:
            raise InputError("a fine-tuning run needs a [finetune] table", "See configs/ for one.")
        self.config, self.options, self.device = config, options, device
        self.dataset, self.held_out = dataset, held_out
        base = _opened(config, options, device)
        self.base, self.model, self.schedule = base, base.model, base.model.schedule
        self.objective = options.model_copy(update={"prediction": base.model.prediction})
        objective.check(self.objective, self.schedule)
        check_conditions(base.model, [*options.prompts, options.prompt or ""])

        self.of_class = _share_of_class(config, dataset)
        _check(options, self.of_class > 0)

        # What pictures are called.
        self.rules = caption_rules(config.data.captions)
        self.kept: Callable[[str | None], str | None] = lambda text: text
        tokenizer, inversion = base.model.tokenizer, options.inversion
        if options.method == "textual_inversion" and inversion and isinstance(tokenizer, Tokenizer):
            self.rules = with_word(self.rules, inversion, options.prompt, dataset, tokenizer)
            separator = self.rules.separator
            self.kept = lambda text: with_word_kept(text, inversion.word, separator, tokenizer)

        # Data, with the model as it is: class pictures are drawn, and all are encoded, before it changes.
        prior = None
        if options.prior is not None and not self.of_class:
            prior = prior_dataset(base, options.prior, progress)
        self.hints = None
        if options.method == "controlnet" and options.control is not None:
            self.hints = Hints(dataset, options.control), Hints(held_out, options.control)
        self.source, self.held_out_source = (
            self._source(each, name, progress) for each, name in ((dataset, "train"), (held_out, "test"))
        )
        self.prior = None if prior is None else (prior, self._source(prior, "prior", progress))
        pieces = [dataset.digest, base.file.identity, prior.digest if prior else ""]
        if options.control is not None and options.control.start_from is not None:
            pieces.append(options.control.start_from)
        self.digest = hashlib.sha256(" ".join(pieces).encode()).hexdigest()

        # What is trained.
        self._settle()
        self.method = METHODS[options.method](base)
        self.modules: Mapping[str, nn.Module] = self.method.modules
        self.written: Path | None = None

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        return {self.options.method: self.method.parameters()}

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Batch, None, None]:
        seed, workers = self.config.seed, self.config.data.workers
        order = groups(self.dataset, seed, seen, size, share)
        if self.hints is None:
            pictures = self.source.batches(order)
        else:
            pictures = self.hints[0].batches(order, self.source, workers)
        prior = None
        if self.prior is not None:
            prior = self.prior[1].batches(groups(self.prior[0], seed + OTHER_NOISE, seen, size, share))
        try:
            for places, clean, *hints in pictures:
                own = Samples(self.dataset, places, clean, *hints)
                yield Batch(own, None if prior is None else self._prior_samples(prior))
        finally:
            for running in (pictures, prior):
                if running is not None:
                    running.close()

    def losses(self, batch: Batch, seen: int) -> Iterator[Loss]:
        captions = [self._caption(place) for place in batch.pictures.order]
        with training_attention(self.device):  # in the backward pass too, which may run the network again
            each = self._losses(batch.pictures, captions)
            yield self.options.method, *self._weighed(each, batch.pictures.order)
        if batch.prior is not None and self.options.prior is not None:
            with training_attention(self.device):
                same = [self.options.prior.prompt] * len(batch.prior.order)
                loss = self._losses(batch.prior, same).mean()
                yield self.options.method, self.options.prior.weight * loss, {"prior_loss": loss}

    def evaluate(self) -> dict[str, float]:
        """Held-out loss without weights, over all timesteps and in ranges; noise and captions are fixed."""
        count = min(EVALUATED, len(self.held_out))
        stride, rounds = len(self.held_out) // count, max(1, min(TIMESTEPS, EVALUATED // count))
        first, last = self.objective.timestep_range or (0, self.schedule.num_timesteps - 1)
        found, times = [], []
        for start in range(0, count * rounds, TOGETHER):
            numbers = range(start, min(start + TOGETHER, count * rounds))
            shares = [(number // count + number * GOLDEN % 1) / rounds for number in numbers]
            t = [first + int(share * (last - first + 1)) for share in shares]
            places, hints = self._shown([(number, number % count * stride) for number in numbers])
            clean = self.held_out_source.fixed([place.index for place in places])
            samples, called = Samples(self.held_out, places, clean, hints), self._first_captions(places)
            times.append(torch.tensor(t))
            found.append(self._errors(samples, called, objective.errors, times[-1]))
        return objective.held_out_scores(torch.cat(found), torch.cat(times), self.schedule)

    def preview(self, path: Path) -> None:
        """A sheet of the recipe's prompts, or of held-out captions, at seeds 0, 1, ...

        Above each row of a ControlNet's drawings are its hints, those of held-out pictures.
        """
        prompts = list(self.options.prompts)
        stride = max(1, len(self.held_out) // (len(prompts) or SHOWN))
        shown = [
            i * stride % len(self.held_out) for i in range(len(prompts) or min(SHOWN, len(self.held_out)))
        ]
        places, hints = self._shown([(index, index) for index in shown])
        prompts = prompts or self._first_captions(places)
        drawings = self.method.draw(prompts, hints).cpu()
        columns = min(8, len(prompts))
        if hints is not None:
            pairs = zip((hints * 2 - 1).split(columns), drawings.split(columns), strict=True)
            drawings = torch.cat([_filled(row, columns) for pair in pairs for row in pair])
        save_sheet(path, drawings, columns)

    def finish(self, path: Path) -> None:
        tail = path.stem.removeprefix("model")
        written = self.method.write(path.parent, tail)
        self.written = self.written if tail else written

    def _losses(self, samples: Samples, captions: list[str | None] | list[str]) -> Tensor:
        return self._errors(samples, captions, objective.losses)

    def _errors(
        self,
        samples: Samples,
        captions: list[str | None] | list[str],
        error: Callable[..., Tensor],
        t: Tensor | None = None,
    ) -> Tensor:
        """What `error` makes of the answers for these samples, (b,) float32. t: timesteps, else drawn."""
        clean = samples.clean.to(self.device)
        chance = objective.drawn_batch(self.objective, self.schedule, samples.order, clean.shape[1:])
        chance = (chance if t is None else chance._replace(t=t)).to(self.device)
        shown = objective.noised(self.schedule, clean, chance)
        hints = None if samples.hints is None else samples.hints.to(self.device)
        cond = sized(self.model, self.method.condition(captions), samples.dataset, samples.order)
        raw = self.method.network(shown, chance.t, cond, hints)
        return error(self.objective, self.schedule, raw, clean, chance)

    def _weighed(self, losses: Tensor, places: Sequence[Position]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and what is told of it.

        Pictures of the class among `data.folders` count `prior.weight` times. They are told apart, each kind
        divided by its share of an epoch, not of the batch: the mean over many batches is that of the kind.
        """
        if not self.of_class:
            return losses.mean(), {"loss": losses.mean()}
        weight = 1.0 if self.options.prior is None else self.options.prior.weight
        kept = torch.tensor([self._of_class(self.dataset, place) for place in places], device=losses.device)
        shares = {"loss": (~kept, 1 - self.of_class), "prior_loss": (kept, self.of_class)}
        told = {name: (losses * which).mean() / share for name, (which, share) in shares.items() if share}
        return torch.where(kept, weight * losses, losses).mean(), told

    def _of_class(self, dataset: Dataset, place: Position) -> bool:
        """Whether it is a picture of the class, of a folder with `prior = true`."""
        return self.of_class > 0 and isinstance(dataset, Placed) and dataset.prior(place.index)

    def _prior_samples(self, batches: Iterator[tuple[list[Position], Tensor]]) -> Samples:
        assert self.prior is not None
        return Samples(self.prior[0], *next(batches))

    def _caption(self, place: Position) -> str | None:
        """What a sample is called, or None where that is left out."""
        generator = place.generator("caption dropout")
        if float(torch.rand((), generator=generator)) < self.options.caption_dropout:
            return self.kept(None)
        return self.kept(self._called(self.dataset, place, self.rules))

    def _first_captions(self, places: Sequence[Position]) -> list[str]:
        """What held-out pictures are called."""
        rules = dataclasses.replace(self.rules, choose="first", shuffle=False, tag_dropout=0.0)
        return [self._called(self.held_out, place, rules) for place in places]

    def _called(self, dataset: Dataset, place: Position, rules: CaptionRules) -> str:
        """The caption of a picture. `finetune.prompt` is no caption of the class's pictures."""
        prior = self.options.prior
        if self._of_class(dataset, place):
            if prior is not None and not any(dataset.captions(place.index)):
                return prior.prompt
        elif self.options.prompt is not None:
            return self.options.prompt
        return caption(dataset, place, rules)

    def _shown(self, numbered: Sequence[tuple[int, int]]) -> tuple[list[Position], Tensor | None]:
        """Places of held-out pictures of (number, index), the same each time; and their hints."""
        places = [Position(self.config.seed, -1, number, index) for number, index in numbered]
        if self.hints is not None:
            return self.hints[1].loaded(places)
        if isinstance(self.held_out, Placed):
            places = [self.held_out.sound(place) for place in places]
        return places, None

    def _source(self, dataset: Dataset, name: str, progress: Progress) -> Source:
        model = self.model
        if model.autoencoder is None:
            return Pixels(dataset, self.config.data.workers)
        return CachedLatents(
            dataset, model.autoencoder, model.latent_scale, model.latent_shape(*self.config.data.shape),
            self.config.out / f"latents-{name}.safetensors", self.base.file.identity, progress,
            workers=self.config.data.workers,
        )  # fmt: skip

    def _settle(self) -> None:
        """The frozen networks in the number format that they are kept in while training."""
        model, wanted = self.model, DTYPES[self.options.frozen_precision]
        trained = {"unet", *(self.base.text_parts if self.options.text else ())}
        for part in (*self.base.text_parts, "unet"):
            module = model.part(part)
            assert module is not None
            if self.options.method != "full" or part not in trained:
                module.to(wanted)
        if model.autoencoder is not None:
            model.autoencoder.to(model.dtype)  # it decodes what the U-Net draws


def _opened(config: TrainingConfig, options: FinetuneConfig, device: torch.device) -> Base:
    """The model of a recipe, frozen, in float32 and on the device."""
    prediction = options.prediction if "prediction" in options.model_fields_set else None
    source = options.model or EMBEDDED
    file = open_model(source, prediction=prediction, dtype=torch.float32, device=device)
    model = StableDiffusion(file.config, file.modules, lambda: file.digest).to(device, torch.float32)
    first = model.config.autoencoder
    channels = model.latent_shape(*config.data.shape)[0] if first is None else first.in_channels
    if channels != config.data.channels:
        raise InputError(
            f"data.channels is {config.data.channels}, pictures of {model.name!r} have {channels}",
            "Set data.channels to that number.",
        )
    model.latent_shape(*config.data.shape)  # a size that the model cannot draw is told here
    unet = model.unet
    if config.loop.channels_last:
        channels_last(unet)
    unet.gradient_checkpointing = config.loop.gradient_checkpointing
    return Base(config, options, file, model, torch.compile(unet) if config.loop.compile else unet)


def _check(options: FinetuneConfig, of_class: bool) -> None:
    """`InputError` for what a method has no use for. of_class: pictures of a class are among the data."""
    if options.text and options.method != "full":
        raise InputError(
            f'finetune.text trains the text encoders with method = "full"; this one is {options.method!r}',
            "Set finetune.lora.text instead." if options.method == "lora" else "Leave it out.",
        )
    if (options.prior is not None or of_class) and options.method not in ("full", "lora"):
        name = "finetune.prior" if options.prior is not None else "prior = true of data.folders"
        raise InputError(
            f"{name} keeps what a class looks like; {options.method} does not change the model",
            "Leave it out.",
        )


def _share_of_class(config: TrainingConfig, dataset: Dataset) -> float:
    """The share of an epoch that pictures of the class have, of folders with `prior = true`."""
    if not isinstance(dataset, Placed) or not any(folder.prior for folder in config.data.folders):
        return 0.0
    return sum(map(dataset.prior, dataset.order)) / len(dataset.order)


def _filled(row: Tensor, columns: int) -> Tensor:
    """A row of pictures (n, c, h, w) with white ones at its end, so that the next one begins below."""
    return torch.cat([row, row.new_ones(columns - len(row), *row.shape[1:])])
