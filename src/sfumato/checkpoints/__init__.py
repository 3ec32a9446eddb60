"""Model files: reading, writing, and finding out what is in them."""
