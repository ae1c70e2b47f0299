"""The operators as PyTorch sees them: schema, fake tensors, export, compilation. None of it runs in the interpreter."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import types
from collections.abc import Sequence
from importlib import import_module

import pytest
import torch
import triton
from support.golden import relative_error
from support.kernel_checks import INTERPRETED
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget

import lavin_kernels
from lavin_kernels import (
    Branches,
    ada_rms_norm,
    gated_residual,
    gated_residual_ada_rms_norm,
    qk_norm_rope,
    stream_linear,
    swiglu,
    tuning,
)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="opcheck and export fail in Triton's interpreter")

# Two branches of 2 + 1 cond and 1 + 1 x rows, 4 query and 2 key/value heads of 24, D = 96.
COND_LENS, X_LENS, HEAD_SIZE, WIDTH = (2, 1), (1, 1), 24, 96
SPLIT = sum(COND_LENS)
OPERATORS = ["ada_rms_norm", "gated_residual", "gated_residual_ada_rms_norm", "qk_norm_rope", "swiglu"]


class RowWise(torch.nn.Module):
    """What a block does row by row. The number of rows may vary, that of the cond stream does not."""

    def forward(self, residual, update, gate, scale, weight=None):
        normed = ada_rms_norm(residual, SPLIT, scale)
        residual = gated_residual(residual, update, SPLIT, gate)
        residual, normed = gated_residual_ada_rms_norm(residual, normed, SPLIT, gate, scale)
        return residual, swiglu(normed if weight is None else stream_linear(normed, SPLIT, weight))


class Rotary(torch.nn.Module):
    def forward(self, cond, x, table, branch_rows, positions, cos, sin, q_weight, k_weight):
        branches = Branches(COND_LENS, X_LENS, table, branch_rows)
        return qk_norm_rope(cond, x, branches, positions, cos, sin, q_weight, k_weight, HEAD_SIZE, 1e-6, 32)


def row_wise_arguments(rows: int = 5, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    residual, update = torch.randn(2, rows, WIDTH, generator=generator).to(dtype)
    gate, scale = torch.randn(2, 2, WIDTH, generator=generator)
    return [residual, update, gate, scale, torch.randn(2, 64, WIDTH, generator=generator).to(dtype)]


def rotary_arguments(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    branches = Branches.make(COND_LENS, X_LENS)
    qkv = torch.randn(5, 192, generator=generator).to(dtype)
    positions = torch.randint(8, (5, 3), generator=generator, dtype=torch.int32)
    angles = torch.randn(8, HEAD_SIZE // 6, generator=generator)
    weights = [torch.randn(2, size, generator=generator).to(dtype) for size in (96, 48)]
    # Both streams apart: a slice of a fake CUDA tensor asks for a CUDA build of PyTorch.
    rows = [qkv[:SPLIT].clone(), qkv[SPLIT:].clone()]
    return [*rows, branches.table, branches.branch_rows, positions, angles.cos(), angles.sin(), *weights]


def operator_arguments(name: str, dtype: torch.dtype) -> list:
    residual, update, gate, scale, _ = row_wise_arguments(dtype=dtype)
    cond, x, *rest = rotary_arguments(dtype)
    return {
        "ada_rms_norm": [residual, SPLIT, scale, 1e-6],
        "gated_residual": [residual, update, SPLIT, gate, 1e-6],
        "gated_residual_ada_rms_norm": [residual, update, SPLIT, gate, scale, 1e-6],
        "qk_norm_rope": [cond, x, list(COND_LENS), list(X_LENS), *rest, HEAD_SIZE, 1e-6, 32],
        "swiglu": [residual],
    }[name]


def on_fake_cuda(values: Sequence) -> list:
    """The same arguments as fake CUDA tensors; to be called in a fake tensor mode."""
    return [
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        if isinstance(value, torch.Tensor)
        else value
        for value in values
    ]


def registered(name: str) -> torch._ops.OpOverload:
    """What compiled graphs know an operator by; its registered name changes with the meaning of its results."""
    return getattr(torch.ops.lavin, {"qk_norm_rope": "qk_norm_rope_pairs"}.get(name, name)).default


@contextlib.contextmanager
def default_launches():
    """Launch configurations without a device to ask for its name."""
    with contextlib.ExitStack() as stack:
        for name in OPERATORS:
            stack.enter_context(tuning.override(name, **tuning.default_config(name, 90, torch.bfloat16)))
        yield


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, device):
    arguments = [
        value.to(device) if isinstance(value, torch.Tensor) else value
        for value in operator_arguments(name, torch.bfloat16)
    ]
    torch.library.opcheck(registered(name), arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_tensors_have_the_shapes_of_real_ones(name):
    operator = registered(name)
    arguments = operator_arguments(name, torch.bfloat16)
    real = operator(*arguments)
    with default_launches(), FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [operator(*arguments), operator(*on_fake_cuda(arguments))]
    for fake, device in zip(fakes, ["cpu", "cuda"], strict=True):
        for result, expected in zip(
            *(value if isinstance(value, tuple) else (value,) for value in (fake, real)), strict=True
        ):
            assert isinstance(result, FakeTensor) and result.device.type == device
            assert (result.shape, result.stride(), result.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_cuda_graphs_hold_the_kernels_and_write_nothing_but_their_outputs(monkeypatch):
    # PyTorch reads off Triton's intermediate code which arguments a kernel writes. Where it cannot, it copies them all.
    target = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    written = []
    with default_launches(), FakeTensorMode():
        for module, arguments in ((RowWise(), row_wise_arguments()[:4]), (Rotary(), rotary_arguments())):
            graph, _ = aot_export_module(module, on_fake_cuda(arguments), trace_joint=False)
            nodes = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
            written += [node.kwargs["tensors_to_clone"] for node in nodes]
            assert all(node.kwargs["grid"] == [(5, 1, 1)] for node in nodes)
    assert written == [
        ["out_ptr"],
        ["out_ptr"],
        ["residual_out_ptr", "normed_ptr"],
        ["out_ptr"],
        ["q_ptr", "k_ptr", "v_ptr"],
    ]


@pytest.mark.parametrize("strict", [False, True])
def test_export_for_any_number_of_rows(strict):
    rows = torch.export.Dim("rows", min=SPLIT + 2, max=1000)
    arguments = row_wise_arguments()
    shapes = [{0: rows}, {0: rows}, None, None, None]
    program = torch.export.export(RowWise(), tuple(arguments), dynamic_shapes=shapes, strict=strict)
    names = [str(node.target) for node in program.graph.nodes if "lavin" in str(node.target)]
    assert names == [
        "lavin.ada_rms_norm.default",
        "lavin.gated_residual.default",
        "lavin.gated_residual_ada_rms_norm.default",
        "lavin.swiglu.default",
    ]
    arguments = row_wise_arguments(9)
    for result, expected in zip(program.module()(*arguments), RowWise()(*arguments), strict=True):
        assert relative_error(result, expected) < 1e-6


def test_export_of_the_rotary_operator():
    arguments = rotary_arguments()
    program = torch.export.export(Rotary(), tuple(arguments))
    assert [str(node.target) for node in program.graph.nodes if "lavin" in str(node.target)] == [
        "lavin.qk_norm_rope_pairs.default"
    ]
    for result, expected in zip(program.module()(*arguments), Rotary()(*arguments), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_to_one_graph_with_the_results_of_eager(device):
    for module, arguments in ((RowWise(), row_wise_arguments()), (Rotary(), rotary_arguments())):
        arguments = [value.to(device) for value in arguments]
        results = torch.compile(module, fullgraph=True)(*arguments)
        for result, expected in zip(results, module(*arguments), strict=True):
            assert relative_error(result, expected) < 1e-6


def test_a_compiled_linear_writes_into_slices_without_a_copy():
    _, _, _, _, weight = row_wise_arguments()
    compiled = torch.compile(lambda rows: stream_linear(rows, SPLIT, weight), fullgraph=True)
    with torch.no_grad():
        _, [code] = run_and_get_code(compiled, torch.randn(50, WIDTH))
    assert code.count("extern_kernels.mm(") == 2 and "fused" not in code


def test_one_compilation_serves_every_number_of_rows():
    counter = CompileCounter()
    compiled = torch.compile(RowWise(), fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 9, 100):
        compiled(*row_wise_arguments(rows))
    assert counter.frame_count == 1


def test_public_names_are_functions_whatever_was_imported_first():
    code = (
        "import sys, lavin_kernels\n"
        "assert 'triton' not in sys.modules and 'lavin_kernels.ops.swiglu' not in sys.modules\n"
        "import lavin_kernels.ops.swiglu, lavin_kernels.ops.stream_linear\n"
        "from lavin_kernels import *\n"
        "for name in lavin_kernels.__all__:\n"
        "    assert callable(getattr(lavin_kernels, name)), name\n"
        "assert lavin_kernels.swiglu is swiglu and sys.modules['lavin_kernels.ops.swiglu'] is not swiglu\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert import_module("lavin_kernels.ops.swiglu").swiglu is lavin_kernels.swiglu
    with pytest.raises(AttributeError, match="module 'lavin_kernels' has no attribute 'swiglue'"):
        _ = lavin_kernels.swiglue


def test_without_triton_public_functions_are_the_references():
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import lavin_kernels, lavin_kernels.reference.dit\n"
        "assert lavin_kernels.swiglu is lavin_kernels.reference.dit.swiglu\n"
        "assert lavin_kernels.Branches.__module__ == 'lavin_kernels.branches'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
