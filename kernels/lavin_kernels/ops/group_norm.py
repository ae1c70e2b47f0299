"""GroupNorm and SiLU of the video autoencoder on channels-last tensors, and the group statistics of both its norms.

Two readings and one writing of the tensor in all: moments of every channel over a chunk of pixels, their combination
to groups (a few hundred kilobytes), then normalisation, affine map and SiLU.
"""

import torch
import triton
import triton.language as tl

from lavin_kernels import tuning, validate
from lavin_kernels.launch import operator, row_case, wrap_triton
from lavin_kernels.reference import vae as reference_vae
from lavin_kernels.static_case import StaticCase

# `programs` of the moments is how many chunks an item is cut into: best as many as are resident at once, since a second
# wave of few is slow. In the other kernel a program takes up to `tiles` tiles once there are that many programs.
CANDIDATES = {
    "channel_moments": [
        {"tile": tile, "num_warps": num_warps, "programs": programs}
        for tile, num_warps in [(2048, 4), (4096, 4), (4096, 8), (8192, 8)]
        for programs in (256, 512, 1024)
    ],
    "group_norm_silu": [
        {"tile": tile, "num_warps": num_warps, "tiles": tiles, "programs": 2048}
        for tile, num_warps in [(1024, 4), (2048, 4), (4096, 4), (4096, 8)]
        for tiles in (1, 4, 8)
    ],
}

# Wider tensors are cut into blocks of channels, so that a tile keeps several pixels.
_MOST_CHANNELS = 512
# The combination is one wait for memory where a group's moments fit one tile: chunks, and elements for its warps.
_COMBINED_CHUNKS, _COMBINED_ELEMENTS, _COMBINED_WARPS = 512, 8192, 8


@triton.jit(do_not_specialize=["pixels", "chunk_pixels", "chunks"])
def _channel_moments_kernel(
    x_ptr,  # [N, pixels, C]
    moments_ptr,  # [N, chunks, 2, C] float32: mean, sum of squared distances from it
    pixels,
    chunk_pixels,
    chunks,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    part = (tl.program_id(0) // blocks).to(tl.int64)
    channels = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = (part % chunks * chunk_pixels).to(tl.int32)
    count = tl.minimum(chunk_pixels, pixels - first)
    x_ptr += (part // chunks * pixels + first) * C
    rows = tl.arange(0, BLOCK_P)

    # Welford's recurrence in every lane for itself. A difference of two sums of squares would lose all digits of a
    # variance that is 1e-8 of the squared mean; and so nothing passes between lanes until the end.
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, count, BLOCK_P, loop_unroll_factor=2):
        inside = (start + rows < count)[:, None]
        offsets = (start + rows)[:, None] * C + channels[None, :]
        x = tl.load(x_ptr + offsets, mask=inside & (channels < C)[None, :], other=0.0).to(tl.float32)
        distance = tl.where(inside, x - mean, 0.0)
        mean += distance * (1.0 / (start // BLOCK_P + 1))
        squares += distance * (x - mean)

    # Chan's combination of the lanes, about the first pixel, so that sums are of small differences.
    pivot = tl.load(x_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    counts = ((count - rows + BLOCK_P - 1) // BLOCK_P).to(tl.float32)[:, None]
    of_chunk = pivot + tl.sum(counts * (mean - pivot[None, :]), 0) / count
    distance = mean - of_chunk[None, :]
    moments_ptr += part * 2 * C + channels
    tl.store(moments_ptr, of_chunk, mask=channels < C)
    tl.store(moments_ptr + C, tl.sum(squares + counts * distance * distance, 0), mask=channels < C)


@triton.jit(do_not_specialize=["pixels", "chunk_pixels", "chunks"])
def _group_moments_kernel(
    moments_ptr,  # [N, chunks, 2, C] float32
    weight_ptr,  # [C]
    coefficients_ptr,  # [N, 2, C] float32: mean, weight / deviation
    pixels,
    chunk_pixels,
    chunks,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    WIDTH: tl.constexpr = C // GROUPS
    item = (tl.program_id(0) // GROUPS).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    channels = tl.program_id(0) % GROUPS * WIDTH + columns
    rows = tl.arange(0, BLOCK_ROWS)
    moments_ptr += item * chunks * 2 * C
    pivot = tl.load(moments_ptr + tl.program_id(0) % GROUPS * WIDTH)

    total = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in range(0, chunks, BLOCK_ROWS):
        chunk = (start + rows)[:, None]
        mask = (chunk < chunks) & (columns < WIDTH)[None, :]
        mean = tl.load(moments_ptr + chunk * (2 * C) + channels[None, :], mask=mask, other=pivot)
        total += tl.minimum(chunk_pixels, pixels - chunk * chunk_pixels).to(tl.float32) * (mean - pivot)
    size = pixels.to(tl.float32) * WIDTH
    of_group = pivot + tl.sum(total) / size

    squares = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in range(0, chunks, BLOCK_ROWS):
        chunk = (start + rows)[:, None]
        mask = (chunk < chunks) & (columns < WIDTH)[None, :]
        offsets = chunk * (2 * C) + channels[None, :]
        distance = tl.load(moments_ptr + offsets, mask=mask, other=of_group) - of_group
        within = tl.load(moments_ptr + C + offsets, mask=mask, other=0.0)
        count = tl.minimum(chunk_pixels, pixels - chunk * chunk_pixels).to(tl.float32)
        squares += within + count * distance * distance
    inverse = tl.rsqrt(tl.sum(squares) / size + eps)

    weight = tl.load(weight_ptr + channels, mask=columns < WIDTH, other=0.0).to(tl.float32)
    coefficients_ptr += item * 2 * C + channels
    tl.store(coefficients_ptr, of_group, mask=columns < WIDTH)
    tl.store(coefficients_ptr + C, inverse * weight, mask=columns < WIDTH)


@triton.jit
def silu(x, dtype: tl.constexpr):
    if dtype == tl.float32:
        return x * tl.sigmoid(x)
    # At 2 + 2 bytes an element an H200 has time for 27 instructions. The guarded division and exponential of tl.sigmoid
    # take 13 of them, these 6, with an error of 2e-7, far below that of a 16-bit result.
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return x * root * root


@triton.jit(do_not_specialize=["pixels", "chunk_pixels", "chunks"])
def _group_norm_silu_kernel(
    x_ptr,  # [N, pixels, C]
    coefficients_ptr,  # [N, 2, C] float32: mean, weight / deviation
    bias_ptr,  # [C]
    out_ptr,  # [N, pixels, C]
    pixels,
    chunk_pixels,
    chunks,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    # From the end: what the statistics read last may still be in the L2.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    item = (program // blocks // chunks).to(tl.int64)
    channels = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = program // blocks % chunks * chunk_pixels
    count = tl.minimum(chunk_pixels, pixels - first)
    base = (item * pixels + first) * C
    rows = tl.arange(0, BLOCK_P)[:, None]
    # Of the tile's full shape from the start, though every row is alike: so nothing is exchanged between lanes.
    channels = tl.broadcast_to(channels[None, :], [BLOCK_P, BLOCK_C])
    coefficients_ptr += item * 2 * C + channels
    mean = tl.load(coefficients_ptr, mask=channels < C, other=0.0)
    factor = tl.load(coefficients_ptr + C, mask=channels < C, other=0.0)
    bias = tl.load(bias_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    for start in tl.range(0, count, BLOCK_P):
        mask = (start + rows < count) & (channels < C)
        offsets = (start + rows) * C + channels
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(out_ptr + base + offsets, silu((x - mean) * factor + bias, out_ptr.dtype.element_ty), mask=mask)


def channel_tile(channels: int, elements: int) -> dict[str, int]:
    """Compile-time sizes of a tile of about `elements`: the tensor's width, then pixels and channels of the tile."""
    block = min(triton.next_power_of_2(channels), _MOST_CHANNELS)
    return {"C": channels, "BLOCK_P": max(1, elements // block), "BLOCK_C": block}


def group_coefficients(x: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """Launches the statistics of `x`, `[N, C, T, H, W]`; returns the mean and weight / deviation of every channel.

    `[N, 2, C]` float32. An item is cut alike whatever else is in the batch, so that its result does not depend on that.
    """
    items, channels = x.shape[:2]
    pixels = x.shape[2] * x.shape[3] * x.shape[4]
    launch = tuning.config("channel_moments", x.device, x.dtype)
    tile = channel_tile(channels, launch["tile"])
    chunk = triton.cdiv(pixels, launch["programs"] * tile["BLOCK_P"]) * tile["BLOCK_P"]
    chunks = triton.cdiv(pixels, chunk)
    moments = x.new_empty((items, chunks, 2, channels), dtype=torch.float32)
    wrap_triton(_channel_moments_kernel)[(items * chunks * triton.cdiv(channels, tile["BLOCK_C"]),)](
        x, moments, pixels, chunk, chunks, **tile, num_warps=launch["num_warps"]
    )
    coefficients = x.new_empty((items, 2, channels), dtype=torch.float32)
    wrap_triton(_group_moments_kernel)[(items * groups,)](
        *(moments, weight, coefficients, pixels, chunk, chunks, eps),
        **_group_tile(channels, groups),
        num_warps=_COMBINED_WARPS,
    )
    return coefficients


def _group_tile(channels: int, groups: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels // groups)
    rows = max(1, min(_COMBINED_CHUNKS, _COMBINED_ELEMENTS // block))
    return {"C": channels, "GROUPS": groups, "BLOCK_ROWS": rows, "BLOCK_C": block}


@operator("group_norm_silu", reference_vae.group_norm_silu)
def _group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> torch.Tensor:
    coefficients = group_coefficients(x, weight, groups, eps)
    out = torch.empty_like(x)
    pixels = x.shape[2] * x.shape[3] * x.shape[4]
    launch = tuning.config("group_norm_silu", x.device, x.dtype)
    tile = channel_tile(x.shape[1], launch["tile"])
    blocks = x.shape[0] * triton.cdiv(x.shape[1], tile["BLOCK_C"])
    tiles = blocks * triton.cdiv(pixels, tile["BLOCK_P"])
    chunk = tile["BLOCK_P"] * max(1, min(launch["tiles"], tiles // launch["programs"]))
    chunks = triton.cdiv(pixels, chunk)
    wrap_triton(_group_norm_silu_kernel)[(blocks * chunks,)](
        x, coefficients, bias, out, pixels, chunk, chunks, **tile, num_warps=launch["num_warps"]
    )
    return out


def check_volume(name: str, value: torch.Tensor) -> None:
    """Checks a channels-last tensor, `[N, C, frames, rows, columns]`.

    Raises:
        TypeError: no tensor, or a dtype that the kernels (on a CPU: the references) do not take.
        ValueError: rank, an empty size, device or memory format.
    """
    if isinstance(value, torch.Tensor):
        if value.dim() != 5 or any(size < 1 for size in value.shape):
            raise ValueError(
                f"{name} has shape {list(value.shape)}; expected [N, C, frames, rows, columns], at least one of each"
            )
        if not value.is_contiguous(memory_format=torch.channels_last_3d):
            raise ValueError(
                f"{name} has strides {list(value.stride())}; expected channels-last memory, "
                "as .contiguous(memory_format=torch.channels_last_3d) gives"
            )
        value = value.permute(0, 2, 3, 4, 1)
    validate.rows(name, value, (None,) * 5)


def check_affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> None:
    """Checks what a group norm of the valid tensor `x` is given.

    Raises:
        TypeError: a weight or bias that is no tensor or neither of the dtype of `x` nor float32, or `groups` no int.
        ValueError: their sizes or device, or a number of groups that does not divide the channels.
    """
    channels = x.shape[1]
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups is of type {type(groups).__name__}; expected an int")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}; expected a divisor of {channels}, the channels of x")
    for name, value in (("weight", weight), ("bias", bias)):
        validate.tensor(name, value, (channels,), sorted({x.dtype, torch.float32}, key=str), x.device)


def static_cases(capability: int) -> list[StaticCase]:
    """The three launches at the encoder's widths, for one picture of 512 x 512, in 32 groups."""
    cases = []
    for channels, side in ((128, 512), (256, 256), (512, 64)):
        for dtype in (torch.bfloat16, torch.float32):
            size = side * side * channels * dtype.itemsize
            launch = tuning.default_config("channel_moments", capability, dtype)
            tile = channel_tile(channels, launch["tile"])
            # An item's moments are written by the first launch and read twice by the second.
            moments = 8 * channels * min(launch["programs"], triton.cdiv(side * side, tile["BLOCK_P"]))
            cases += [
                static_case(_channel_moments_kernel, dtype, tile, launch["num_warps"], size + moments),
                static_case(_group_moments_kernel, dtype, _group_tile(channels, 32), _COMBINED_WARPS, moments),
            ]
            launch = tuning.default_config("group_norm_silu", capability, dtype)
            tile = channel_tile(channels, launch["tile"])
            cases.append(static_case(_group_norm_silu_kernel, dtype, tile, launch["num_warps"], 2 * size))
    return cases


def static_case(
    kernel: triton.JITFunction, dtype: torch.dtype, tile: dict[str, int], num_warps: int, size: int
) -> StaticCase:
    """A launch on a tensor of `dtype` that moves `size` bytes; statistics are float32."""
    name = f"{kernel.fn.__name__.removeprefix('_').removesuffix('_kernel')}/{tile['C']}"
    types = dict.fromkeys(("moments_ptr", "coefficients_ptr"), "*fp32")
    return row_case(name, kernel, dtype, tile, num_warps, size, types)


def group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float = 1e-6
) -> torch.Tensor:
    """`silu(group_norm(x))`, the statistics of a group over its channels, all frames, rows and columns.

    Computed in float32 and rounded once. The result of an item does not depend on the others in the batch, bit by bit,
    and is the same in every run. On a CPU the reference runs instead.

    Args:
        x: `[N, C, T, H, W]` in `torch.channels_last_3d` memory; bfloat16, float16 or float32 (float64 on a CPU).
        weight, bias: `[C]` in the dtype of `x` or float32.
        groups: divides C.
        eps: added to the variances.

    Returns:
        `[N, C, T, H, W]` in the dtype and the memory of `x`.

    Raises:
        TypeError: an argument is no tensor or has a dtype that is not listed, or `groups` is no int.
        ValueError: rank, an empty size, device, another memory format, or a number of groups that does not divide C.
    """
    check_volume("x", x)
    check_affine(x, weight, bias, groups)
    return _group_norm_silu(x, weight, bias, groups, eps)
