"""The decoder's GroupNorm conditioned on the latent, and SiLU, on channels-last tensors."""

import torch
import triton
import triton.language as tl

from lavin_kernels import tuning, validate
from lavin_kernels.launch import operator, wrap_triton
from lavin_kernels.ops.group_norm import channel_tile, check_affine, check_volume, group_coefficients, silu, static_case
from lavin_kernels.reference import vae as reference_vae
from lavin_kernels.reference.vae import frame_source, pixel_source
from lavin_kernels.static_case import StaticCase

# `run` is how many pixels of a row of a cell (the pixels that read one latent element) stand in a tile. Once there are
# `programs` programs, each takes up to `rows` rows of its cells, so that it loads their latent less often.
CANDIDATES = {
    "spatial_norm_silu": [
        {"tile": tile, "num_warps": num_warps, "run": run, "rows": rows, "programs": 2048}
        for tile, num_warps in [(1024, 4), (2048, 4), (4096, 4), (4096, 8)]
        for run in (1, 8)
        for rows in (2, 4, 8)
    ],
}


@triton.jit(
    do_not_specialize=[
        "frames",
        "latent_frames",
        "frame_ratio",
        "lead",
        "latent_rows",
        "row_ratio",
        "latent_columns",
        "column_ratio",
        "band",
    ]
)
def _spatial_norm_silu_kernel(
    x_ptr,  # [N, frames, rows, columns, C]
    coefficients_ptr,  # [N, 2, C] float32: mean, weight / deviation
    bias_ptr,  # [C]
    conv_y_ptr,  # [N, latent frames, latent rows, latent columns, C]
    conv_b_ptr,
    out_ptr,  # [N, frames, rows, columns, C]
    frames,
    latent_frames,
    frame_ratio,
    lead,
    latent_rows,
    row_ratio,
    latent_columns,
    column_ratio,
    band,
    C: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A cell is the `row_ratio` x `column_ratio` pixels of a frame that read one latent element. A program takes a block
    # of cells side by side and `band` of their rows: it loads their latent once, and no pixel asks which is its own.
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    bands = tl.cdiv(row_ratio, band)
    # From the end: what the statistics read last may still be in the L2.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row_band = tl.num_programs(1) - 1 - tl.program_id(1)
    image = tl.num_programs(2) - 1 - tl.program_id(2)
    cells = (block // blocks * BLOCK_P + tl.arange(0, BLOCK_P))[:, None, None]
    run = tl.arange(0, RUN)[None, :, None]
    channels = (block % blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, None, :]
    item = (image // frames).to(tl.int64)
    frame = image % frames
    latent_row = row_band // bands
    row = row_band % bands * band
    rows = tl.minimum(band, row_ratio - row)

    # All at the tile's full shape from the start, though much of it is alike: nothing is exchanged between lanes.
    channels = tl.broadcast_to(channels, [BLOCK_P, RUN, BLOCK_C])
    mask = (cells < latent_columns) & (channels < C)
    latent = item * latent_frames + (frame + lead) // frame_ratio
    latent = (latent * latent_rows + latent_row) * latent_columns * C
    offsets = cells * C + channels
    conv_y = tl.load(conv_y_ptr + latent + offsets, mask=mask, other=0.0).to(tl.float32)
    conv_b = tl.load(conv_b_ptr + latent + offsets, mask=mask, other=0.0).to(tl.float32)
    coefficients_ptr += item * 2 * C + channels
    mean = tl.load(coefficients_ptr, mask=channels < C, other=0.0)
    scale = tl.load(coefficients_ptr + C, mask=channels < C, other=0.0) * conv_y
    shift = tl.load(bias_ptr + channels, mask=channels < C, other=0.0).to(tl.float32) * conv_y + conv_b

    columns = latent_columns * column_ratio
    row += ((item * frames + frame) * latent_rows + latent_row) * row_ratio
    column = 0
    offsets = (cells * column_ratio + run) * C + channels
    for _ in tl.range(0, rows * (column_ratio // RUN), loop_unroll_factor=2):
        base = (row * columns + column) * C
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        result = silu((x - mean) * scale + shift, out_ptr.dtype.element_ty)
        tl.store(out_ptr + base + offsets, result, mask=mask)
        column += RUN
        row += (column == column_ratio).to(tl.int64)
        column = tl.where(column == column_ratio, 0, column)


@operator("spatial_norm_silu", reference_vae.spatial_norm_silu)
def _spatial_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    conv_y: torch.Tensor,
    conv_b: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    items, channels, frames, rows, columns = x.shape
    latent_frames, latent_rows, latent_columns = conv_y.shape[2:]
    frame_ratio, lead = frame_source(frames, latent_frames)
    row_ratio, column_ratio = pixel_source(rows, latent_rows), pixel_source(columns, latent_columns)
    coefficients = group_coefficients(x, weight, groups, eps)
    out = torch.empty_like(x)
    launch = tuning.config("spatial_norm_silu", x.device, x.dtype)
    tile = _cell_tile(channels, column_ratio, launch)
    cell_blocks = triton.cdiv(latent_columns, tile["BLOCK_P"]) * triton.cdiv(channels, tile["BLOCK_C"])
    programs = cell_blocks * items * frames * rows
    band = max(1, min(row_ratio, launch["rows"], programs // launch["programs"]))
    grid = (cell_blocks, latent_rows * triton.cdiv(row_ratio, band), items * frames)
    wrap_triton(_spatial_norm_silu_kernel)[grid](
        *(x, coefficients, bias, conv_y, conv_b, out),
        *(frames, latent_frames, frame_ratio, lead),
        *(latent_rows, row_ratio, latent_columns, column_ratio, band),
        **tile,
        num_warps=launch["num_warps"],
    )
    return out


def _cell_tile(channels: int, column_ratio: int, launch: tuning.Launch) -> dict[str, int]:
    """`channel_tile` with its pixels cut into runs, the longest allowed power of two that divides a cell's columns."""
    run = next(length for length in (16, 8, 4, 2, 1) if length <= launch["run"] and column_ratio % length == 0)
    tile = channel_tile(channels, launch["tile"])
    return {**tile, "RUN": run, "BLOCK_P": max(1, tile["BLOCK_P"] // run)}


def static_cases(capability: int) -> list[StaticCase]:
    """The launch at the decoder's widths, for one picture of 512 x 512 and its latent of 64 x 64."""
    cases = []
    for channels, side in ((128, 512), (256, 256), (512, 64)):
        for dtype in (torch.bfloat16, torch.float32):
            launch = tuning.default_config("spatial_norm_silu", capability, dtype)
            size = (2 * side * side + 2 * 64 * 64) * channels * dtype.itemsize
            tile = _cell_tile(channels, side // 64, launch)
            cases.append(static_case(_spatial_norm_silu_kernel, dtype, tile, launch["num_warps"], size))
    return cases


def spatial_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    conv_y: torch.Tensor,
    conv_b: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`silu(group_norm(x) * up(conv_y) + up(conv_b))`, the decoder's norm (LaVin-DiT, arXiv 2411.11505, section 3.2).

    `up` is nearest upsampling to the size of `x`, the first frame apart where their number is odd and above one;
    nothing of that size is made of the latent. Computed in float32 and rounded once. The result of an item does not
    depend on the others in the batch, bit by bit, and is the same in every run. On a CPU the reference runs instead.

    Args:
        x: `[N, C, T, H, W]` in `torch.channels_last_3d` memory; bfloat16, float16 or float32 (float64 on a CPU).
        weight, bias: `[C]` of the group norm, in the dtype of `x` or float32.
        groups: divides C.
        conv_y, conv_b: `[N, C, t, h, w]`, the latent after its two convolutions, in the dtype and memory format of `x`.
        eps: added to the variances.

    Returns:
        `[N, C, T, H, W]` in the dtype and the memory of `x`.

    Raises:
        TypeError: an argument is no tensor or has a dtype that is not listed, or `groups` is no int.
        ValueError: rank, sizes that do not belong together, device, another memory format, or a number of groups that
            does not divide C.
    """
    check_volume("x", x)
    check_affine(x, weight, bias, groups)
    for name, value in (("conv_y", conv_y), ("conv_b", conv_b)):
        check_volume(name, value)
        validate.alike(name, value, "x", x)
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}; expected {x.device}, where x is")
        if value.shape[:2] != x.shape[:2]:
            shape = f"[{x.shape[0]}, {x.shape[1]}, t, h, w]"
            raise ValueError(f"{name} has shape {list(value.shape)}; expected {shape}, as x has")
    if conv_y.shape != conv_b.shape:
        raise ValueError(f"conv_b has shape {list(conv_b.shape)}; expected {list(conv_y.shape)}, as conv_y has")
    frame_source(x.shape[2], conv_y.shape[2])
    pixel_source(x.shape[3], conv_y.shape[3])
    pixel_source(x.shape[4], conv_y.shape[4])
    return _spatial_norm_silu(x, weight, bias, groups, conv_y, conv_b, eps)
