"""Joint attention for Hopper (sm_90), in Gluon: one warp copies, two or three warpgroups multiply and take softmaxes.

Not a default anywhere: a device's tuned configuration asks for it with `"variant": "gluon"`. Wants 16-bit rows, and a
whole tile of keys in every branch, since it has no mask for values.

Every warpgroup owns 64 query rows and its own copy of the loop; between them nothing is ordered but the tiles of keys
and values, which all of them read. So one takes its softmax, about as long as its products at head size 72, while the
others keep the tensor cores busy, and a tile travels from the L2 once for 192 rows.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Registers of a thread where 2 or 3 warpgroups share the 65,536 of a multiprocessor, less those of the copying group.
REGISTERS = {2: 240, 3: 160}
SHARED_MEMORY = 225 * 1024  # bytes that tiles may take of the 227 KiB of a program, which barriers lie in as well
ROWS = gl.constexpr(64)  # query rows of a warpgroup, the M of its matrix instructions


@gluon.jit
def _of(mask, values):
    return gl.sum(gl.where(mask, values, 0), 0)


@gluon.jit
def _tile_of_program(
    table,
    branches,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    X_ONLY: gl.constexpr,
    MAX_BRANCHES: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """As in the Triton kernel."""
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    branch = gl.arange(0, MAX_BRANCHES, gl.SliceLayout(1, PAIRS))
    other = gl.arange(0, MAX_BRANCHES, gl.SliceLayout(0, PAIRS))
    cond = gl.load(table + 4 * branch, mask=branch < branches, other=0)
    keys = cond + gl.load(table + 4 * branch + 1, mask=branch < branches, other=0)
    other_cond = gl.load(table + 4 * other, mask=other < branches, other=0)
    other_keys = other_cond + gl.load(table + 4 * other + 1, mask=other < branches, other=0)
    queries = keys
    other_queries = other_keys
    if X_ONLY:
        queries = keys - cond
        other_queries = other_keys - other_cond
    tied = (other_keys[None, :] == keys[:, None]) & (other[None, :] < branch[:, None])
    earlier = (other_keys[None, :] > keys[:, None]) | tied
    programs = gl.cdiv(queries, BLOCK_M) * HEADS
    other_programs = gl.cdiv(other_queries, BLOCK_M) * HEADS
    zero = gl.full([MAX_BRANCHES, MAX_BRANCHES], 0, gl.int32, PAIRS)
    program = gl.program_id(0) - gl.sum(gl.where(earlier, other_programs[None, :] + zero, 0), 1)
    mine = (program >= 0) & (program < programs)
    before = branch < _of(mine, branch)
    program = _of(mine, program)
    group_programs = gl.maximum(_of(mine, programs) // HEADS, 1) * GROUP
    kv_head = program // group_programs
    program = program % group_programs
    return (
        kv_head * GROUP + program % GROUP,
        kv_head,
        program // GROUP * BLOCK_M,
        _of(mine, queries),
        _of(before, queries),
        _of(mine, keys),
        _of(before, keys),
        _of(mine, branch),
    )


@gluon.jit
def _buffers(source, rest_source, COUNT: gl.constexpr, REST: gl.constexpr):
    """Shared memory for COUNT tiles and for what of them is beyond their first piece."""
    shape: gl.constexpr = source.block_type.shape
    tiles = gl.allocate_shared_memory(source.dtype, [COUNT, 1, shape[1], shape[2]], source.layout)
    rest = tiles
    if REST:
        rest = gl.allocate_shared_memory(source.dtype, [COUNT, 1, shape[1], REST], rest_source.layout)
    return tiles, rest


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _copy(source, rest_source, tiles, rest, ready, index, head, row, WIDTH: gl.constexpr, REST: gl.constexpr):
    """Starts the copy of both pieces of a tile of one head; `ready` completes with them."""
    ready = ready.index(index)
    if REST:
        mbarrier.expect(ready, source.block_type.nbytes + rest_source.block_type.nbytes)
        tma.async_copy_global_to_shared(rest_source, [head, row, WIDTH], ready, rest.index(index))
    else:
        mbarrier.expect(ready, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [head, row, 0], ready, tiles.index(index))


@gluon.jit
def _produce(sources, buffers, barriers, head, kv_head, query_row, first_key, first_tile, tiles, FORM: gl.constexpr):
    """Keeps the buffers full: all of q once, then a tile of keys and one of values in turn."""
    WIDTH: gl.constexpr = FORM[2]
    REST: gl.constexpr = FORM[3]
    BLOCK_N: gl.constexpr = FORM[6]
    STAGES: gl.constexpr = FORM[7]
    GROUPS: gl.constexpr = FORM[8]
    q_source, q_rest_source, k_source, k_rest_source, v_source, v_rest_source = sources
    q, q_rest, k, k_rest, v, v_rest = buffers
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    for group in gl.static_range(GROUPS):
        _copy(q_source, q_rest_source, q, q_rest, q_ready, group, head, query_row + group * ROWS, WIDTH, REST)
    row = first_key
    for tile in range(tiles):
        stage = tile % STAGES
        phase = (tile // STAGES & 1) ^ 1  # in the first round every buffer counts as free
        mbarrier.wait(k_free.index(stage), phase)
        _copy(k_source, k_rest_source, k, k_rest, k_ready, stage, kv_head, row, WIDTH, REST)
        mbarrier.wait(v_free.index(stage), phase)
        _copy(v_source, v_rest_source, v, v_rest, v_ready, stage, kv_head, row, WIDTH, REST)
        row = row + gl.where(tile == 0, first_tile, BLOCK_N)


@gluon.jit
def _matrix(tiles, index):
    """`[rows, width]` of a tile `[1, rows, width]`, which has the head dimension of its descriptor."""
    tile = tiles.index(index)
    return tile.reshape([tile.shape[1], tile.shape[2]])


@gluon.jit
def _scores(q, q_rest, k, k_rest, REST: gl.constexpr, LAYOUT: gl.constexpr):
    BLOCK_N: gl.constexpr = k.shape[0]
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
    if REST:
        scores = warpgroup_mma(q_rest, k_rest.permute((1, 0)), scores, is_async=True)
    return warpgroup_mma_wait(0, deps=(scores,))


@gluon.jit
def _add_values(acc, acc_rest, weights, v, v_rest, REST: gl.constexpr, ACC: gl.constexpr, ACC_REST: gl.constexpr):
    # The weights are in the registers where the products want them: neither conversion moves anything.
    acc = warpgroup_mma(gl.convert_layout(weights, gl.DotOperandLayout(0, ACC, 2)), v, acc, is_async=True)
    if REST:
        rest_operand = gl.convert_layout(weights, gl.DotOperandLayout(0, ACC_REST, 2))
        acc_rest = warpgroup_mma(rest_operand, v_rest, acc_rest, is_async=True)
        acc, acc_rest = warpgroup_mma_wait(0, deps=(acc, acc_rest))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, acc_rest


@gluon.jit
def _own_sums(weights):
    """`[ROWS, 4]`: sums of each row over the columns that one of its four threads has, so that nothing is exchanged."""
    BLOCK_N: gl.constexpr = weights.shape[1]
    return gl.sum(gl.sum(weights.reshape([ROWS, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def _consume(group: gl.constexpr, buffers, barriers, outputs, place, first_tile, tiles, scale, FORM: gl.constexpr):
    """What one warpgroup does with its 64 query rows."""
    HEADS: gl.constexpr = FORM[0]
    HEAD_SIZE: gl.constexpr = FORM[1]
    WIDTH: gl.constexpr = FORM[2]
    REST: gl.constexpr = FORM[3]
    X_ONLY: gl.constexpr = FORM[4]
    WITH_LSE: gl.constexpr = FORM[5]
    BLOCK_N: gl.constexpr = FORM[6]
    STAGES: gl.constexpr = FORM[7]
    out_ptr, lse_ptr, table_ptr = outputs
    branch, head, tile_row, queries = place
    tile_row = tile_row + group * ROWS
    q, q_rest, k, k_rest, v, v_rest = buffers
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    REST_WIDTH: gl.constexpr = REST if REST else 16
    ACC_REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST_WIDTH, 16])

    q = _matrix(q, group)
    q_rest = _matrix(q_rest, group)
    acc = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
    acc_rest = gl.zeros([ROWS, REST_WIDTH], gl.float32, ACC_REST)
    offset = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    own_total = _own_sums(gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES))
    OWN: gl.constexpr = own_total.type.layout
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    mbarrier.wait(q_ready.index(group), 0)
    stage = 0
    phase = 0
    for tile in range(tiles):
        mbarrier.wait(k_ready.index(stage), phase)
        scores = _scores(q, q_rest, _matrix(k, stage), _matrix(k_rest, stage), REST, SCORES)
        mbarrier.arrive(k_free.index(stage))
        if tile == 0:
            scores = gl.where((columns < first_tile)[None, :], scores, float("-inf"))
        new_offset = gl.maximum(offset, gl.max(scores, 1) * scale)
        decay = gl.exp2(offset - new_offset)  # as in the Triton kernel, not of a product
        weights = gl.exp2(scores * scale - new_offset[:, None])
        own_total = own_total * gl.convert_layout(decay, gl.SliceLayout(1, OWN))[:, None] + _own_sums(weights)
        offset = new_offset
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, ACC))[:, None]
        if REST:
            acc_rest = acc_rest * gl.convert_layout(decay, gl.SliceLayout(1, ACC_REST))[:, None]
        mbarrier.wait(v_ready.index(stage), phase)
        acc, acc_rest = _add_values(
            acc, acc_rest, weights.to(v.dtype), _matrix(v, stage), _matrix(v_rest, stage), REST, ACC, ACC_REST
        )
        mbarrier.arrive(v_free.index(stage))
        stage = (stage + 1) % STAGES
        phase = gl.where(stage == 0, phase ^ 1, phase)

    total = gl.convert_layout(gl.sum(own_total, 1), gl.SliceLayout(1, SCORES))
    _store(out_ptr, table_ptr, branch, head, tile_row, queries, acc, total, 0, HEADS, HEAD_SIZE, X_ONLY, ACC)
    if REST:
        _store(
            out_ptr,
            table_ptr,
            branch,
            head,
            tile_row,
            queries,
            acc_rest,
            total,
            WIDTH,
            HEADS,
            HEAD_SIZE,
            X_ONLY,
            ACC_REST,
        )
    if WITH_LSE:
        rows, stored = _out_rows(table_ptr, branch, tile_row, queries, X_ONLY, gl.SliceLayout(1, SCORES))
        natural = (offset + gl.log2(total)) * 0.6931471805599453  # ln 2
        gl.store(lse_ptr + rows * HEADS + head, natural, mask=stored)


@gluon.jit
def _out_rows(table_ptr, branch, tile_row, queries, X_ONLY: gl.constexpr, LAYOUT: gl.constexpr):
    rows = tile_row + gl.arange(0, ROWS, LAYOUT)
    stored = rows < queries
    x_start = gl.load(table_ptr + 4 * branch + 3)
    if X_ONLY:
        out_rows = x_start - gl.load(table_ptr + 3) + rows
    else:
        cond = gl.load(table_ptr + 4 * branch)
        cond_start = gl.load(table_ptr + 4 * branch + 2)
        out_rows = gl.where(rows < cond, cond_start + rows, x_start - cond + rows)
    return out_rows.to(gl.int64), stored


@gluon.jit
def _store(
    out_ptr, table_ptr, branch, head, tile_row, queries, acc, total,
    FIRST: gl.constexpr, HEADS: gl.constexpr, HEAD_SIZE: gl.constexpr, X_ONLY: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    rows, stored = _out_rows(table_ptr, branch, tile_row, queries, X_ONLY, gl.SliceLayout(1, LAYOUT))
    inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, LAYOUT))
    columns = FIRST + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    pointers = out_ptr + head * HEAD_SIZE + rows[:, None] * (HEADS * HEAD_SIZE) + columns[None, :]
    gl.store(
        pointers,
        (acc * inverse[:, None]).to(out_ptr.dtype.element_ty),
        mask=stored[:, None] & (columns < HEAD_SIZE)[None, :],
    )


@gluon.jit(do_not_specialize=["branches"])
def joint_attention_gluon_kernel(
    q_source,
    q_rest_source,
    k_source,
    k_rest_source,
    v_source,
    v_rest_source,
    out_ptr,
    lse_ptr,
    table_ptr,
    branches,
    scale,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    WIDTH: gl.constexpr,
    REST: gl.constexpr,
    X_ONLY: gl.constexpr,
    WITH_LSE: gl.constexpr,
    MAX_BRANCHES: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    head, kv_head, tile_row, queries, first_query, keys, first_key, branch = _tile_of_program(
        table_ptr, branches, HEADS, GROUP, X_ONLY, MAX_BRANCHES, GROUPS * ROWS
    )
    FORM: gl.constexpr = (HEADS, HEAD_SIZE, WIDTH, REST, X_ONLY, WITH_LSE, BLOCK_N, STAGES, GROUPS)
    tiles = gl.maximum(gl.cdiv(keys, BLOCK_N), 1)
    first_tile = keys - (tiles - 1) * BLOCK_N
    q, q_rest = _buffers(q_source, q_rest_source, GROUPS, REST)
    k, k_rest = _buffers(k_source, k_rest_source, STAGES, REST)
    v, v_rest = _buffers(v_source, v_rest_source, STAGES, REST)
    # Every barrier is handed to a partition: the compiler lets the arguments of partitions share the memory of one that
    # is not, and its making then runs over them.
    q_ready = _barriers(GROUPS, 1)
    k_ready, k_free = _barriers(STAGES, 1), _barriers(STAGES, GROUPS)
    v_ready, v_free = _barriers(STAGES, 1), _barriers(STAGES, GROUPS)
    fence_async_shared()

    buffers = (q, q_rest, k, k_rest, v, v_rest)
    barriers = (q_ready, k_ready, k_free, v_ready, v_free)
    sources = (q_source, q_rest_source, k_source, k_rest_source, v_source, v_rest_source)
    outputs = (out_ptr, lse_ptr, table_ptr)
    place = (branch, head, tile_row, queries)
    query_row = first_query + tile_row
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, buffers, barriers, outputs, place, first_tile, tiles, scale, FORM)),
                (_consume, (1, buffers, barriers, outputs, place, first_tile, tiles, scale, FORM)),
                (_produce, (sources, buffers, barriers, head, kv_head, query_row, first_key, first_tile, tiles, FORM)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, buffers, barriers, outputs, place, first_tile, tiles, scale, FORM)),
                (_consume, (1, buffers, barriers, outputs, place, first_tile, tiles, scale, FORM)),
                (_consume, (2, buffers, barriers, outputs, place, first_tile, tiles, scale, FORM)),
                (_produce, (sources, buffers, barriers, head, kv_head, query_row, first_key, first_tile, tiles, FORM)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


def tile_layout(dtype: torch.dtype, rows: int, width: int) -> gl.NVMMASharedLayout:
    """How a tile of one head lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(
        [1, rows, width], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )


def descriptors(
    parts: list[torch.Tensor], head_size: int, pieces: tuple[int, int], block_n: int
) -> list[TensorDescriptor]:
    """Of q, k and v, for each piece of the head: `[heads, rows, head_size]`, zero beyond the head."""
    made = []
    for part, rows in zip(parts, (ROWS.value, block_n, block_n), strict=True):
        shape, strides = [part.shape[1], part.shape[0], head_size], [part.stride(1), part.stride(0), 1]
        for piece in pieces:
            width = piece or pieces[0]
            made.append(TensorDescriptor(part, shape, strides, [1, rows, width], tile_layout(part.dtype, rows, width)))
    return made


def form(block_m: int, block_n: int, num_stages: int, head: int) -> dict[str, Any]:
    """The compile-time arguments that a launch configuration decides, for heads of so many elements in both pieces: as
    many stages as it says, or as find room beside the queries.
    """
    groups, room = block_m // ROWS.value, SHARED_MEMORY - 2 * block_m * head
    stages = min(num_stages, room // (4 * block_n * head))
    return {"GROUPS": groups, "BLOCK_N": block_n, "STAGES": stages, "REGISTERS": REGISTERS[groups]}
