"""What a file of weights is, by the names and shapes of its tensors."""
