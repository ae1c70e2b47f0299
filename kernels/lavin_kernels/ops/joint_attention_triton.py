"""The Triton kernel of joint attention, for every target: pointers with asynchronous copies."""

import triton
import triton.language as tl


@triton.jit
def _of(mask, values):
    return tl.sum(tl.where(mask, values, 0))


@triton.jit
def _tile_of_program(
    table,
    branches,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    X_ONLY: tl.constexpr,
    MAX_BRANCHES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What this program computes; no rows at all for the few programs beyond the last tile.

    Branches with more keys go first, so that their long tiles do not end the launch on a few multiprocessors. Within a
    branch all tiles of one key/value head are neighbours and share its rows in the L2.
    """
    branch = tl.arange(0, MAX_BRANCHES)
    listed = branch < branches
    cond = tl.load(table + COLUMNS * branch, mask=listed, other=0)
    x = tl.load(table + COLUMNS * branch + 1, mask=listed, other=0)
    keys = cond + x
    queries = x if X_ONLY else keys
    if COLUMNS == 5:  # kept rows are keys alone
        keys += tl.load(table + COLUMNS * branch + 4, mask=listed, other=0)
    tiles = tl.cdiv(queries, BLOCK_M)
    tied = (keys[None, :] == keys[:, None]) & (branch[None, :] < branch[:, None])
    earlier = (keys[None, :] > keys[:, None]) | tied
    program = tl.program_id(0) - tl.sum(tl.where(earlier, tiles[None, :], 0), 1) * HEADS
    mine = (program >= 0) & (program < tiles * HEADS)
    before = branch < _of(mine, branch)
    program = _of(mine, program)
    group_programs = tl.maximum(_of(mine, tiles), 1) * GROUP
    kv_head = program // group_programs
    program = program % group_programs
    return (
        kv_head * GROUP + program % GROUP,
        kv_head,
        program // GROUP * BLOCK_M,  # first row of the tile among the branch's queries
        _of(mine, queries),
        _of(before, queries),  # first query row of the branch
        _of(mine, keys),
        _of(before, keys),  # first key row of the branch
        _of(mine, branch),
    )


@triton.jit
def _load_tile(
    source,
    row,
    end,
    head,
    row_stride,
    head_stride,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """`[ROWS, WIDTH]` of one head from column FIRST on, zero beyond the head and, with MASK_ROWS, from row `end` on."""
    # Strides count eight elements, so that the compiler knows that 16 bytes can be copied at once.
    columns = FIRST + tl.arange(0, WIDTH)
    base = source + (tl.cast(head, tl.int64) * head_stride + tl.cast(row, tl.int64) * row_stride) * 8
    pointers = base + (tl.arange(0, ROWS)[:, None] * (row_stride * 8) + columns[None, :])
    in_head = (columns < HEAD_SIZE)[None, :]
    if MASK_ROWS:
        tile = tl.load(pointers, mask=(row + tl.arange(0, ROWS) < end)[:, None] & in_head, other=0.0)
    elif FIRST + WIDTH > HEAD_SIZE:
        tile = tl.load(pointers, mask=in_head, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _add_dot(a, b, acc, factor, UPCAST: tl.constexpr):
    """`acc * factor + a @ b`. In float32 the product is summed by itself: one running sum over a thousand keys, or over
    the 72 products of a score, errs two to three times as much as PyTorch's, a sum of sums does not. (Of a plain
    addition the compiler would make one sum again.) With 16 bits the rounding of the operands outweighs it.
    """
    if a.dtype == tl.float32:
        return tl.fma(acc, factor, _dot(a, b, None, UPCAST))
    return _dot(a, b, acc * factor, UPCAST)


@triton.jit
def _attend_tile(
    q,  # pieces of as many columns as PIECE
    q_rest,
    k,  # (source, row stride, head stride), as for v
    v,
    row,
    end,
    head,
    scale,
    state,  # (largest scaled score, sum of weights, weighted sum of values, its rest) of the keys so far
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One step of the running softmax, over the keys from `row` on; with MASK those before `end` alone."""
    offset, total, acc, acc_rest = state
    k_source, k_row_stride, k_head_stride = k
    v_source, v_row_stride, v_head_stride = v
    keys = _load_tile(k_source, row, end, head, k_row_stride, k_head_stride, BLOCK_N, 0, PIECE, HEAD_SIZE, MASK)
    scores = _dot(q[0], keys.T, None, UPCAST)
    for i in tl.static_range(1, WIDTH // PIECE):
        keys = _load_tile(
            k_source, row, end, head, k_row_stride, k_head_stride, BLOCK_N, i * PIECE, PIECE, HEAD_SIZE, MASK
        )
        scores = _add_dot(q[i], keys.T, scores, 1.0, UPCAST)
    if REST:
        keys = _load_tile(k_source, row, end, head, k_row_stride, k_head_stride, BLOCK_N, WIDTH, REST, HEAD_SIZE, MASK)
        scores = _add_dot(q_rest, keys.T, scores, 1.0, UPCAST)
    if MASK:
        scores = tl.where((row + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))
    # The difference of two rounded numbers, exactly 0 where nothing changes. Of `largest * scale - offset` the compiler
    # makes a multiply-add, which leaves the rounding of `offset`: 1e-7 the same way in every tile.
    new_offset = tl.maximum(offset, tl.max(scores, 1) * scale)
    decay = tl.exp2(offset - new_offset)
    weights = tl.exp2(scores * scale - new_offset[:, None])  # one multiply-add and one exp2 a score
    total = total * decay + tl.sum(weights, 1)
    values = _load_tile(v_source, row, end, head, v_row_stride, v_head_stride, BLOCK_N, 0, WIDTH, HEAD_SIZE, MASK)
    weights = weights.to(values.dtype)
    acc = _add_dot(weights, values, acc, decay[:, None], UPCAST)
    if REST:
        values = _load_tile(
            v_source, row, end, head, v_row_stride, v_head_stride, BLOCK_N, WIDTH, REST, HEAD_SIZE, MASK
        )
        acc_rest = _add_dot(weights, values, acc_rest, decay[:, None], UPCAST)
    return new_offset, total, acc, acc_rest


@triton.jit
def _store_tile(out, rows, stored, acc, FIRST: tl.constexpr, HEAD_SIZE: tl.constexpr, HEADS: tl.constexpr):
    columns = FIRST + tl.arange(0, acc.shape[1])
    pointers = out + rows[:, None] * (HEADS * HEAD_SIZE) + columns[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=stored[:, None] & (columns < HEAD_SIZE)[None, :])


@triton.jit(do_not_specialize=["branches"])
def joint_attention_kernel(
    q_source,  # [q rows, heads, >= head_size]
    k_source,
    v_source,
    out_ptr,  # [q rows, heads * head_size]
    lse_ptr,  # [q rows, heads]
    table_ptr,  # [branches, COLUMNS]
    branches,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    X_ONLY: tl.constexpr,
    WITH_LSE: tl.constexpr,
    MAX_BRANCHES: tl.constexpr,
    COLUMNS: tl.constexpr,  # 4, or 5 with kept rows
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,  # operands of products to float32, for Triton's interpreter, which multiplies no bfloat16
):
    head, kv_head, tile_row, queries, first_query, keys, first_key, branch = _tile_of_program(
        table_ptr, branches, HEADS, GROUP, X_ONLY, MAX_BRANCHES, BLOCK_M, COLUMNS
    )
    q_row = first_query + tile_row
    q_end = first_query + queries
    # Float32 scores are added up in pieces: by 32 a row in a thousand errs 1.04 times its budget, by 16 at most 0.82.
    PIECE: tl.constexpr = 16 if q_source.dtype.element_ty == tl.float32 else WIDTH
    q = ()  # type: tuple
    for i in tl.static_range(WIDTH // PIECE):
        q += (
            _load_tile(
                q_source, q_row, q_end, head, q_row_stride, q_head_stride, BLOCK_M, i * PIECE, PIECE, HEAD_SIZE, True
            ),
        )
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    q_rest = q[0]
    acc_rest = acc
    if REST:
        q_rest = _load_tile(
            q_source, q_row, q_end, head, q_row_stride, q_head_stride, BLOCK_M, WIDTH, REST, HEAD_SIZE, True
        )
        acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    state = (tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32), acc, acc_rest)

    # Keys that fill no whole tile come first and alone pay for masks; behind the loop they would cost it 30 registers.
    # A loop of one pass or none: seen on sm_90, under an `if` the assembler serializes every wgmma.
    k = (k_source, k_row_stride, k_head_stride)
    v = (v_source, v_row_stride, v_head_stride)
    whole = first_key + keys % BLOCK_N
    for _ in tl.range(first_key, whole, BLOCK_N, num_stages=1):
        state = _attend_tile(
            q,
            q_rest,
            k,
            v,
            first_key,
            whole,
            kv_head,
            scale,
            state,
            HEAD_SIZE,
            WIDTH,
            REST,
            PIECE,
            BLOCK_N,
            True,
            UPCAST,
        )
    for row in tl.range(whole, first_key + keys, BLOCK_N):
        state = _attend_tile(
            q, q_rest, k, v, row, row, kv_head, scale, state, HEAD_SIZE, WIDTH, REST, PIECE, BLOCK_N, False, UPCAST
        )
    offset, total, acc, acc_rest = state

    # Read only now: held over the loop, these three would cost the registers of a second program on the multiprocessor.
    rows = tile_row + tl.arange(0, BLOCK_M)
    stored = rows < queries
    x_start = tl.load(table_ptr + COLUMNS * branch + 3)
    if X_ONLY:
        out_rows = (x_start - tl.load(table_ptr + 3) + rows).to(tl.int64)
    else:
        cond = tl.load(table_ptr + COLUMNS * branch)
        cond_start = tl.load(table_ptr + COLUMNS * branch + 2)
        out_rows = tl.where(rows < cond, cond_start + rows, x_start - cond + rows).to(tl.int64)
    total = tl.where(stored, total, 1.0)  # a program without rows has met no key
    inverse = (1.0 / total)[:, None]
    _store_tile(out_ptr + head * HEAD_SIZE, out_rows, stored, acc * inverse, 0, HEAD_SIZE, HEADS)
    if REST:
        _store_tile(out_ptr + head * HEAD_SIZE, out_rows, stored, acc_rest * inverse, WIDTH, HEAD_SIZE, HEADS)
    if WITH_LSE:
        natural = (offset + tl.log2(total)) * 0.6931471805599453  # ln 2
        tl.store(lse_ptr + out_rows * HEADS + head, natural, mask=stored)
