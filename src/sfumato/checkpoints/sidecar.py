"""The YAML beside an original checkpoint: numbers are read from it, classes only looked up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sfumato.checkpoints.schema import Record, parse, read_text, shown
from sfumato.errors import CheckpointError

MAX_YAML = 1 << 16  # characters; the original configs have 2,000, and the reader is slow
MAX_BRACKETS = 500  # the reader takes seconds for some thousands inside each other
TARGETS = {  # the classes that the original configs build, whose networks are known here
    "ldm.models.diffusion.ddpm.LatentDiffusion", "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
    "ldm.models.diffusion.ddpm.LatentFinetuneDiffusion", "ldm.models.diffusion.ddpm.DDPM",
    "ldm.models.diffusion.ddpm_edit.LatentDiffusion", "ldm.models.autoencoder.AutoencoderKL",
    "ldm.models.autoencoder.VQModel", "ldm.models.autoencoder.VQModelInterface",
    "ldm.models.autoencoder.IdentityFirstStage",
    "ldm.modules.diffusionmodules.openaimodel.UNetModel", "ldm.modules.diffusionmodules.model.Model",
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "ldm.modules.encoders.modules.BERTEmbedder", "ldm.modules.encoders.modules.ClassEmbedder",
    "ldm.modules.encoders.modules.SpatialRescaler",
    "ldm.modules.losses.LPIPSWithDiscriminator", "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "ldm.lr_scheduler.LambdaLinearScheduler", "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
    "torch.nn.Identity", "__is_unconditional__", "__is_first_stage__",
    "sgm.models.diffusion.DiffusionEngine", "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
    "sgm.models.autoencoder.AutoencoderKL", "sgm.modules.GeneralConditioner",
    "sgm.modules.diffusionmodules.openaimodel.UNetModel",
    "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser",
    "sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling",
    "sgm.modules.diffusionmodules.denoiser_scaling.VScaling",
    "sgm.modules.diffusionmodules.denoiser_weighting.EpsWeighting",
    "sgm.modules.diffusionmodules.denoiser_weighting.VWeighting",
    "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization",
    "sgm.modules.encoders.modules.FrozenCLIPEmbedder",
    "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder2",
    "sgm.modules.encoders.modules.ConcatTimestepEmbedderND",
}  # fmt: skip


class Params(Record):
    """`model.params`, those that describe the diffusion; absent ones say nothing."""

    parameterization: str | None = None
    scale_factor: Annotated[float, Field(gt=0, le=1e6)] | None = None
    linear_start: Annotated[float, Field(gt=0, lt=1)] | None = None
    linear_end: Annotated[float, Field(gt=0, lt=1)] | None = None
    timesteps: Annotated[int, Field(ge=2, le=100_000)] | None = None
    image_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


def read_sidecar(weights: Path) -> tuple[Path, Params] | None:
    """What `NAME.yaml` beside `NAME.ckpt` says, None where there is none.

    Nothing in it is run. `CheckpointError` where it names a class that is not in the table, or is no YAML.
    """
    path = weights.with_suffix(".yaml")
    if not path.is_file():
        return None
    import yaml  # few models need it

    text = read_text(path)
    if len(text) > MAX_YAML or text.count("[") + text.count("{") > MAX_BRACKETS:
        raise CheckpointError(
            f"{path} is too long to describe a model",
            f"At most {MAX_YAML} characters are read. Move it away.",
        )
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} cannot be read: {cause}", "Correct it, or move it away.") from error
    model = values.get("model") if isinstance(values, Mapping) else None
    if not isinstance(model, Mapping):
        return None
    for target in _targets(model):
        if not isinstance(target, str) or target not in TARGETS:
            raise CheckpointError(
                f"{path} asks for {shown(target)}, which is not known here; nothing of it was run",
                "If the weights are of a known kind, move the .yaml away and load them without it.",
            )
    params = model.get("params")
    return path, parse(Params, params if isinstance(params, Mapping) else {}, path)


def _targets(root: Any) -> Iterator[Any]:
    """Everything under a key `target`; what is there by many aliases is looked at once."""
    todo, seen = [root], set[int]()
    while todo:
        values = todo.pop()
        if id(values) in seen or not isinstance(values, Mapping | list):
            continue
        seen.add(id(values))
        if isinstance(values, Mapping) and "target" in values:
            yield values["target"]
        todo += values if isinstance(values, list) else values.values()
