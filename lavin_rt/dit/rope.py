"""3D rotary positions of the joint sequence (LaVin-DiT, arXiv 2411.11505, section 3.3)."""

from __future__ import annotations

import torch

BASE = 10000.0


def rotary_tables(
    positions: int, head_size: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of `p * 10000 ** (-2 j / (head_size / 3))`, the same table for frames, rows and columns.

    Args:
        positions: number of positions p, from 0.
        head_size: divisible by 6; a third of it belongs to each of (frame, row, column).

    Returns:
        cos and sin, `[positions, head_size / 6]` float32, of the angles in float64.
    """
    width = head_size // 3
    frequencies = BASE ** (torch.arange(0, width, 2, dtype=torch.float64, device=device) / -width)
    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def grid_positions(frames: int, height: int, width: int, first_frame: int = 0) -> torch.Tensor:
    """(frame, row, column) of every token in order, `[frames * height * width, 3]` int32."""
    axes = torch.arange(first_frame, first_frame + frames), torch.arange(height), torch.arange(width)
    return torch.cartesian_prod(*axes).view(-1, 3).int()


def token_angles(
    frames: int, height: int, width: int, head_size: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine for every token of a clip of `frames x height x width` tokens.

    Returns:
        cos and sin, `[frames * height * width, 3, head_size / 6]` float32.
    """

    def of_axes(tables: list[torch.Tensor]) -> torch.Tensor:
        shape = (frames, height, width, head_size // 6)
        of_frame, of_row, of_column = tables
        axes = of_frame[:, None, None], of_row[:, None], of_column
        return torch.stack([axis.expand(shape) for axis in axes], dim=-2).flatten(0, 2)

    pairs = [rotary_tables(size, head_size, device) for size in (frames, height, width)]
    return of_axes([cos for cos, _ in pairs]), of_axes([sin for _, sin in pairs])
