"""Generation: a request, a model, and the pictures made of them."""

from sfumato.generation.defaults import complete
from sfumato.generation.notes import Notes
from sfumato.generation.run import Result, draw, finish, generate, in_turn, stream

__all__ = ["Notes", "Result", "complete", "draw", "finish", "generate", "in_turn", "stream"]
