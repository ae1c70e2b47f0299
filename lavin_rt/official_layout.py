"""The official checkpoint's key names and where each tensor lies in this package's joined parameters."""

from __future__ import annotations

import dataclasses

import torch

from lavin_rt.config import DiTConfig
from lavin_rt.model import TIME_FEATURES

STREAMS = ("cond", "x")
WRAPPERS = ("module", "_orig_mod")


def official_name(name: str) -> str:
    """A tensor's name without what wrappers put into it: `module.` by data parallelism, `_orig_mod.` by compiling."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor of the official layout.

    Attributes:
        official: its key in the checkpoint.
        shape: its shape there.
        parameter: the name of the `JDiT` parameter that holds it.
        stream: its index along the parameter's first dimension, or None where the parameter exists once.
        first_row: where it starts in a parameter that joins several tensors, or None where it is alone.
    """

    official: str
    shape: tuple[int, ...]
    parameter: str
    stream: int | None = None
    first_row: int | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The contiguous part of `parameter` that is this tensor."""
        part = parameter if self.stream is None else parameter[self.stream]
        return part if self.first_row is None else part[self.first_row : self.first_row + self.shape[0]]


def resident_layout(config: DiTConfig) -> list[Place]:
    """Every official tensor but the blocks' modulation linears."""
    hidden, features = config.hidden_size, config.patch_features
    places = [Place(name, (1, hidden), name) for name in ("prompt_embed", "answer_embed")]
    for stream in STREAMS:
        places += _linear(f"{stream}_embedder.0", (hidden, features), f"{stream}_embedder.0")
        places += [
            Place(f"{stream}_embedder.1.{kind}", (hidden,), f"{stream}_embedder.1.{kind}")
            for kind in ("weight", "bias")
        ]
    places += _linear("t_embedder.mlp.0", (hidden, TIME_FEATURES), "time_embedder.first")
    places += _linear("t_embedder.mlp.2", (hidden, hidden), "time_embedder.second")
    for index in range(config.depth):
        places += _block_layout(config, index)
    places += _linear("final_layer.adaLN_modulation.1", (hidden, hidden), "head.modulation")
    places += _linear("final_layer.linear", (features, hidden), "head.linear")
    return places


def modulation_layout(config: DiTConfig, index: int) -> list[Place]:
    """The modulation linears of one block."""
    hidden, block = config.hidden_size, f"blocks.{index}"
    return [
        place
        for stream, name in enumerate(STREAMS)
        for place in _linear(f"{block}.{name}_modulation.1", (4 * hidden, hidden), f"{block}.modulation", stream)
    ]


def official_layout(config: DiTConfig) -> list[Place]:
    """Every tensor of the official checkpoint."""
    blocks = (modulation_layout(config, index) for index in range(config.depth))
    return resident_layout(config) + [place for block in blocks for place in block]


def _linear(official: str, shape: tuple[int, int], module: str, stream: int | None = None) -> list[Place]:
    return [
        Place(f"{official}.weight", shape, f"{module}.weight", stream),
        Place(f"{official}.bias", shape[:1], f"{module}.bias", stream),
    ]


def _block_layout(config: DiTConfig, index: int) -> list[Place]:
    hidden, kv, inner = config.hidden_size, config.kv_size, config.mlp_size
    places = []
    for stream, name in enumerate(STREAMS):
        official, ours = f"blocks.{index}.joint_attn.{name}", f"blocks.{index}.attention"
        places += [
            Place(f"{official}_q.weight", (hidden, hidden), f"{ours}.qkv", stream, 0),
            Place(f"{official}_k.weight", (kv, hidden), f"{ours}.qkv", stream, hidden),
            Place(f"{official}_v.weight", (kv, hidden), f"{ours}.qkv", stream, hidden + kv),
            Place(f"{official}_qnorm.weight", (hidden,), f"{ours}.q_norm", stream),
            Place(f"{official}_knorm.weight", (kv,), f"{ours}.k_norm", stream),
            Place(f"{official}_proj.weight", (hidden, hidden), f"{ours}.proj", stream),
        ]
        official, ours = f"blocks.{index}.{name}_mlp", f"blocks.{index}.mlp"
        places += [
            Place(f"{official}.gate_proj.weight", (inner, hidden), f"{ours}.gate_up", stream, 0),
            Place(f"{official}.up_proj.weight", (inner, hidden), f"{ours}.gate_up", stream, inner),
            Place(f"{official}.down_proj.weight", (hidden, inner), f"{ours}.down", stream),
        ]
    return places
