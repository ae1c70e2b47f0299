"""Which rows of the stream-major buffer belong to which branch and stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

import torch


@dataclasses.dataclass(frozen=True, eq=False)
class Branches:
    """Row ranges of a packed step: every branch has `cond_lens[b]` rows of the cond stream and `x_lens[b]` of the x
    stream.

    Two orders of the same rows:

    * stream-major, in which the row-wise operators and the linears work:
      `[cond of branch 0 | cond of branch 1 | ... | x of branch 0 | x of branch 1 | ...]`, the x rows starting at
      `split`;
    * branch-contiguous, in which attention reads: `[cond of 0 | x of 0 | cond of 1 | x of 1 | ...]`.

    The lengths are kept on the host, where references slice by them, and as two int32 tables on the device, which the
    kernels read, so that no launch waits for the device and no length is compiled into a kernel.

    Attributes:
        table: `[branches, 4]` int32: cond rows, x rows, first cond row, first x row, both in stream-major order.
        branch_rows: `[rows]` int32: for every stream-major row, its branch-contiguous place.
    """

    cond_lens: tuple[int, ...]
    x_lens: tuple[int, ...]
    table: torch.Tensor
    branch_rows: torch.Tensor

    @classmethod
    def make(cls, cond_lens: Sequence[int], x_lens: Sequence[int], device: torch.device | str = "cpu") -> Branches:
        """Builds both tables.

        Raises:
            ValueError: no branches, lists of different lengths, or a negative length.
        """
        cond_lens, x_lens = tuple(cond_lens), tuple(x_lens)
        if not cond_lens or len(cond_lens) != len(x_lens):
            raise ValueError(
                f"cond_lens has {len(cond_lens)} branches and x_lens {len(x_lens)}; expected the same, >= 1"
            )
        if min(cond_lens) < 0 or min(x_lens) < 0:
            raise ValueError(f"negative row count in cond_lens {cond_lens} or x_lens {x_lens}")
        split = sum(cond_lens)
        cond_starts = [0, *accumulate(cond_lens)][:-1]
        x_starts = [split + start for start in [0, *accumulate(x_lens)][:-1]]
        table = torch.tensor(list(zip(cond_lens, x_lens, cond_starts, x_starts, strict=True)), dtype=torch.int32)
        stream_rows = torch.cat(
            [
                torch.cat([torch.arange(c, c + cl), torch.arange(x, x + xl)])
                for cl, xl, c, x in zip(cond_lens, x_lens, cond_starts, x_starts, strict=True)
            ]
        )
        branch_rows = torch.empty(len(stream_rows), dtype=torch.int32)
        branch_rows[stream_rows] = torch.arange(len(stream_rows), dtype=torch.int32)
        return cls(cond_lens, x_lens, table.to(device), branch_rows.to(device))

    @property
    def split(self) -> int:
        """Rows of the cond stream, and so the first row of the x stream."""
        return sum(self.cond_lens)

    @property
    def rows(self) -> int:
        """Rows of both streams."""
        return sum(self.cond_lens) + sum(self.x_lens)
