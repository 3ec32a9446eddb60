"""From words to what a network is conditioned on: tokens, prompts, and the text encoder's states."""
