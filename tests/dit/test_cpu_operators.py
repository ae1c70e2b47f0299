"""What a packed step calls eagerly on a CPU, against the operators' plain meaning."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.golden import relative_error

from lavin_kernels import Branches
from lavin_kernels.reference import dit as reference
from lavin_rt.dit import cpu_operators

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 24
WIDTH, KV_WIDTH = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=LIMITS, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True, params=[2**19, 3 * WIDTH, 1])
def part(request, monkeypatch) -> None:
    """Everything at once, by three rows, and by one."""
    monkeypatch.setattr(cpu_operators, "PART", request.param)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_alike(results: torch.Tensor | tuple, truths: torch.Tensor | tuple, dtype: torch.dtype) -> None:
    both = [results, truths] if isinstance(results, tuple) else [[results], [truths]]
    for result, truth in zip(*both, strict=True):
        assert result.dtype == dtype and result.is_contiguous() and result.shape == truth.shape
        assert not len(truth) or relative_error(result.double(), truth) <= LIMITS[dtype]


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("split", [0, 5, 7])
def test_norms(dtype, split, wide):
    """With factors in float32, as a table of modulation has them, and in the dtype of the rows."""
    rows, update = (100 * numbers(7, WIDTH, dtype=dtype, seed=seed) for seed in range(2))
    of_factors = torch.promote_types(dtype, torch.float32) if wide else dtype
    gate, scale = (numbers(2, WIDTH, dtype=of_factors, seed=seed) for seed in range(2, 4))
    for name, arguments in {
        "ada_rms_norm": (rows, split, scale),
        "gated_residual_ada_rms_norm": (rows, update, split, gate, scale),
    }.items():
        exact = (value.double() if isinstance(value, torch.Tensor) else value for value in arguments)
        result = getattr(cpu_operators, name)(*arguments, 1e-6)
        assert_alike(result, getattr(reference, name)(*exact, 1e-6), dtype)


def test_swiglu(dtype):
    gate_up = numbers(7, 2 * WIDTH, dtype=dtype)
    assert_alike(cpu_operators.swiglu(gate_up), reference.swiglu(gate_up.double()), dtype)


@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("kept", [(), (2, 0, 3)])
@pytest.mark.parametrize("padded", [HEAD_SIZE, 32])
def test_queries_and_keys(dtype, with_queries, kept, padded):
    branches = Branches.make((3, 0, 4), (2, 1, 0), kept_lens=kept)
    joined = WIDTH + 2 * KV_WIDTH
    cond, x = numbers(7, joined, dtype=dtype), numbers(3, joined, dtype=dtype, seed=1)
    cond = cond if with_queries else cond[:, WIDTH:]
    angles = numbers(9, HEAD_SIZE // 6, dtype=torch.float64)
    tables = (angles.cos(), angles.sin())
    if dtype != torch.float64:
        tables = tuple(table.float() for table in tables)
    positions = torch.randint(0, 9, (10, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    weights = numbers(2, WIDTH, dtype=dtype, seed=3), numbers(2, KV_WIDTH, dtype=dtype, seed=4)

    def call(module, *values):
        *rows, cos, sin, q_weight, k_weight = values
        rotation = branches, positions, cos, sin, q_weight, k_weight, HEAD_SIZE, 1e-6
        if not kept:
            return module.qk_norm_rope(*rows, *rotation, padded)
        k, v = (torch.full((branches.keys, KV_HEADS, padded), 7, dtype=rows[0].dtype) for _ in range(2))
        k[..., HEAD_SIZE:], v[..., HEAD_SIZE:] = 0, 0
        return module.qk_norm_rope_into(*rows, k, v, *rotation), k, v

    values = cond, x, *tables, *weights
    assert_alike(call(cpu_operators, *values), call(reference, *(value.double() for value in values)), dtype)


def test_signatures_are_the_references():
    for name in ("ada_rms_norm", "gated_residual_ada_rms_norm", "qk_norm_rope", "qk_norm_rope_into", "swiglu"):
        assert inspect.signature(getattr(cpu_operators, name)) == inspect.signature(getattr(reference, name))
