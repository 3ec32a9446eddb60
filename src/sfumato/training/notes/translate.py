"""The notes' configuration as a recipe of ours, and what is to be said about it."""

from __future__ import annotations

import math
from typing import Literal

from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError
from sfumato.nn.unet_config import UNetConfig
from sfumato.training.config import DataConfig, LoopConfig, OptimizerConfig, TrainingConfig
from sfumato.training.notes.keys import NotesConfig
from sfumato.training.objective import MOST_SIGNAL
from sfumato.training.settings_reproduction import ReproductionTaskConfig

REFERENCE_STEPS = 1000  # that betas are for (guided-diffusion, get_named_beta_schedule)
GROUPS = 32  # of every group normalisation, as in the original's GroupNorm32
LOGGED = 10  # lines in an epoch


def training_config(notes: NotesConfig, count: int, name: str) -> TrainingConfig:
    """The recipe for `count` samples. What the notes leave open: AdamW as torch has it, a constant rate."""
    return TrainingConfig(
        task="reproduction",
        name=name,
        out=notes.save_path.expanduser(),
        seed=notes.seed,
        device=notes.device,
        data=DataConfig(path=notes.dataset_path.expanduser(), size=_size(notes)),
        optimizer=OptimizerConfig(
            learning_rate=notes.learning_rate, betas=(0.9, 0.999), warmup_images=0, decay="constant"
        ),
        loop=LoopConfig(
            images=notes.epochs * count,
            batch=notes.batch_size,
            ema_images=notes.ema_images,
            precision=notes.precision,
            log_images=max(notes.batch_size, count // LOGGED),
            preview_images=count,
            save_images=count,
        ),
        reproduction=ReproductionTaskConfig(
            prediction=prediction(notes),
            depth=notes.input_depth,
            samples=notes.samples,
            preview_steps=notes.preview_steps,
        ),
        unet=unet_config(notes),
        schedule=schedule_config(notes),
    )


def unet_config(notes: NotesConfig) -> UNetConfig:
    """The notes' network: residual blocks with spatial transformers, which attend to themselves."""
    return UNetConfig(
        in_channels=notes.channel,
        out_channels=notes.n_embed,
        model_channels=notes.model_channels,
        num_res_blocks=notes.num_res_blocks,
        attention_resolutions=notes.attention_resolutions,
        dropout=notes.dropout,
        channel_mult=notes.channel_mult,
        conv_resample=notes.conv_resample,
        dims=notes.dims,
        num_classes=notes.num_classes or None,
        num_heads=notes.num_heads or -1,
        num_head_channels=notes.num_head_channels or -1,
        use_scale_shift_norm=notes.use_scale_shift_norm,
        resblock_updown=notes.resblock_updown,
        use_spatial_transformer=True,
        transformer_depth=notes.transformer_depth,
        num_groups=math.gcd(notes.model_channels, GROUPS),
    )


def schedule_config(notes: NotesConfig) -> ScheduleConfig:
    """Betas evenly from one end of beta_range to the other, as beta_rule says."""
    scale = REFERENCE_STEPS / notes.timesteps if notes.beta_rule == "scaled" else 1.0
    start, end = (beta * scale for beta in notes.beta_range)
    if notes.beta_rule == "scaled" and end >= 1:
        raise InputError(
            f"with timesteps = {notes.timesteps}, beta_rule = scaled makes betas up to {end:g}, not under 1",
            "Use more timesteps, or zero_terminal_snr = True instead.",
        )
    return ScheduleConfig(
        kind="linear",
        num_timesteps=notes.timesteps,
        beta_start=start,
        beta_end=end,
        zero_terminal_snr=notes.zero_terminal_snr,
    )


def prediction(notes: NotesConfig) -> Literal["eps", "v", "x0"]:
    """What the network predicts: noise, and v where the last timestep is noise and says nothing of it."""
    return notes.objective or ("v" if notes.zero_terminal_snr else "eps")


def advice(notes: NotesConfig) -> list[str]:
    """What is wrong with the configuration although it runs, each with the one key that puts it right."""
    said: list[str] = []
    abar = float(Schedule(schedule_config(notes)).alphas_cumprod[-1])
    if math.sqrt(abar) > MOST_SIGNAL:
        remedies = ["zero_terminal_snr = True (which predicts v)"]
        scaled = notes.model_copy(update={"beta_rule": "scaled"})
        if notes.beta_rule == "plain" and notes.beta_range[1] * REFERENCE_STEPS < notes.timesteps:
            after = float(Schedule(schedule_config(scaled)).alphas_cumprod[-1])
            remedies.insert(
                0, f"beta_rule = scaled (betas times 1000 / {notes.timesteps}: abar_T = {after:.1e})"
            )
        said.append(
            f"timesteps = {notes.timesteps} with beta_range = {list(notes.beta_range)} ends at "
            f"abar_T = {abar:.4f}: the last state of training still holds {math.sqrt(abar):.0%} of the "
            f"picture's amplitude (sqrt(abar_T) = {math.sqrt(abar):.3f}), but sampling starts from noise "
            f"alone, so samples come out pale and of middling brightness. One key helps: "
            f"{', or '.join(remedies)}"
        )
    if notes.save_path.expanduser().resolve().is_relative_to(notes.dataset_path.expanduser().resolve()):
        said.append(
            f"save_path {notes.save_path} lies inside of dataset_path: it is left out, or generated pictures "
            "would be trained on"
        )
    return said


def _size(notes: NotesConfig) -> tuple[int, int]:
    return (1 if notes.dims == 1 else notes.input_height, notes.input_width)
