"""What can be trained: networks, amounts of data, and lengths of training.

Memory for training all parameters, on paper: weights, gradients, AdamW's two moments and the averaged weights, float32,
20 bytes a parameter, divided by the number of processes:

| preset | parameters | 1 GPU | 2 | 4 | 8 |
|---|---|---|---|---|---|
| `lavin-dit-0.1b` | 97 M | 1.9 GB | 1.0 | 0.5 | 0.2 |
| `lavin-dit-0.3b` | 305 M | 6.1 GB | 3.1 | 1.5 | 0.8 |
| `lavin-dit-1b` | 1.03 B | 20.5 GB | 10.3 | 5.1 | 2.6 |
| `lavin-dit-3.4b` | 3.40 B | 68.0 GB | 34.0 | 17.0 | 8.5 |

To that comes one block's whole weights (0.04, 0.09, 0.24, 0.62 GB) twice, and activations: with `--checkpointing` about
8 bytes a token, block and unit of width, and one block's own, some 60 bytes a token and unit of width (512 px, four
pairs: 10,240 tokens; 5.6 GB a sample for 3.4 B). Adapters (`--lora`) take the weights, 4 bytes a parameter, once more
while they are merged, and next to nothing else.
"""

from __future__ import annotations

import dataclasses

from lavin_rt.dit import config
from lavin_rt.dit.config import DiTConfig
from lavin_rt.mini.train.dit import Plan
from lavin_rt.mini.train.vae import VAEPlan
from lavin_rt.mini.world.pieces import Amounts
from lavin_rt.vae.config import VAEConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model, its data and the length of its training.

    Attributes:
        size: of pictures, pixels a side.
        amounts: of data.
        vae, dit: the networks.
        vae_plan, plan: of their trainings.
        patience: seconds without a new piece after which training goes on with those that are there.
    """

    size: int
    amounts: Amounts
    vae: VAEConfig
    dit: DiTConfig
    vae_plan: VAEPlan
    plan: Plan
    patience: float = 90.0


PRESETS = {
    "mini": Preset(
        size=64,
        amounts=Amounts(scenes=40_000, clips=2_500, ordinary=40_000, family=6_000, photographs=30_000),
        vae=VAEConfig(block_out_channels=(64, 64, 64, 64), layers_per_block=1),
        dit=DiTConfig(hidden_size=216, depth=10, num_heads=9, kv_group=3),
        vae_plan=VAEPlan(steps=8_000),
        plan=Plan(steps=16_000),
    ),
    # A day on one core of a CPU, on the VAE at hand (`--vae FILE --vae-steps 0`): a third of the network.
    "mini-cpu": Preset(
        size=64,
        amounts=Amounts(scenes=8_000, clips=500, ordinary=8_000, family=1_500, photographs=6_000),
        vae=VAEConfig(block_out_channels=(64, 64, 64, 64), layers_per_block=1),
        dit=DiTConfig(hidden_size=144, depth=8, num_heads=6, kv_group=3),
        vae_plan=VAEPlan(steps=1_000),
        plan=Plan(steps=20_000, tokens=8_192, log_every=50),
        patience=3600.0,
    ),
    # A minute on a CPU: shows that everything fits together and that losses fall, not what a trained model can do.
    "tiny": Preset(
        size=32,
        amounts=Amounts(24, 2, 24, 8, 12, scenes_a_piece=12, clips_a_piece=1),
        vae=VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
        dit=DiTConfig(hidden_size=72, depth=2, num_heads=3, kv_group=3),
        vae_plan=VAEPlan(steps=30, batch=16, peak=2e-3, capacity=1000, first_pieces=1),
        plan=Plan(steps=120, tokens=1024, peak=3e-3, log_every=20, warmup=12),
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name; of a larger network, the mini's but for the transformer."""
    return PRESETS[name] if name in PRESETS else dataclasses.replace(PRESETS["mini"], dit=config.preset(name))
