"""Cutting large pictures and long clips into overlapping pieces, so that an autoencoder's memory stays bounded.

The pieces are not exact: group norms see a piece's statistics and convolutions its edges. What `lavin_rt` does with
them is said where they are asked for; nothing here decides to cut.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch

from lavin_rt.errors import InputError
from lavin_rt.scalars import whole

FRAMES, PIXELS = 4, 8  # per latent frame after the first, per latent row and column
OVERLAP = 4  # neighbouring pieces share a 1 / OVERLAP of their length
LEAST_TILE, LEAST_CHUNK = 4, 3
AUTO_TILE, AUTO_LIMIT = 64, 128  # latents: 512 px tiles for pictures of more than 1024 px a side


@dataclasses.dataclass(frozen=True)
class Span:
    """One interval of an axis: what is read, what is written, and the weights `[written]` of the blend."""

    source: slice
    target: slice
    weights: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Axis:
    """The pieces of one axis, and the length of what they write together."""

    pieces: list[Span]
    length: int


def auto_tile(height: int, width: int) -> int | None:
    """A tile in latents for pictures of so many pixels, None (no tiles) up to 1024 by 1024.

    There the released decoder's activations take 1.6 GB in bfloat16 with the plain operators.
    """
    return AUTO_TILE if max(height, width) > AUTO_LIMIT * PIXELS else None


def intervals(length: int, size: int, least_overlap: int) -> list[tuple[int, int]]:
    """Intervals of `size` that cover `0..length`, the last moved back to fit.

    Neighbours share at least `size // OVERLAP`, and `least_overlap`.
    """
    if size >= length:
        return [(0, length)]
    step = size - max(size // OVERLAP, least_overlap)
    starts = [*range(0, length - size, step), length - size]
    return [(start, start + size) for start in starts]


def blend_weights(targets: Sequence[slice], unused: int) -> list[torch.Tensor]:
    """Weights of every target, which sum to one everywhere: linear ramps where it overlaps its neighbours.

    Args:
        targets: intervals that cover `0..targets[-1].stop`, neighbours overlapping by more than `unused`.
        unused: so many first elements of every target but the first get no weight.
    """
    total = torch.zeros(targets[-1].stop, dtype=torch.float32)
    ramps = []
    for number, target in enumerate(targets):
        size = target.stop - target.start
        ramp = torch.ones(size, dtype=torch.float32)
        if number:
            rising = targets[number - 1].stop - target.start - unused
            ramp = torch.minimum(ramp, ((torch.arange(size, dtype=torch.float32) - unused + 0.5) / rising).clamp(min=0))
        if number + 1 < len(targets):
            falling = target.stop - targets[number + 1].start - unused
            ramp = torch.minimum(ramp, (size - torch.arange(size, dtype=torch.float32) - 0.5) / falling)
        total[target] += ramp
        ramps.append(ramp)
    return [ramp / total[target] for ramp, target in zip(ramps, targets, strict=True)]


def make_axis(
    latents: int,
    size: int | None,
    source: Callable[[int, int], slice],
    target: Callable[[int, int], slice],
    time: bool = False,
) -> Axis:
    """The pieces of an axis of so many latents.

    Args:
        latents: length of the axis.
        size: of a piece, in latents; None does not cut.
        source, target: what a piece of latents `start..stop` reads and writes.
        time: the axis is time; of a piece that starts later than the clip, the first frame is not used.
    """
    cut = intervals(latents, size or latents, least_overlap=2 if time else 1)
    targets = [target(*interval) for interval in cut]
    weights = blend_weights(targets, unused=1 if time else 0)
    pieces = [Span(source(*i), t, w) for i, t, w in zip(cut, targets, weights, strict=True)]
    return Axis(pieces, targets[-1].stop)


def as_latents(start: int, stop: int) -> slice:
    return slice(start, stop)


def as_pixels(start: int, stop: int) -> slice:
    return slice(PIXELS * start, PIXELS * stop)


def as_frames(start: int, stop: int) -> slice:
    """A piece is a clip of its own; its first latent frame has one frame, the last of the four it has in the whole."""
    return slice(FRAMES * start, FRAMES * (stop - 1) + 1)


def checked(tile: int | str | None, chunk: int | None, rows: int, columns: int) -> tuple[int | None, int | None]:
    """`tile` and `chunk` in latents, "auto" resolved for a picture of so many latent rows and columns."""
    if isinstance(tile, str) and tile == "auto":
        tile = auto_tile(rows * PIXELS, columns * PIXELS)
    if tile is not None and (whole(tile) or 0) < LEAST_TILE:
        raise InputError(f"tile is {tile!r}, expected 'auto' or a number of latents, at least {LEAST_TILE}")
    if chunk is not None and (whole(chunk) or 0) < LEAST_CHUNK:
        raise InputError(f"chunk is {chunk!r}, expected a number of latent frames, at least {LEAST_CHUNK}")
    return whole(tile), whole(chunk)


def decode_axes(shape: Sequence[int], tile: int | str | None, chunk: int | None) -> list[Axis] | None:
    """The cut of latents `[N, C, t, h, w]` of that shape for `blended`; None where one piece covers everything.

    Raises:
        InputError: a tile or chunk below the least.
    """
    frames, rows, columns = shape[2:]
    tile, chunk = checked(tile, chunk, rows, columns)
    if (chunk or frames) >= frames and (tile or rows) >= rows and (tile or columns) >= columns:
        return None
    return [
        make_axis(frames, chunk, as_latents, as_frames, time=True),
        make_axis(rows, tile, as_latents, as_pixels),
        make_axis(columns, tile, as_latents, as_pixels),
    ]


def encode_axes(shape: Sequence[int], tile: int | str | None, chunk: int | None) -> list[Axis] | None:
    """The cut of pixels `[N, C, T, H, W]` of that shape for `blended`; None where one piece covers everything.

    Raises:
        InputError: a tile or chunk below the least, or pixels that cannot be cut so.
    """
    frames, rows, columns = shape[2:]
    latent_frames, latent_rows, latent_columns = (frames - 1) // FRAMES + 1, rows // PIXELS, columns // PIXELS
    tile, chunk = checked(tile, chunk, latent_rows, latent_columns)
    if (chunk or frames) >= latent_frames and (tile or rows) >= latent_rows and (tile or columns) >= latent_columns:
        return None
    if rows % PIXELS or columns % PIXELS or frames % FRAMES != 1:
        raise InputError(
            f"pieces cannot be cut from {frames} frames of {rows}x{columns} pixels; "
            f"expected 1 + {FRAMES} k frames of multiples of {PIXELS}, or no tile and no chunk"
        )
    return [
        make_axis(latent_frames, chunk, as_frames, as_latents, time=True),
        make_axis(latent_rows, tile, as_pixels, as_latents),
        make_axis(latent_columns, tile, as_pixels, as_latents),
    ]


def blended(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, axes: list[Axis]) -> torch.Tensor:
    """`function` of every piece of `x`, put together with the pieces' weights, which are summed in float32.

    Args:
        function: maps a piece `[N, C, ...]` to `[N, C', ...]`, its three last sizes those of the targets.
        x: `[N, C, ., ., .]`.
        axes: three, for the last three dimensions.

    Returns:
        `[N, C', ., ., .]` in the dtype of what `function` returns.
    """
    total: torch.Tensor | None = None
    for pieces in itertools.product(*(axis.pieces for axis in axes)):
        result = function(x[:, :, pieces[0].source, pieces[1].source, pieces[2].source])
        if total is None:
            shape = (*result.shape[:2], *(axis.length for axis in axes))
            total = torch.zeros(shape, dtype=torch.float32, device=result.device)
        frames, rows, columns = (piece.weights.to(result.device) for piece in pieces)
        weighted = result.float() * frames[:, None, None] * rows[:, None] * columns
        total[:, :, pieces[0].target, pieces[1].target, pieces[2].target] += weighted
    assert total is not None  # every axis has a piece
    return total.to(result.dtype)
