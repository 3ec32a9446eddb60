"""What a network predicts, eps or v: shapes do not tell, so this weighs what else a file says."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from sfumato.diffusion.prediction import PREDICTIONS
from sfumato.errors import InputError, nearest
from sfumato.families import FAMILIES

SPELLINGS = {
    "eps": "eps", "epsilon": "eps", "noise": "eps",
    "v": "v", "v_prediction": "v", "v-prediction": "v", "vprediction": "v", "v_pred": "v", "v-pred": "v",
    "velocity": "v",
    "x0": "x0", "sample": "x0",
}  # fmt: skip
KEYS = ("modelspec.prediction_type", "prediction_type", "modelspec.predict_key")
ARCHITECTURES = {"stable-diffusion-v2-512": "eps", "stable-diffusion-v2-768-v": "v"}
# The step at which each release of Stable Diffusion 2 was saved, which its .ckpt says.
STEPS = {
    "875000": ("eps", "2.0 base"),
    "220000": ("eps", "2.1 base"),
    "140000": ("v", "2.0"),
    "110000": ("v", "2.1"),
}


@dataclass(frozen=True)
class Evidence:
    """What is predicted, why it is taken for that, and whether running the network once would tell better."""

    prediction: str
    text: str
    zero_terminal_snr: bool = False
    needs_probe: bool = False


def weigh(
    asked: str | None,
    metadata: Mapping[str, str],
    names: Container[str],
    base: str,
    in_channels: int,
    family: str | None = None,
) -> Evidence:
    """The prediction by the best evidence there is: what was asked for, the metadata, flags in the file.

    names: the file's tensors. base, in_channels: of the U-Net; those of 4 channels in Stable Diffusion 2
    come in both kinds, equal in every shape. family: the released model that it is, or is like. Raises
    `InputError` for a prediction that there is not.
    """
    flags = "v_pred" in names, "ztsnr" in names
    if asked is not None:
        if SPELLINGS.get(asked) not in PREDICTIONS:
            raise InputError(f"there is no prediction {asked!r}", nearest(asked, PREDICTIONS))
        return _evidence(SPELLINGS[asked], "it was asked for", flags[1])
    for key in KEYS:
        found = SPELLINGS.get(metadata.get(key, "").strip().lower())
        if found is not None:
            return _evidence(found, f"the metadata say {key} = {metadata[key]}", flags[1])
    if flags[0]:
        return _evidence("v", "the file has a tensor named v_pred", flags[1])
    if family is not None and family != "sd2" and family in FAMILIES and FAMILIES[family].prediction == "v":
        return _evidence("v", f"it is what {family} predicts", flags[1])
    if base != "sd2":
        return _evidence("eps", "it is what this family predicts", flags[1])
    if in_channels != 4:
        return _evidence("eps", "it is what the variants of Stable Diffusion 2 with more channels predict")
    architecture = metadata.get("modelspec.architecture", "")
    if architecture in ARCHITECTURES:
        return _evidence(
            ARCHITECTURES[architecture], f"the metadata say modelspec.architecture = {architecture}"
        )
    if metadata.get("global_step") in STEPS:
        found, release = STEPS[metadata["global_step"]]
        return _evidence(
            found, f"it was saved at step {metadata['global_step']}, as Stable Diffusion {release}"
        )
    text = (
        "assumed: Stable Diffusion 2 comes in both kinds, which nothing in the file tells apart; "
        "say --prediction eps for 2-base and 2.1-base"
    )
    return Evidence("v", text, flags[1], needs_probe=True)


def _evidence(prediction: str, text: str, zero_terminal: bool = False) -> Evidence:
    if zero_terminal and prediction == "eps":
        return Evidence(prediction, f"{text}; its flag ztsnr is left aside, a noise of 1 has no eps")
    if zero_terminal:
        return Evidence(prediction, f"{text}; ztsnr: the last timestep is pure noise", zero_terminal_snr=True)
    return Evidence(prediction, text)
