"""Shapes of autoencoders that tests share."""

from __future__ import annotations

from lavin_rt.vae.config import VAEConfig

SMALL = VAEConfig(norm_num_groups=2, block_out_channels=(4, 6, 8, 10), layers_per_block=1)
