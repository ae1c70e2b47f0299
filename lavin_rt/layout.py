"""The packed rows of one sampling step: which tokens lie where, built once per shape."""

from __future__ import annotations

import dataclasses

import torch

from lavin_kernels.branches import Branches
from lavin_rt.config import DiTConfig
from lavin_rt.errors import InputError
from lavin_rt.rope import grid_positions, rotary_tables


@dataclasses.dataclass(frozen=True)
class Shape:
    """What decides a layout: counts of latent frames, the latent grid, queries in the batch, and whether a null
    branch runs.

    Attributes:
        queries: queries answered together.
        cond_frames: latent frames of the condition (context pairs and the query).
        query_frames: how many of the last condition frames are the query.
        target_frames: latent frames to generate.
        height, width: of the latents, even.
        guided: whether each query has a null branch `[one zero frame, query frames]`.
    """

    queries: int
    cond_frames: int
    query_frames: int
    target_frames: int
    height: int
    width: int
    guided: bool

    def __post_init__(self):
        if self.height % 2 or self.width % 2:
            raise InputError(
                f"latents are {self.height}x{self.width}; expected an even height and width (pictures a multiple of 16)"
            )
        if min(self.queries, self.target_frames, self.height, self.width) < 1:
            raise InputError(f"nothing to sample: {self}")
        if not 1 <= self.query_frames <= self.cond_frames:
            raise InputError(
                f"query_frames is {self.query_frames}; expected 1 to {self.cond_frames}, the frames of the condition"
            )

    @property
    def frame_tokens(self) -> int:
        return (self.height // 2) * (self.width // 2)

    @property
    def condition_frames(self) -> tuple[int, ...]:
        """Condition frames of every branch: the queries' conditions first, then their null conditions."""
        null = (1 + self.query_frames,) * self.queries if self.guided else ()
        return (self.cond_frames,) * self.queries + null

    @property
    def branches(self) -> int:
        return len(self.condition_frames)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Row ranges and rotary positions of a packed step on one device.

    Attributes:
        shape: what it was made for.
        branches: row ranges of both streams, one branch per condition.
        positions: `[rows, 3]` int32, (frame, row, column) of every stream-major row.
        cos, sin: `[positions, head_size / 6]` float32.
    """

    shape: Shape
    branches: Branches
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def make(cls, config: DiTConfig, shape: Shape, device: torch.device | str = "cpu") -> Layout:
        frame, grid = shape.frame_tokens, (shape.height // 2, shape.width // 2)
        cond_lens = [frames * frame for frames in shape.condition_frames]
        x_lens = [shape.target_frames * frame] * shape.branches
        positions = [grid_positions(frames, *grid) for frames in shape.condition_frames]
        # The frame coordinate counts the joint sequence: a branch's target follows its own condition.
        positions += [grid_positions(shape.target_frames, *grid, first) for first in shape.condition_frames]
        table_size = max(shape.cond_frames + shape.target_frames, 1 + shape.query_frames + shape.target_frames, *grid)
        cos, sin = rotary_tables(table_size, config.head_size, device)
        return cls(shape, Branches.make(cond_lens, x_lens, device), torch.cat(positions).to(device), cos, sin)
