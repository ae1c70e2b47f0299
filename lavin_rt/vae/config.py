"""The shape of the ST-VAE (LaVin-DiT, arXiv 2411.11505, section 3.2)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import torch

from lavin_rt.errors import InputError
from lavin_rt.vae.tiling import FRAMES

LEVELS = 4


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of an ST-VAE; the defaults are the released weights'.

    Attributes:
        latent_channels: channels of the latent.
        temporal_compression_ratio: frames per latent frame after the first; 4, as weights do not show it.
        norm_num_groups: groups of every group norm; not seen in the weights either.
        block_out_channels: widths of the four levels, from the pixels to the latent.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.

    Raises:
        InputError: values that make no network of this architecture.
    """

    latent_channels: int = 16
    temporal_compression_ratio: int = 4
    norm_num_groups: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3

    def __post_init__(self):
        widths = self.block_out_channels
        if len(widths) != LEVELS:
            raise InputError(f"VAE config: {len(widths)} levels in block_out_channels {widths}, expected {LEVELS}")
        if self.temporal_compression_ratio != FRAMES:
            raise InputError(
                f"VAE config: temporal_compression_ratio is {self.temporal_compression_ratio}, "
                f"this architecture has {FRAMES}"
            )
        if min(self.latent_channels, self.norm_num_groups, self.layers_per_block, *widths) < 1:
            raise InputError(f"VAE config: {self} has a number below 1")
        for width in widths:
            if width % self.norm_num_groups:
                raise InputError(
                    f"VAE config: a level of width {width} cannot be normalised in {self.norm_num_groups} groups; "
                    "expected widths divisible by the number of groups"
                )

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, torch.Tensor | Sequence[int]]) -> VAEConfig:
        """Reads the configuration off the shapes of an ST-VAE's tensors.

        Args:
            shapes: tensors or their shapes by name; more than the ST-VAE's may be there.

        Raises:
            InputError: the tensors that tell are missing, or are those of another architecture.
        """

        def shape(name: str) -> tuple[int, ...]:
            if name not in shapes:
                found = f", e.g. {next(iter(shapes))}" if shapes else ""
                raise InputError(f"not the weights of an ST-VAE: no {name} among {len(shapes)} tensors{found}")
            sizes = tuple(getattr(shapes[name], "shape", shapes[name]))
            if len(sizes) != 5:
                raise InputError(f"not the weights of an ST-VAE: {name} is {list(sizes)}, expected five dimensions")
            return sizes

        def layers(blocks: str) -> int:
            numbers = (re.match(rf"{blocks}\.\d+\.resnets\.(\d{{1,4}})\.", name) for name in shapes)
            return max((int(number[1]) + 1 for number in numbers if number), default=0)

        # The most layers that any level has: a lost tensor is then found missing, and not taken for a smaller network.
        return cls(
            latent_channels=shape("decoder.conv_in.conv.weight")[1],
            block_out_channels=tuple(
                shape(f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight")[0] for level in range(LEVELS)
            ),
            layers_per_block=max(layers(r"encoder\.down_blocks"), layers(r"decoder\.up_blocks") - 1),
        )
