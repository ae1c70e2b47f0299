"""Run LaVin-DiT: official checkpoints in, pictures out."""
