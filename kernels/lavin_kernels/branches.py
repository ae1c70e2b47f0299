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

    A branch may attend to more rows than there are: with `kept_lens[b]`, keys and values of that many rows of branch b
    were kept from an earlier step, and its rows here are the last of the branch. Keys and values then lie in a third
    order, branch-contiguous with the kept rows first: `[kept of 0 | cond of 0 | x of 0 | kept of 1 | ...]`.

    The lengths are kept on the host, where references slice by them, and as two int32 tables on the device, which the
    kernels read, so that no launch waits for the device and no length is compiled into a kernel.

    Attributes:
        table: `[branches, 4]` int32: cond rows, x rows, first cond row, first x row, both in stream-major order; with
            kept rows `[branches, 5]`, their number last.
        branch_rows: `[rows]` int32: for every stream-major row, its branch-contiguous place.
        kept_lens: rows of every branch whose keys and values are kept, none if empty.
        key_rows: `[rows]` int32: for every stream-major row, the place of its keys and values; None where they lie as
            `branch_rows` has it.
    """

    cond_lens: tuple[int, ...]
    x_lens: tuple[int, ...]
    table: torch.Tensor
    branch_rows: torch.Tensor
    kept_lens: tuple[int, ...] = ()
    key_rows: torch.Tensor | None = None

    @classmethod
    def make(
        cls,
        cond_lens: Sequence[int],
        x_lens: Sequence[int],
        device: torch.device | str = "cpu",
        kept_lens: Sequence[int] = (),
    ) -> Branches:
        """Builds the tables.

        Raises:
            ValueError: no branches, lists of different lengths, or a negative length.
        """
        cond_lens, x_lens, kept_lens = tuple(cond_lens), tuple(x_lens), tuple(kept_lens)
        if not cond_lens or len(cond_lens) != len(x_lens):
            raise ValueError(
                f"cond_lens has {len(cond_lens)} branches and x_lens {len(x_lens)}; expected the same, >= 1"
            )
        if min(cond_lens) < 0 or min(x_lens) < 0:
            raise ValueError(f"negative row count in cond_lens {cond_lens} or x_lens {x_lens}")
        if kept_lens and (len(kept_lens) != len(cond_lens) or min(kept_lens) < 0):
            raise ValueError(f"kept_lens is {kept_lens}; expected {len(cond_lens)} row counts, none negative")
        split = sum(cond_lens)
        cond_starts = [0, *accumulate(cond_lens)][:-1]
        x_starts = [split + start for start in [0, *accumulate(x_lens)][:-1]]
        columns = (cond_lens, x_lens, cond_starts, x_starts, *([kept_lens] if kept_lens else []))
        table = torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int32)
        stream_rows = torch.cat(
            [
                torch.cat([torch.arange(c, c + cl), torch.arange(x, x + xl)])
                for cl, xl, c, x in zip(cond_lens, x_lens, cond_starts, x_starts, strict=True)
            ]
        )
        branch_rows = torch.empty(len(stream_rows), dtype=torch.int32)
        branch_rows[stream_rows] = torch.arange(len(stream_rows), dtype=torch.int32)
        if not kept_lens:
            return cls(cond_lens, x_lens, table.to(device), branch_rows.to(device))
        # A row lies behind the kept rows of its own branch and of those before it.
        lens = torch.tensor([cond + x for cond, x in zip(cond_lens, x_lens, strict=True)])
        shifts = torch.tensor(kept_lens, dtype=torch.int32).cumsum(0, dtype=torch.int32).repeat_interleave(lens)
        key_rows = branch_rows + shifts[branch_rows]
        return cls(cond_lens, x_lens, table.to(device), branch_rows.to(device), kept_lens, key_rows.to(device))

    @property
    def split(self) -> int:
        """Rows of the cond stream, and so the first row of the x stream."""
        return sum(self.cond_lens)

    @property
    def rows(self) -> int:
        """Rows of both streams."""
        return sum(self.cond_lens) + sum(self.x_lens)

    @property
    def keys(self) -> int:
        """Rows of keys and values, the kept ones included."""
        return self.rows + sum(self.kept_lens)

    @property
    def key_lens(self) -> tuple[int, ...]:
        """Rows of keys and values of every branch."""
        kept_lens = self.kept_lens or (0,) * len(self.cond_lens)
        return tuple(map(sum, zip(kept_lens, self.cond_lens, self.x_lens, strict=True)))
