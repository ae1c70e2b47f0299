"""What a user is told of shapes and the memory that they need."""

from __future__ import annotations

import dataclasses

from lavin_rt.dit.layout import Shape
from lavin_rt.sampling.denoisers import Denoiser


def what_fits(network: Denoiser, shape: Shape, memory: int) -> str:
    """Names what so many bytes allow instead of a shape, always something smaller."""
    memory = min(memory, network.workspace(shape) - 1)
    for queries in range(shape.queries - 1, 0, -1):
        if network.workspace(dataclasses.replace(shape, queries=queries)) <= memory:
            return f"batch size {queries} would fit"
    short = min(shape.height, shape.width)
    for side in range(short - 2, 0, -2):
        height, width = (max(2, edge * side // short // 2 * 2) for edge in (shape.height, shape.width))
        smaller = dataclasses.replace(shape, queries=1, height=height, width=width)
        if network.workspace(smaller) <= memory:
            return f"one query at size {8 * height}x{8 * width} would fit"
    return "free some, or run on another device"


def describe(shape: Shape) -> str:
    """A shape in a user's words."""
    pairs = (shape.cond_frames - shape.query_frames) // (2 * shape.query_frames)
    queries = "1 query" if shape.queries == 1 else f"{shape.queries} queries at once"
    return f"{queries} at {8 * shape.height}x{8 * shape.width} with {pairs} pair{'s' * (pairs != 1)}"
