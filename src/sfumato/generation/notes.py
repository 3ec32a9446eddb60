"""What a run has to tell beside its pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

from sfumato.errors import NumericalError


@dataclass
class Notes:
    """What a run has to tell: warnings for people, the stages that were repeated in float32, and for every
    picture its prompt and negative prompt with styles and choices drawn."""

    warnings: list[str] = field(default_factory=list)
    float32_retries: list[str] = field(default_factory=list)
    prompts: list[tuple[str | None, str]] = field(default_factory=list)

    def warn_once(self, text: str) -> None:
        """A warning, unless it has been given."""
        if text not in self.warnings:
            self.warnings.append(text)


def not_finite(stage: str, place: str) -> NumericalError:
    return NumericalError(
        f"{stage} gave values that are not finite {place}, in float32 too",
        "Try another seed, sampler or a lower guidance; if it stays, the model's weights may be damaged.",
    )
