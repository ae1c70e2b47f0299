"""RMSNorm and 3D rotary positions of queries and keys, and the change to branch-contiguous order, in one launch."""

import torch
import triton
import triton.language as tl

from lavin_kernels import tuning, validate
from lavin_kernels.branches import Branches
from lavin_kernels.launch import operator, pieces, row_case, row_warps, runs_kernel, wrap_triton
from lavin_kernels.reference import dit as reference
from lavin_kernels.static_case import StaticCase

# One program per row, `group` heads at a time in registers. With one warp a row's sums are shuffles and 14 rows are in
# flight on a multiprocessor; two warps shorten a row, but spend half as many instructions more on it.
CANDIDATES = [
    {"num_warps": num_warps, "group": group} for num_warps, group in [(1, 4), (1, 8), (2, 8), (2, 16), (4, 16), (4, 32)]
]
LANE_ELEMENTS = 128


@triton.jit
def _load_pairs(source_ptr, heads, pairs, wanted, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Both elements of pairs of heads, each `[heads, pairs]`."""
    PAIRS: tl.constexpr = SIZE // 6
    # Halves of a third start at multiples of 4 columns: elements are read four at a time.
    first = tl.max_contiguous(tl.multiple_of(pairs + pairs // PAIRS * PAIRS, 4), 4)
    pointers = source_ptr + heads[:, None] * SIZE + first[None, :]
    mask = wanted & (heads < HEADS)[:, None] & (pairs < SIZE // 2)[None, :]
    return tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + PAIRS, mask=mask, other=0.0)


@triton.jit
def _load_row(
    source_ptr,
    wanted,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """All heads, first and second elements in turn: MAIN pairs of them in groups, then the rest of all as one tile.

    Zeros where they are not wanted.
    """
    tiles = ()
    for start in tl.static_range(0, HEADS, GROUP):
        tiles += _load_pairs(source_ptr, start + tl.arange(0, GROUP), tl.arange(0, MAIN), wanted, HEADS, SIZE)
    heads = tl.arange(0, triton.next_power_of_2(HEADS))
    return tiles + _load_pairs(source_ptr, heads, MAIN + tl.arange(0, TAIL), wanted, HEADS, SIZE)


@triton.jit
def _rotation(pairs, position, cos_ptr, sin_ptr, table_rows, SIZE: tl.constexpr):
    """Cosine and sine of every pair of a head."""
    PAIRS: tl.constexpr = SIZE // 6
    angle = position.to(tl.int64) * PAIRS + pairs % PAIRS
    # A position that the tables do not hold becomes NaN in the result instead of a read beyond them.
    known = (pairs < SIZE // 2) & (position >= 0) & (position < table_rows)
    cos = tl.load(cos_ptr + angle, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=known, other=float("nan")).to(tl.float32)
    return cos[None, :], sin[None, :]


@triton.jit
def _inverse_rms(tiles, size: tl.constexpr, eps):
    LAST: tl.constexpr = len(tiles) - 2
    squares = tl.zeros(tiles[0].shape, tl.float32)
    for index in tl.static_range(LAST):
        squares += tiles[index].to(tl.float32) * tiles[index].to(tl.float32)
    first, second = tiles[LAST].to(tl.float32), tiles[LAST + 1].to(tl.float32)
    mean = (tl.sum(squares) + tl.sum(first * first + second * second)) / size + eps
    inverse = tl.rsqrt(mean)
    if tiles[0].dtype == tl.float32:
        # One step of Newton: the instruction's own error, two units in the last place, would be seen.
        inverse += inverse * (0.5 - 0.5 * mean * inverse * inverse)
    return inverse


@triton.jit
def _rotate(first, second, weight_ptr, heads, pairs, rotation, inverse, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """A tile of pairs normed and rotated, `[heads, 2 pairs]`, both elements of a pair side by side."""
    weights = _load_pairs(weight_ptr, heads, pairs, True, HEADS, SIZE)
    cos, sin = rotation[0] * inverse, rotation[1] * inverse
    first = first.to(tl.float32) * weights[0].to(tl.float32)
    second = second.to(tl.float32) * weights[1].to(tl.float32)
    return tl.interleave(first * cos - second * sin, second * cos + first * sin)


@triton.jit
def _write_row(
    tiles,
    weight_ptr,
    target_ptr,
    rotation,
    tail_rotation,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Stores the heads of a loaded row, normed and rotated, and the zeros that pad them."""
    LAST: tl.constexpr = len(tiles) - 2
    GROUP: tl.constexpr = tiles[0].shape[0]
    MAIN: tl.constexpr = tiles[0].shape[1]
    TAIL: tl.constexpr = tiles[LAST].shape[1]
    inverse = _inverse_rms(tiles, HEADS * SIZE, eps)
    # One group at a time, so that weights of a few heads only take registers.
    for index in tl.static_range(0, LAST, 2):
        heads = tl.arange(0, GROUP) + index // 2 * GROUP
        pairs = tl.arange(0, MAIN)
        values = _rotate(tiles[index], tiles[index + 1], weight_ptr, heads, pairs, rotation, inverse, HEADS, SIZE)
        _store(target_ptr, values, heads, tl.arange(0, 2 * MAIN), HEADS, SIZE, PADDED)
    heads = tl.arange(0, tiles[LAST].shape[0])
    pairs = tl.arange(0, TAIL) + MAIN
    values = _rotate(tiles[LAST], tiles[LAST + 1], weight_ptr, heads, pairs, tail_rotation, inverse, HEADS, SIZE)
    _store(target_ptr, values, heads, tl.arange(0, 2 * TAIL) + 2 * MAIN, HEADS, SIZE, PADDED)
    _store_zeros(target_ptr, heads, HEADS, SIZE, PADDED)


@triton.jit
def _store(target_ptr, values, heads, columns, HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    mask = (heads < HEADS)[:, None] & (columns < SIZE)[None, :]
    tl.store(target_ptr + heads[:, None] * PADDED + columns[None, :], values, mask=mask)


@triton.jit
def _store_zeros(target_ptr, heads, HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    if PADDED > SIZE:
        columns = SIZE + tl.arange(0, triton.next_power_of_2(PADDED - SIZE))
        zeros = tl.zeros([heads.shape[0], columns.shape[0]], target_ptr.dtype.element_ty)
        _store(target_ptr, zeros, heads, columns, HEADS, PADDED, PADDED)


@triton.jit
def _load_values(source_ptr, heads, columns, HEADS: tl.constexpr, SIZE: tl.constexpr):
    mask = (heads < HEADS)[:, None] & (columns < SIZE)[None, :]
    return tl.load(source_ptr + heads[:, None] * SIZE + columns[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["split", "query_start", "table_rows"])
def _qk_norm_rope_kernel(
    cond_ptr,  # [split, Q + 2 KV] or [split, 2 KV]
    x_ptr,  # [rows - split, Q + 2 KV]
    branch_rows_ptr,  # [rows]
    key_rows_ptr,  # [rows]
    positions_ptr,  # [rows, 3]
    cos_ptr,  # [table_rows, SIZE / 6]
    sin_ptr,
    q_weight_ptr,  # [2, Q]
    k_weight_ptr,  # [2, KV]
    q_ptr,  # [rows - query_start, HEADS, PADDED]
    k_ptr,  # [rows and kept ones, KV_HEADS, PADDED]
    v_ptr,
    split,
    query_start,  # 0, or split where cond has no queries
    table_rows,
    cond_stride,
    x_stride,
    q_weight_stride,
    k_weight_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stream = (row >= split).to(tl.int64)
    target = tl.load(branch_rows_ptr + row).to(tl.int64)
    key_target = tl.load(key_rows_ptr + row).to(tl.int64)
    query_ptr = tl.where(row < split, cond_ptr + row * cond_stride, x_ptr + (row - split) * x_stride)
    key_ptr = query_ptr + tl.where(row < query_start, 0, HEADS * SIZE)
    value_ptr = key_ptr + KV_HEADS * SIZE
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    position_ptr = positions_ptr + row * 3
    position = tl.load(position_ptr + main // (SIZE // 6))
    tail_position = tl.load(position_ptr + tail // (SIZE // 6), mask=tail < SIZE // 2, other=0)
    heads = tl.arange(0, triton.next_power_of_2(KV_HEADS))
    columns, tail_columns = tl.arange(0, 2 * MAIN), 2 * MAIN + tl.arange(0, 2 * TAIL)
    value = _load_values(value_ptr, heads, columns, KV_HEADS, SIZE)
    value_tail = _load_values(value_ptr, heads, tail_columns, KV_HEADS, SIZE)
    key = _load_row(key_ptr, True, KV_HEADS, KV_GROUP, SIZE, MAIN, TAIL)
    tl.debug_barrier()
    query = _load_row(query_ptr, row >= query_start, HEADS, GROUP, SIZE, MAIN, TAIL)
    # The barriers keep all loads of a row ahead of the work on them, so that they are in flight together.
    tl.debug_barrier()
    rotation = _rotation(main, position, cos_ptr, sin_ptr, table_rows, SIZE)
    tail_rotation = _rotation(tail, tail_position, cos_ptr, sin_ptr, table_rows, SIZE)
    if row >= query_start:
        weight_ptr = q_weight_ptr + stream * q_weight_stride
        # Without cond's queries, those of x stay in their order.
        target_ptr = q_ptr + tl.where(query_start == 0, target, row - split) * HEADS * PADDED
        _write_row(query, weight_ptr, target_ptr, rotation, tail_rotation, eps, HEADS, SIZE, PADDED)
    weight_ptr = k_weight_ptr + stream * k_weight_stride
    target_ptr = k_ptr + key_target * KV_HEADS * PADDED
    _write_row(key, weight_ptr, target_ptr, rotation, tail_rotation, eps, KV_HEADS, SIZE, PADDED)
    target_ptr = v_ptr + key_target * KV_HEADS * PADDED
    _store(target_ptr, value, heads, columns, KV_HEADS, SIZE, PADDED)
    _store(target_ptr, value_tail, heads, tail_columns, KV_HEADS, SIZE, PADDED)
    _store_zeros(target_ptr, heads, KV_HEADS, SIZE, PADDED)


def _tiles(heads: int, kv_heads: int, head_size: int, padded: int, group: int) -> dict[str, int]:
    """The compile-time sizes of a launch; MAIN and TAIL count pairs."""
    main, tail = pieces(head_size // 2)
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "GROUP": min(group, triton.next_power_of_2(heads)),
        "KV_GROUP": min(group, triton.next_power_of_2(kv_heads)),
        "SIZE": head_size,
        "PADDED": padded,
        "MAIN": main,
        "TAIL": tail,
    }


def _reference(cond, x, cond_lens, x_lens, table, branch_rows, *rest):
    return reference.qk_norm_rope(cond, x, Branches(tuple(cond_lens), tuple(x_lens), table, branch_rows), *rest)


# A new order of columns is a new name: compile caches know an operator by it, and would go on with what they have.
@operator("qk_norm_rope_pairs", _reference)
def _qk_norm_rope(
    cond: torch.Tensor,
    x: torch.Tensor,
    cond_lens: list[int],
    x_lens: list[int],
    table: torch.Tensor,
    branch_rows: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    head_size: int,
    eps: float,
    padded: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, kv_heads = cond.shape[0] + x.shape[0], k_weight.shape[1] // head_size
    k, v = x.new_empty(rows, kv_heads, padded), x.new_empty(rows, kv_heads, padded)
    tables = (branch_rows, branch_rows, positions, cos, sin)
    return launch_rows(cond, x, k, v, *tables, q_weight, k_weight, head_size, eps), k, v


def launch_rows(
    cond: torch.Tensor,
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    branch_rows: torch.Tensor,
    key_rows: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    head_size: int,
    eps: float,
) -> torch.Tensor:
    """Launches the kernel on `k` and `v`, whose rows are found by `key_rows`; returns a new q."""
    split, rows = cond.shape[0], cond.shape[0] + x.shape[0]
    query_start = 0 if cond.shape[1] == x.shape[1] else split
    heads, (kv_heads, padded) = q_weight.shape[1] // head_size, k.shape[1:]
    q = x.new_empty(rows - query_start, heads, padded)
    if rows:
        launch = tuning.config("qk_norm_rope", x.device, x.dtype)
        wrap_triton(_qk_norm_rope_kernel)[(rows,)](
            *(cond, x, branch_rows, key_rows, positions, cos, sin, q_weight, k_weight, q, k, v),
            *(split, query_start, cos.shape[0]),
            *(matrix.stride(0) for matrix in (cond, x, q_weight, k_weight)),
            eps,
            num_warps=row_warps(x.shape[1], launch["num_warps"], LANE_ELEMENTS),
            **_tiles(heads, kv_heads, head_size, padded, launch["group"]),
        )
    return q


def check(cond, x, branches, positions, cos, sin, q_weight, k_weight, head_size: int, padded: int) -> None:
    """Refuses what `qk_norm_rope` cannot take, of whatever types it is."""
    validate.rows("x", x, (None, None))
    multiple = 24 if runs_kernel(x.device) else 6
    if head_size <= 0 or head_size % multiple:
        raise ValueError(f"head_size is {head_size}; expected a multiple of {multiple}")
    if padded < head_size:
        raise ValueError(f"padded_head_size is {padded}; expected at least {head_size}, the head size")
    validate.tensor("q_weight", q_weight, (2, None), device=x.device)
    validate.tensor("k_weight", k_weight, (2, None), device=x.device)
    q_size, kv_size = q_weight.shape[1], k_weight.shape[1]
    for name, size in (("q_weight", q_size), ("k_weight", kv_size)):
        if size == 0 or size % head_size:
            raise ValueError(f"{name} has width {size}; expected a multiple of {head_size}, the head size")
    validate.tensor("x", x, (None, q_size + 2 * kv_size))
    validate.tensor("cond", cond, (None, None), device=x.device)
    validate.alike("cond", cond, "x", x)
    if cond.shape[1] not in (q_size + 2 * kv_size, 2 * kv_size):
        raise ValueError(
            f"cond has width {cond.shape[1]}; expected {q_size + 2 * kv_size}, or {2 * kv_size} without queries"
        )
    validate.branches(branches, cond.shape[0], x.shape[0], x.device)
    validate.tensor("positions", positions, (cond.shape[0] + x.shape[0], 3), (torch.int32,), x.device)
    validate.tensor("cos", cos, (None, head_size // 6), (torch.float32, torch.float64), x.device)
    validate.tensor("sin", sin, cos.shape, (cos.dtype,), x.device)
    for name, value in (("positions", positions), ("cos", cos), ("sin", sin)):
        if not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}; expected a contiguous tensor")


def static_cases(capability: int) -> list[StaticCase]:
    """The launch at the model's shape: 10,240 + 3,072 rows (512 px, 4 pairs, two branches), 32 query and 8 key/value
    heads of 72, stored at 80. The last block runs the same code on fewer queries.
    """
    rows, heads, kv_heads, head_size, padded = 13_312, 32, 8, 72, 80
    tables = {"*i32": ("branch_rows", "key_rows", "positions"), "*fp32": ("cos", "sin")}
    types = {f"{name}_ptr": kind for kind, names in tables.items() for name in names}
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        launch = tuning.default_config("qk_norm_rope", capability, dtype)
        constexprs = _tiles(heads, kv_heads, head_size, padded, launch["group"])
        bytes = rows * (heads + 2 * kv_heads) * (head_size + padded) * dtype.itemsize + rows * 4 * 4
        warps = row_warps((heads + 2 * kv_heads) * head_size, launch["num_warps"], LANE_ELEMENTS)
        cases.append(row_case("qk_norm_rope", _qk_norm_rope_kernel, dtype, constexprs, warps, bytes, types))
    return cases


def qk_norm_rope(
    cond: torch.Tensor,
    x: torch.Tensor,
    branches: Branches,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    head_size: int,
    eps: float = 1e-6,
    padded_head_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm over all heads of q and of k, 3D rotary positions, and the change to branch-contiguous order.

    LaVin-DiT, arXiv 2411.11505, section 3.3: thirds of a head rotate with the frame, row and column of their token, in
    half-split pairs. q and k come with the two elements of a pair side by side: products of q and k are the same in any
    order of columns that both have, and so a thread that reads a pair whole also writes it whole. One pass over the
    joined rows in float32, rounded once. On a CPU the reference runs instead.

    Args:
        cond: `[cond rows, Q + 2 KV]`, the joined q, k, v of the cond stream, or `[cond rows, 2 KV]` where nothing needs
            its queries (the last block). `Q = heads * head_size`, `KV = kv_heads * head_size`; bfloat16, float16 or
            float32 (float64 on a CPU); rows may be strided.
        x: `[x rows, Q + 2 KV]` of the x stream, likewise.
        branches: the row ranges of both streams; they cover all rows.
        positions: `[rows, 3]` int32, (frame, row, column) of every stream-major row.
        cos, sin: `[positions, head_size / 6]` float32 (float64 on a CPU), of the angles
            `p * 10000 ** (-2 j / (head_size / 3))` for position p and pair j. A position that the tables do not hold
            gives NaN on the kernel path and an IndexError on a CPU.
        q_weight: `[2, Q]`, one row per stream. k_weight: `[2, KV]`. In the dtype of the rows or another of those.
        head_size: size of one head, divisible by 6; by 24 for the kernel.
        eps: added to the means of squares.
        padded_head_size: width at which heads are stored, the rest zero; `head_size` by default.

    Returns:
        q `[rows, heads, padded]` in branch-contiguous order, or the x rows alone, in their order, where `cond` has no
        queries; k and v `[rows, kv_heads, padded]` in branch-contiguous order; contiguous, in the dtype of `x`. Columns
        `2 j` and `2 j + 1` of a third of q or k are its columns `j` and `j + head_size / 6`.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: rank, sizes, device, a last dimension that is not contiguous, a head size that the widths are not
            multiples of, a padded head size below it, or branches that do not cover exactly the rows.
    """
    padded = head_size if padded_head_size is None else padded_head_size
    check(cond, x, branches, positions, cos, sin, q_weight, k_weight, head_size, padded)
    ranges = list(branches.cond_lens), list(branches.x_lens), branches.table, branches.branch_rows
    return _qk_norm_rope(cond, x, *ranges, positions, cos, sin, q_weight, k_weight, head_size, eps, padded)
