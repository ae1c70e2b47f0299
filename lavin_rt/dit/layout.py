"""The packed rows of one sampling step: which tokens lie where, built once per shape."""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import torch

from lavin_kernels.branches import Branches
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.rope import grid_positions, rotary_tables
from lavin_rt.errors import InputError


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
        kept: whether keys and values of the context (the pairs', in the null branch the zero frame's) outlive a step.
    """

    queries: int
    cond_frames: int
    query_frames: int
    target_frames: int
    height: int
    width: int
    guided: bool
    kept: bool = False

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

    @property
    def rows(self) -> int:
        """Rows of all branches, conditions and targets."""
        return (sum(self.condition_frames) + self.branches * self.target_frames) * self.frame_tokens


COMPUTED, STORED, REUSED = "computed", "stored", "reused"


@dataclasses.dataclass(frozen=True)
class Form:
    """What one evaluation of a shape computes.

    Query and target rows are computed in every form.

    Attributes:
        context: of the pairs: `COMPUTED`; `STORED`, computed and their keys and values kept; or `REUSED`, neither: the
            keys and values kept before are read.
        null: the same of the null branch's zero frame; None where the null branch does not run.
        held: whether the difference of both branches outlives the evaluation: written where the null branch runs, read
            where it does not.
    """

    context: str = COMPUTED
    null: str | None = None
    held: bool = False

    @classmethod
    def exact(cls, shape: Shape) -> Form:
        """Everything computed."""
        return cls(COMPUTED, COMPUTED if shape.guided else None)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Row ranges and rotary positions of a packed step on one device.

    Attributes:
        shape, form: what it was made for.
        branches: row ranges of both streams, one branch per condition.
        cond_ranges: which rows of all branches' conditions, in order, are the rows of the cond stream.
        positions: `[rows, 3]` int32, (frame, row, column) of every stream-major row.
        cos, sin: `[positions, head_size / 6]` float32.
    """

    shape: Shape
    form: Form
    branches: Branches
    cond_ranges: tuple[tuple[int, int], ...]
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def make(
        cls, config: DiTConfig, shape: Shape, device: torch.device | str = "cpu", form: Form | None = None
    ) -> Layout:
        form = Form.exact(shape) if form is None else form
        frame, grid = shape.frame_tokens, (shape.height // 2, shape.width // 2)
        kinds = [form.context] * shape.queries + [form.null] * (shape.queries if form.null else 0)
        frames = shape.condition_frames[: len(kinds)]
        kept = [every - shape.query_frames if kind == REUSED else 0 for every, kind in zip(frames, kinds, strict=True)]
        cond_lens = [(every - less) * frame for every, less in zip(frames, kept, strict=True)]
        x_lens = [shape.target_frames * frame] * len(frames)
        kept_lens = [less * frame for less in kept] if any(kept) else []
        positions = [grid_positions(every - less, *grid, less) for every, less in zip(frames, kept, strict=True)]
        # The frame coordinate counts the joint sequence: a branch's target follows its own condition.
        positions += [grid_positions(shape.target_frames, *grid, first) for first in frames]
        table_size = max(shape.cond_frames + shape.target_frames, 1 + shape.query_frames + shape.target_frames, *grid)
        cos, sin = rotary_tables(table_size, config.head_size, device)
        branches = Branches.make(cond_lens, x_lens, device, kept_lens)
        ends = [frame * end for end in accumulate(frames)]
        ranges = tuple((end - rows, end) for end, rows in zip(ends, cond_lens, strict=True))
        if not kept_lens:
            ranges = ((0, branches.split),)
        return cls(shape, form, branches, ranges, torch.cat(positions).to(device), cos, sin)

    @property
    def branches_of_a_query(self) -> int:
        """Branches of a query."""
        return len(self.branches.cond_lens) // self.shape.queries
