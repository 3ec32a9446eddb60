"""Recipes: what it takes to draw a picture again, in the picture's file, in our form and in other tools'."""

from sfumato.recipes.embed import save
from sfumato.recipes.read import from_texts, read
from sfumato.recipes.recipe import Recipe

__all__ = ["Recipe", "from_texts", "read", "save"]
