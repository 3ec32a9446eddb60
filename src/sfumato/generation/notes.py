"""What a run has to tell beside its pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sfumato.errors import NumericalError

if TYPE_CHECKING:
    from sfumato.generation.controlling import Controls
    from sfumato.generation.pictures import Start


@dataclass
class Notes:
    """What a run has to tell: warnings for people, stages repeated in float32, for every picture its prompts
    with styles and choices drawn, the sha256 of LoRA and embeddings by kind and name, the number of steps
    that are run, what they start from, which `finish` needs, and what controls them.
    """

    warnings: list[str] = field(default_factory=list)
    float32_retries: list[str] = field(default_factory=list)
    prompts: list[tuple[str | None, str]] = field(default_factory=list)
    addons: dict[str, dict[str, str]] = field(default_factory=dict)
    steps: int | None = None
    start: Start | None = None
    controls: Controls | None = None

    def warn_once(self, text: str) -> None:
        """A warning, unless it has been given."""
        if text not in self.warnings:
            self.warnings.append(text)


def not_finite(stage: str, place: str) -> NumericalError:
    return NumericalError(
        f"{stage} gave values that are not finite {place}, in float32 too",
        "Try another seed, sampler or a lower guidance; if it stays, the model's weights may be damaged.",
    )
