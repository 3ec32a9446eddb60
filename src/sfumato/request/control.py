"""Pictures that control what is drawn: for ControlNets, T2I-Adapters and IP-Adapters."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, ValidationError

from sfumato.request.picture import Given
from sfumato.request.values import Fields, Options, folder, number, path_or_object

CONTROL: dict[str, JsonValue] = {"group": "Control"}
AS_IT_IS = "plain"
Share = Annotated[float, Field(ge=0, le=1)]


class ControlPicture(Fields):
    """A picture, the network it is shown to, and how much that counts.

    Its text is "KIND:PICTURE name=value ...", as in "canny:photo.png model=canny.safetensors weight=0.8"; a
    value with spaces stands in quotes, and names that are no fields are options of the kind.
    """

    kind: str = Field(description="A preprocessor's name, or plain for a picture that is shown as it is.")
    picture: Given | None = Field(default=None, description="The picture; None is the one to start from.")
    model: Annotated[Any, AfterValidator(path_or_object)] | None = Field(
        default=None, description="File, folder or hub name of the network, or the loaded one."
    )
    weight: float = Field(default=1, ge=-100, le=100)
    start: Share = Field(default=0, description="Share of the steps after which it begins.")
    end: Share = Field(default=1, description="Share of the steps after which it ends.")
    mode: Literal["balanced", "prompt", "control"] = "balanced"
    resize: Literal["stretch", "crop", "pad"] = "stretch"
    mask: Given | None = Field(default=None, description="Grey picture: where the control counts.")
    options: Options = Field(default={}, description="Options of the kind.")


def read_control(text: str) -> ControlPicture:
    """The control of a text; `ValueError` that says what is wrong with it."""
    try:
        first, *words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"the control {text!r} cannot be read: {error}. Close its quotes") from error
    kind, colon, picture = first.partition(":")
    if not colon:
        raise ValueError(f"the control {text!r} names no picture. Write it as canny:photo.png model=FILE")
    values: dict[str, Any] = {"kind": kind, "picture": picture or None}
    more: dict[str, float | str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ValueError(f"{word!r} in a control is no option. Options are written name=value")
        if name in ControlPicture.model_fields and name not in ("kind", "picture", "options"):
            values[name] = value
        else:
            more[name] = number(value)
    try:
        return ControlPicture(**values, options=more)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"the control {text!r}: {problem['loc'][0]}: {problem['msg']}") from error


def controls(value: Any) -> Any:
    """Controls, each as it is or by its text; one alone needs no list."""
    several = [value] if isinstance(value, str | ControlPicture) or not isinstance(value, Sequence) else value
    return tuple(read_control(one) if isinstance(one, str) else one for one in several)


class ControlFields(Fields):
    """Pictures that control what is drawn."""

    control: Annotated[tuple[ControlPicture, ...], BeforeValidator(controls)] = Field(
        default=(),
        description="A picture that controls the drawing, as 'canny:photo.png model=FILE weight=0.8'; may be "
        "given several times. `sfumato preprocess --list` shows the kinds.",
        json_schema_extra=CONTROL | {"repeated": True},
    )
    control_dir: Annotated[str | None, BeforeValidator(folder)] = Field(
        default=None,
        description="Folder of control networks, of which a control without a model takes the one named "
        "after its kind.",
        json_schema_extra=CONTROL,
    )
    image_encoder: Annotated[Any, AfterValidator(path_or_object)] | None = Field(
        default=None,
        description="CLIP's image tower, which IP-Adapters need: a file, folder or name on the hub.",
        json_schema_extra=CONTROL,
    )
