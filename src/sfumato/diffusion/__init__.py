"""The mathematics of diffusion: schedule, prediction, spacing, samplers, guidance and noise; no networks."""
