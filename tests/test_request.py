"""Requests: ranges, unknown names, and that they need no torch until a name is checked."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from sfumato.errors import InputError
from sfumato.request import Request, input_error


@pytest.mark.parametrize(
    ("field", "value", "message", "hint"),
    [
        ("sampler", "eulr", "there is no sampler 'eulr'", "'euler'"),
        ("sampler", "zzz", "there is no sampler 'zzz'", "sfumato samplers"),
        ("sampler_options", "order", "'order' is no option", "name=value"),
        ("sigmas", "3,x", "sigmas is x; it should be a valid number", ""),
        ("spacing", "kerras", "there is no spacing 'kerras'", "'karras'"),
        ("steps", 0, "steps is 0; it should be greater than or equal to 1", ""),
        ("steps", "many", "steps is many; it should be a valid integer", ""),
        ("guidance", float("nan"), "guidance is nan; it should be a finite number", ""),
        ("guidance", float("inf"), "guidance is inf", ""),
        ("guidance", -1, "guidance is -1", ""),
        ("eta", 1.5, "eta is 1.5", ""),
        ("clip_skip", 0, "clip_skip is 0; it should be greater than or equal to 1", ""),
        ("zeros_for_empty", "maybe", "zeros_for_empty is maybe", ""),
        ("original_width", 0, "original_width is 0", ""),
        ("crop_top", -1, "crop_top is -1", ""),
        ("seed", 2**53, f"seed is {2**53}", ""),
        ("num_images", 0, "num_images is 0", ""),
        ("variance", "huge", "variance is huge; it should be 'large' or 'small'", ""),
        ("start_noise", 3, "int is neither a path nor a tensor", ""),
        ("stepz", 3, "there is no option 'stepz'", "'steps'"),
    ],
)
def test_what_is_refused(field: str, value: object, message: str, hint: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Request.model_validate({field: value})
    told = input_error(caught.value)
    assert isinstance(told, InputError)
    assert told.message.startswith(message) and hint in told.hint


def test_a_request_does_not_change() -> None:
    request = Request(prompt="a fox", start_noise=np.zeros(3))
    with pytest.raises(ValidationError, match="frozen"):
        request.steps = 3  # type: ignore[misc]


def test_requests_without_torch() -> None:
    code = "import sys, sfumato; sfumato.Request(prompt='x', steps=3); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
