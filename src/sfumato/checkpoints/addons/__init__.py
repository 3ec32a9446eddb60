"""LoRA and embeddings: found, read, fitted to a model, applied, written."""
