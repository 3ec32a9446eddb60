"""What ways of fine-tuning share that train and draw along the model's own path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sfumato.conditioning import Conditioning
from sfumato.generation import draw
from sfumato.training.finetune.captions import Captions
from sfumato.training.finetune.method import Base, trained_parameters


class AsItIs:
    """Captions to conditions, samples through the network, pictures: all as the model does it."""

    base: Base
    captions: Captions
    modules: Mapping[str, nn.Module]

    def parameters(self) -> list[nn.Parameter]:
        return trained_parameters(self.modules)

    def condition(self, captions: Sequence[str | None]) -> Conditioning:
        return self.captions(captions)

    def network(self, x: Tensor, t: Tensor, cond: Conditioning, hints: Tensor | None) -> Tensor:
        return self.base.network(x, t, cond)

    def draw(self, prompts: Sequence[str], hints: Tensor | None) -> Tensor:
        return draw(self.base.model, prompts, range(len(prompts)), self.base.request)
