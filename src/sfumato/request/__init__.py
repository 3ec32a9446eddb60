"""What someone asks for: the single source of names, ranges, defaults and help texts; imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, model_validator

from sfumato.errors import InputError, nearest
from sfumato.request.control import ControlFields, ControlPicture
from sfumato.request.drawing import MAX_SEED, MAX_SIDE, DrawingFields
from sfumato.request.guidance import GuidanceFields
from sfumato.request.large import LargeFields
from sfumato.request.picture import PictureFields
from sfumato.request.prompt import PromptFields
from sfumato.request.sampling import SamplingFields
from sfumato.request.values import Options, options, told

__all__ = ["MAX_SEED", "MAX_SIDE", "ControlPicture", "Options", "Request", "input_error"]


class Request(
    LargeFields, ControlFields, PictureFields, DrawingFields, GuidanceFields, SamplingFields, PromptFields
):
    """One request for pictures. A field left at None takes the model's own value; a seed is drawn.

    Its fields lie in the files beside this one, by what they are about; the last base's come first.
    """

    @model_validator(mode="before")
    @classmethod
    def _read_sampler(cls, values: Any) -> Any:
        """A sampler's name may say its spacing and options too, as "DPM++ 2M Karras" does."""
        if not isinstance(values, dict) or not isinstance(values.get("sampler"), str):
            return values
        from sfumato.diffusion.names import implied, resolve

        name = values["sampler"]
        key, spacing = told(resolve, name)
        more = implied(name)
        values = {**values, "sampler": key}
        if spacing is not None and values.get("spacing", "auto") == "auto":
            values["spacing"] = spacing
        for option in [option for option in more if option in cls.model_fields]:
            values.setdefault(option, more.pop(option))
        if more:
            values["sampler_options"] = more | options(values.get("sampler_options", {}))
        return values


def input_error(error: ValidationError) -> InputError:
    """The first problem that pydantic found, in the words of this package."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(
        str(part) for part in problem["loc"] if isinstance(part, str) and part in Request.model_fields
    )
    if problem["type"] == "extra_forbidden":
        given = str(problem["loc"][-1])
        return InputError(f"there is no option {given!r}", nearest(given, Request.model_fields))
    if problem["type"] == "value_error":
        message, _, hint = str(problem.get("ctx", {}).get("error")).partition(". ")
        return InputError(message, hint)
    reason = problem["msg"].removeprefix("Input should be ")
    return InputError(f"{name} is {problem['input']}; it should be {reason}")
