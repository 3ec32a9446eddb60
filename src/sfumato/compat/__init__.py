"""The names of the original code (`ldm`) and of the notes (`notes`), as thin adapters around this package."""
