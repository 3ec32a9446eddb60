"""Networks only: tensors in, tensors out; no files, no devices, no defaults of dtype."""
