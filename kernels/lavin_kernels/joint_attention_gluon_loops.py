"""What a warpgroup of the Gluon attention does with its query rows, tile after tile: the forms of its loop.

All of them compute the same; they differ in what the tensor cores have to do while a softmax is taken:

- `plain` and `peeled`: nothing of this warpgroup's own; the others' products.
- `overlap`: the values of the tile before (FlashAttention-3, arXiv 2407.08608, section 3.2).

Starting the scores of the next tile ahead of the softmax too does not compile to more: the assembler then lets every
product wait for the one before (C7514), as its analysis ends at the loop's edge, over which values would be in flight.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # query rows of a warpgroup, the M of its matrix instructions


@gluon.jit
def matrix(tiles, index):
    """`[rows, width]` of a tile `[1, rows, width]`, which has the head dimension of its descriptor."""
    tile = tiles.index(index)
    return tile.reshape([tile.shape[1], tile.shape[2]])


@gluon.jit
def _start_scores(q, q_rest, k, k_rest, REST: gl.constexpr, SCORES: gl.constexpr):
    """Starts the products of queries and keys."""
    BLOCK_N: gl.constexpr = k.shape[0]
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
    if REST:
        scores = warpgroup_mma(q_rest, k_rest.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _start_values(acc, acc_rest, weights, v, v_rest, REST: gl.constexpr, ACC_REST: gl.constexpr):
    """Starts the products of weights and values."""
    acc = warpgroup_mma(weights, v, acc, is_async=True)
    if REST:
        # The weights are in the registers where these products want them: the conversion moves nothing.
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, ACC_REST, 2))
        acc_rest = warpgroup_mma(operand, v_rest, acc_rest, is_async=True)
    return acc, acc_rest


@gluon.jit
def _softmax(scores, largest, total, scale):
    """One step of the running softmax: the new largest score and sum, the weights, and by what earlier ones shrink."""
    new_largest = gl.maximum(largest, gl.max(scores, 1))
    offset = new_largest * scale
    decay = gl.exp2(largest * scale - offset)
    weights = gl.exp2(scores * scale - offset[:, None])  # one multiply-add and one exp2 a score
    return new_largest, total * decay + gl.sum(weights, 1), weights, decay


@gluon.jit
def _shrink(acc, acc_rest, decay, REST: gl.constexpr, ACC: gl.constexpr, ACC_REST: gl.constexpr):
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, ACC))[:, None]
    if REST:
        acc_rest = acc_rest * gl.convert_layout(decay, gl.SliceLayout(1, ACC_REST))[:, None]
    return acc, acc_rest


@gluon.jit
def _finish(acc, acc_rest, weights, REST: gl.constexpr):
    """Waits for the products of values."""
    if REST:
        acc, acc_rest, weights = warpgroup_mma_wait(0, deps=(acc, acc_rest, weights))
    else:
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
    return acc, acc_rest


@gluon.jit
def plain(q, q_rest, buffers, barriers, state, first_tile, tiles, scale, REST: gl.constexpr, STAGES: gl.constexpr,
          SCORES: gl.constexpr, ACC: gl.constexpr, ACC_REST: gl.constexpr):  # fmt: skip
    """Scores, softmax and values of one tile after the other."""
    k, k_rest, v, v_rest = buffers
    k_ready, k_free, v_ready, v_free = barriers
    largest, total, acc, acc_rest = state
    columns = gl.arange(0, k.shape[2], gl.SliceLayout(0, SCORES))
    for tile in range(tiles):
        stage = tile % STAGES
        phase = tile // STAGES & 1
        mbarrier.wait(k_ready.index(stage), phase)
        scores = _start_scores(q, q_rest, matrix(k, stage), matrix(k_rest, stage), REST, SCORES)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_free.index(stage))
        if tile == 0:
            scores = gl.where((columns < first_tile)[None, :], scores, float("-inf"))
        largest, total, weights, decay = _softmax(scores, largest, total, scale)
        acc, acc_rest = _shrink(acc, acc_rest, decay, REST, ACC, ACC_REST)
        weights = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, ACC, 2))
        mbarrier.wait(v_ready.index(stage), phase)
        acc, acc_rest = _start_values(acc, acc_rest, weights, matrix(v, stage), matrix(v_rest, stage), REST, ACC_REST)
        acc, acc_rest = _finish(acc, acc_rest, weights, REST)
        mbarrier.arrive(v_free.index(stage))
    return largest, total, acc, acc_rest


@gluon.jit
def _first(q, q_rest, buffers, barriers, state, first_tile, scale, REST: gl.constexpr, SCORES: gl.constexpr):
    """Scores of the first tile, the one that keys need not fill."""
    k, k_rest, _, _ = buffers
    k_ready, k_free, _, _ = barriers
    columns = gl.arange(0, k.shape[2], gl.SliceLayout(0, SCORES))
    mbarrier.wait(k_ready.index(0), 0)
    scores = _start_scores(q, q_rest, matrix(k, 0), matrix(k_rest, 0), REST, SCORES)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_free.index(0))
    return gl.where((columns < first_tile)[None, :], scores, float("-inf"))


@gluon.jit
def _values_of(acc, acc_rest, weights, decay, buffers, barriers, tile, REST: gl.constexpr, STAGES: gl.constexpr,
               ACC: gl.constexpr, ACC_REST: gl.constexpr):  # fmt: skip
    _, _, v, v_rest = buffers
    _, _, v_ready, v_free = barriers
    stage = tile % STAGES
    acc, acc_rest = _shrink(acc, acc_rest, decay, REST, ACC, ACC_REST)
    weights = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, ACC, 2))
    mbarrier.wait(v_ready.index(stage), tile // STAGES & 1)
    acc, acc_rest = _start_values(acc, acc_rest, weights, matrix(v, stage), matrix(v_rest, stage), REST, ACC_REST)
    acc, acc_rest = _finish(acc, acc_rest, weights, REST)
    mbarrier.arrive(v_free.index(stage))
    return acc, acc_rest


@gluon.jit
def peeled(q, q_rest, buffers, barriers, state, first_tile, tiles, scale, REST: gl.constexpr, STAGES: gl.constexpr,
           SCORES: gl.constexpr, ACC: gl.constexpr, ACC_REST: gl.constexpr):  # fmt: skip
    """As `plain`, with the one tile that needs a mask ahead of the loop."""
    k, k_rest, _, _ = buffers
    k_ready, k_free, _, _ = barriers
    largest, total, acc, acc_rest = state
    scores = _first(q, q_rest, buffers, barriers, state, first_tile, scale, REST, SCORES)
    largest, total, weights, decay = _softmax(scores, largest, total, scale)
    acc, acc_rest = _values_of(acc, acc_rest, weights, decay, buffers, barriers, 0, REST, STAGES, ACC, ACC_REST)
    for tile in range(1, tiles):
        stage = tile % STAGES
        mbarrier.wait(k_ready.index(stage), tile // STAGES & 1)
        scores = _start_scores(q, q_rest, matrix(k, stage), matrix(k_rest, stage), REST, SCORES)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_free.index(stage))
        largest, total, weights, decay = _softmax(scores, largest, total, scale)
        acc, acc_rest = _values_of(acc, acc_rest, weights, decay, buffers, barriers, tile, REST, STAGES, ACC, ACC_REST)
    return largest, total, acc, acc_rest


@gluon.jit
def overlap(q, q_rest, buffers, barriers, turns, state, first_tile, tiles, scale, REST: gl.constexpr,
            STAGES: gl.constexpr, SCORES: gl.constexpr, ACC: gl.constexpr, ACC_REST: gl.constexpr,
            PINGPONG: gl.constexpr):  # fmt: skip
    """Starts the scores of a tile together with the values of the one before; the latter run under its softmax."""
    k, k_rest, v, v_rest = buffers
    k_ready, k_free, v_ready, v_free = barriers
    turn, next_turn, ahead = turns
    largest, total, acc, acc_rest = state
    PIECES: gl.constexpr = 2 if REST else 1
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    scores = _first(q, q_rest, buffers, barriers, state, first_tile, scale, REST, SCORES)
    largest, total, weights, decay = _softmax(scores, largest, total, scale)
    weights = gl.convert_layout(weights.to(v.dtype), OPERAND)
    for tile in range(1, tiles):
        stage = tile % STAGES
        mbarrier.wait(k_ready.index(stage), tile // STAGES & 1)
        before = (tile - 1) % STAGES
        mbarrier.wait(v_ready.index(before), (tile - 1) // STAGES & 1)
        if PINGPONG:
            mbarrier.wait(turn, (tile - 1 + ahead) & 1)
        scores = _start_scores(q, q_rest, matrix(k, stage), matrix(k_rest, stage), REST, SCORES)
        acc, acc_rest = _start_values(acc, acc_rest, weights, matrix(v, before), matrix(v_rest, before), REST, ACC_REST)
        if PINGPONG:
            mbarrier.arrive(next_turn)
        scores = warpgroup_mma_wait(PIECES, deps=(scores,))
        mbarrier.arrive(k_free.index(stage))
        largest, total, new_weights, decay = _softmax(scores, largest, total, scale)
        # It has been waited for; here it keeps the assembler from waiting for the products ahead of the softmax.
        mbarrier.wait(v_ready.index(before), (tile - 1) // STAGES & 1)
        acc, acc_rest = _finish(acc, acc_rest, weights, REST)
        mbarrier.arrive(v_free.index(before))
        acc, acc_rest = _shrink(acc, acc_rest, decay, REST, ACC, ACC_REST)
        weights = gl.convert_layout(new_weights.to(v.dtype), OPERAND)
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_ready.index(last), (tiles - 1) // STAGES & 1)
    acc, acc_rest = _start_values(acc, acc_rest, weights, matrix(v, last), matrix(v_rest, last), REST, ACC_REST)
    acc, acc_rest = _finish(acc, acc_rest, weights, REST)
    return largest, total, acc, acc_rest
