"""Command-line options made from the fields of `Request`, so that there is one list of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import Parameter
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sfumato.request import Request, input_error


def takes_request(command: Callable[..., None]) -> Callable[..., None]:
    """`command(request, *, ...)` as a command whose options are those of `Request` and its own keywords.

    The first field, the prompt, may be given without its option's name. Texts are turned into values by
    `Request` alone; what it refuses becomes an `InputError`.
    """
    own = inspect.signature(command).parameters
    hints = get_type_hints(command, include_extras=True)
    keywords = [
        parameter.replace(annotation=hints[name])
        for name, parameter in own.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]

    @wraps(command)
    def run(*prompt: Any, **given: Any) -> None:
        values = {**dict(zip(Request.model_fields, prompt, strict=False)), **given}
        rest = {name: values.pop(name) for name in list(values) if name in own}
        try:
            request = Request(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise input_error(error) from error
        command(request, **rest)

    fields = [_parameter(name, field) for name, field in Request.model_fields.items()]
    first = fields[0].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    del run.__wrapped__  # cyclopts reads the signature, and must not find the command's own behind it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*fields, *keywords]}
    run.__signature__ = inspect.Signature([first, *fields[1:], *keywords])  # type: ignore[attr-defined]
    return run


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = _plain_type(field.annotation)
    extra = field.json_schema_extra
    group = extra.get("group") if isinstance(extra, Mapping) else None
    group = str(group or "Parameters")
    if kind is bool:
        answer = bool if field.default is not None else bool | None
        annotation = Annotated[answer, Parameter(help=field.description, show_default=False, group=group)]
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
        )
    if isinstance(extra, Mapping) and extra.get("repeated"):
        annotation = Annotated[
            list[str] | None,
            Parameter(
                help=field.description, show_default=False, metavar="TEXT", group=group, negative=(),
            ),
        ]  # fmt: skip
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    # A text, for `Request` to read; one that is not given stays out of the request.
    told = isinstance(field.default, int | float | str) and field.default != ""
    text = f"{field.description} [default: {field.default}]" if told else field.description
    annotation = Annotated[
        str | None, Parameter(help=text, show_default=False, metavar=_metavar(kind), group=group)
    ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain_type(annotation: Any) -> Any:
    """A field's type without None and without what pydantic checks."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _plain_type(next(kind for kind in get_args(annotation) if kind is not NoneType))
    return annotation


def _metavar(kind: Any) -> str:
    """The word for a value in the help text; a field that takes anything takes a file here."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) in (dict, tuple):
        return "TEXT"
    return {str: "TEXT", int: "INT", float: "FLOAT"}.get(kind, "FILE")


# Options of every command that takes a model.
Vae = Annotated[str | None, Parameter(metavar="MODEL", help="Take the autoencoder of this model instead.")]
Prediction = Annotated[
    Literal["eps", "v", "x0"] | None,
    Parameter(help="What the network predicts, where the file does not say or says it wrong."),
]
Ema = Annotated[
    bool,
    Parameter(negative=(), show_default=False, help="Take the averaged weights beside those of training."),
]
Offline = Annotated[
    bool, Parameter(negative=(), show_default=False, help="Ask the hub's cache alone, not the hub.")
]
Revision = Annotated[
    str | None, Parameter(metavar="NAME", help="Branch, tag or commit of a model on the hub.")
]
Variant = Annotated[
    str | None, Parameter(metavar="NAME", help="Which of a folder's sets of weights, as fp16.")
]
Vocab = Annotated[
    str | None,
    Parameter(
        metavar="FILE",
        help="BERT's vocab.txt or the hub's name of a BERT, for LDM's 1.45 B text-to-image model.",
    ),
]
