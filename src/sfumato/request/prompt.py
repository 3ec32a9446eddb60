"""What to draw, in words: prompts, and the files they draw on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue

from sfumato.request.values import (
    Fields,
    folder,
    words,
)

PROMPT: dict[str, JsonValue] = {"group": "Prompt"}


class PromptFields(Fields):
    """What to draw, in words: prompts, and the files they draw on."""

    prompt: str | None = Field(
        default=None,
        description="What to draw. Nothing given draws without a condition; an empty text is a prompt too.",
    )
    negative_prompt: str = Field(
        default="", description="What to steer away from; works where guidance is not 1."
    )
    label: int | None = Field(
        default=None, ge=0, description="Class to draw, for a model trained on numbered classes."
    )
    clip_skip: int | None = Field(
        default=None,
        ge=1,
        description="Layer of the text encoder to read, from the end: 1 is the last, 2 the one before.",
    )
    emphasis: Literal["a1111", "comfyui", "plain"] = Field(
        default="a1111",
        description="How prompts are read: with the weights of either tool, or plain, brackets and all.",
        json_schema_extra=PROMPT,
    )
    wildcards: Annotated[str | None, BeforeValidator(folder)] = Field(
        default=None,
        description="Folder of the text files that __name__ draws lines from.",
        json_schema_extra=PROMPT,
    )
    styles: Annotated[tuple[str, ...], BeforeValidator(words)] = Field(
        default=(),
        description="Names of styles to add to the prompts, with commas.",
        json_schema_extra=PROMPT,
    )
    styles_file: Annotated[str | None, BeforeValidator(folder)] = Field(
        default=None, description="CSV file of the styles.", json_schema_extra=PROMPT
    )
    lora: Annotated[tuple[str, ...], BeforeValidator(words)] = Field(
        default=(),
        description="LoRA to apply: files or names, each with its weight, as 'ink:0.8,film:1:0.5'.",
        json_schema_extra=PROMPT,
    )
    lora_dir: Annotated[str | None, BeforeValidator(folder)] = Field(
        default=None,
        description="Folder of the LoRA that <lora:name:0.8> in a prompt names.",
        json_schema_extra=PROMPT,
    )
    embedding_dir: Annotated[str | None, BeforeValidator(folder)] = Field(
        default=None,
        description="Folder of textual inversions, which prompts call by name.",
        json_schema_extra=PROMPT,
    )
    zeros_for_empty: bool | None = Field(
        default=None,
        description="Take all zeros for an absent negative prompt, not the empty text's features.",
    )
