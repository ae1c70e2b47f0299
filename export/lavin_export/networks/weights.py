"""The denoiser's weights, read from a checkpoint's file."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lavin_export.networks import denoiser as denoiser_part
from lavin_export.networks.denoiser import Source
from lavin_rt.checkpoint.tensors import SafetensorsFile
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.rope import rotary_tables

WeightsOf = Callable[[str], torch.Tensor]


def denoiser_weights(file: SafetensorsFile, config: DiTConfig, dtype: torch.dtype) -> WeightsOf:
    """Reads a parameter or buffer of a `BranchDenoiser` from a checkpoint's file by its name."""
    sources = denoiser_part.sources(config)

    def weight(name: str) -> torch.Tensor:
        if name in sources:
            return read_source(file, sources[name], dtype)
        if name == "unit":
            return torch.ones(config.hidden_size, dtype=dtype)
        cos, sin = rotary_tables(denoiser_part.POSITIONS, config.head_size)
        return {"rotary_cos": cos, "rotary_sin": sin}[name]

    return weight


def weight_names(config: DiTConfig) -> list[str]:
    """The names that `denoiser_weights` knows."""
    return [*denoiser_part.sources(config), "unit", "rotary_cos", "rotary_sin"]


def read_source(file: SafetensorsFile, source: Source, dtype: torch.dtype) -> torch.Tensor:
    """The official tensors of one parameter, joined, in `dtype` on the CPU."""
    tensor, row = torch.empty(source.shape, dtype=dtype), 0
    with file.reader() as reader:
        for place in source.places:
            reader.read_into(place.official, tensor[row : row + place.shape[0]])
            row += place.shape[0]
    return tensor
