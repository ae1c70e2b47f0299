"""The Gluon kernel's arithmetic and protocol on a CPU, by stand-ins for the language, and its place in the launcher.

Its machine code is checked with that of the other forms; that it runs right and fast on a GPU is not shown here.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from support import gluon_stand_in
from test_joint_attention import assert_in_budget, inputs

from lavin_bench.kernels import tune
from lavin_kernels import joint_attention, tuning
from lavin_kernels.launch import interpreted
from lavin_kernels.reference import dit as reference

SOURCE = gluon_stand_in.source("joint_attention_gluon")


def launch(q, k, v, branches, head_size, *, groups, block_n, stages, source=SOURCE):
    """Both results, every program of the grid run after the other."""
    rows, heads = q.shape[:2]
    out = torch.full((rows, heads * head_size), float("nan"), dtype=q.dtype)
    lse = torch.full((rows, heads), float("nan"))
    width, rest = {24: (32, 0), 72: (64, 16)}[head_size]
    sources = [
        gluon_stand_in.Descriptor(part, head_size, tile_rows, piece or width)
        for part, tile_rows in zip((q, k, v), (64, block_n, block_n), strict=True)
        for piece in (width, rest)
    ]
    pointers = [gluon_stand_in.Pointer(tensor) for tensor in (out, lse, branches.table)]
    count = len(branches.cond_lens)
    for program in range((rows // (64 * groups) + count) * heads):
        gluon_stand_in.kernel_of(source, "joint_attention_gluon_kernel", program)(
            *sources,
            *pointers,
            count,
            head_size**-0.5 * math.log2(math.e),
            HEADS=heads,
            GROUP=heads // k.shape[1],
            HEAD_SIZE=head_size,
            WIDTH=width,
            REST=rest,
            X_ONLY=rows != k.shape[0],
            WITH_LSE=True,
            MAX_BRANCHES=4,
            GROUPS=groups,
            BLOCK_N=block_n,
            STAGES=stages,
            REGISTERS=0,
        )
    return out, lse


def check(cond_lens, x_lens, *, groups=3, block_n=16, stages=2, head_size=72, x_only=False, source=SOURCE):
    q, k, v, branches = inputs(cond_lens, x_lens, heads=4, kv_heads=2, head_size=head_size, stored=80, x_only=x_only)
    q, k, v = (part.bfloat16() for part in (q, k, v))
    for part in (q, k, v):
        part[..., head_size:] = float("nan")
    out, lse = launch(q, k, v, branches, head_size, groups=groups, block_n=block_n, stages=stages, source=source)
    plain = reference.joint_attention_with_lse(q, k, v, branches, head_size)
    truth = reference.joint_attention_with_lse(q.double(), k.double(), v.double(), branches, head_size)
    assert_in_budget(out, plain[0], truth[0], torch.bfloat16)
    assert_in_budget(lse, plain[1], truth[1], torch.float32)


@pytest.mark.parametrize(
    ("cond_lens", "x_lens"),
    [
        ((70, 37), (40, 9)),  # two branches, the second shorter than one tile of queries
        ((0, 120, 32), (33, 5, 0)),  # an empty stream each, the longest in the middle
        ((192,), (0,)),  # whole tiles only
    ],
)
@pytest.mark.parametrize(("groups", "block_n", "stages"), [(3, 16, 2), (2, 32, 3)])
def test_results(cond_lens, x_lens, groups, block_n, stages):
    check(cond_lens, x_lens, groups=groups, block_n=block_n, stages=stages)


@pytest.mark.parametrize("head_size", [24, 72])
def test_x_queries_alone_and_one_piece(head_size):
    check((70, 37), (40, 9), groups=2, stages=4, head_size=head_size, x_only=True)


MUTATIONS = {
    "one key too many": ("columns < first_tile", "columns <= first_tile"),
    "second tile at another row": ("gl.where(tile == 0, first_tile, BLOCK_N)", "BLOCK_N"),
    "keys of another stage": ("_matrix(k, stage), _matrix(k_rest, stage)", "_matrix(k, 0), _matrix(k_rest, stage)"),
    "wrong key/value head": ("kv_head * GROUP + program % GROUP,", "program % GROUP * 2 + kv_head,"),
    "swapped streams": ("gl.where(rows < cond, cond_start", "gl.where(rows >= cond, cond_start"),
    "queries of the first group": ("query_row + group * ROWS", "query_row"),
    "values of earlier tiles": ("acc = acc * gl.convert_layout", "acc = acc * 1 + 0 * gl.convert_layout"),
    "producer waits for a full buffer": ("(tile // STAGES & 1) ^ 1", "tile // STAGES & 1"),
    "consumer frees no values": ("mbarrier.arrive(v_free.index(stage))", "pass"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_kernel_is_caught(name, monkeypatch):
    line, instead = MUTATIONS[name]
    assert SOURCE.count(line) == 1
    monkeypatch.setattr(gluon_stand_in, "PATIENCE", 1.0)
    with pytest.raises(AssertionError):
        check((150, 37), (40, 9), source=SOURCE.replace(line, instead))


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid, kwargs))


LONG = ((900, 200), (100, 60))


@pytest.mark.skipif(interpreted(), reason="the interpreter takes tensors of a CPU to the Triton kernel")
@pytest.mark.parametrize(
    ("lens", "x_only", "capability", "dtype", "groups"),
    [
        (LONG, False, 90, torch.bfloat16, 3),
        (LONG, True, 90, torch.float16, 2),
        (((900, 100), (100, 20)), False, 90, torch.bfloat16, None),
        (LONG, False, 90, torch.float32, None),
        (LONG, False, 80, torch.bfloat16, None),
        (LONG, False, 100, torch.bfloat16, None),
        (LONG, False, 120, torch.bfloat16, None),
    ],
    ids=["blocks", "last block", "a branch shorter than a tile", "float32", "sm_80", "sm_100", "sm_120"],
)
def test_when_it_is_launched(lens, x_only, capability, dtype, groups, monkeypatch):
    module = importlib.import_module("lavin_kernels.ops.joint_attention")
    hopper = importlib.import_module("lavin_kernels.ops.joint_attention_gluon")
    gluon, triton = Recorder(), Recorder()
    monkeypatch.setattr(hopper, "joint_attention_gluon_kernel", gluon)
    monkeypatch.setattr(module, "joint_attention_kernel", triton)
    monkeypatch.setattr("lavin_kernels.launch.runs_kernel", lambda device: True)
    monkeypatch.setattr(tuning, "capability", lambda device: capability)
    config = next(
        c for c in module.CANDIDATES if c["variant"] == "gluon" and (c["block_m"], c["block_n"]) == (192, 128)
    )
    q, k, v, branches = inputs(*lens, dtype=dtype, x_only=x_only)
    with tuning.override("joint_attention", **config):
        joint_attention(q, k, v, branches, 72)
    (recorded,) = gluon.launches + triton.launches
    if groups:
        assert gluon.launches and recorded[1]["GROUPS"] == groups
        assert recorded[0] == ((q.shape[0] // (64 * groups) + 2) * 2,)
    else:
        plain = tuning.default_config("joint_attention", capability, dtype)
        plain = module.PLAIN if plain["variant"] == "gluon" else plain
        assert [recorded[1][key] for key in ("BLOCK_M", "num_warps")] == [plain["block_m"], plain["num_warps"]]


def test_only_what_a_target_compiles_is_a_candidate(monkeypatch):
    """The compiler ends the process over the Gluon form's instructions on another target."""
    module = importlib.import_module("lavin_kernels.ops.joint_attention")
    for capability in (80, 89, 100, 120):
        assert {c["variant"] for c in tune.candidates("joint_attention", capability)} == {"pointer"}
    assert tune.candidates("joint_attention", 90) == module.CANDIDATES
    monkeypatch.setattr(module, "_GLUON", False)  # an older Triton
    assert {c["variant"] for c in tune.candidates("joint_attention", 90)} == {"pointer"}


@pytest.mark.parametrize(("head", "stages"), [(32, 4), (80, 4), (128, 2)])
def test_as_many_stages_as_shared_memory_holds(head, stages):
    """A launch is tuned at one size of heads and taken for all of a dtype."""
    form = importlib.import_module("lavin_kernels.ops.joint_attention_gluon").form(192, 128, 4, head)
    assert form["STAGES"] == stages
    assert 2 * head * (192 + 2 * stages * 128) <= 227 * 1024 - 2048
