"""The study notes' own small Stable Diffusion: its configuration file, read as it stands, and its run."""
