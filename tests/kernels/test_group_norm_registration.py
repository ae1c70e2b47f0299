"""The autoencoder's operators as PyTorch sees them: schema, fake tensors, export, compilation. None is interpreted."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
import triton
from support.golden import relative_error
from support.kernel_checks import INTERPRETED
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget

from lavin_kernels import group_norm_silu, spatial_norm_silu, tuning

pytestmark = pytest.mark.skipif(INTERPRETED, reason="opcheck and export fail in Triton's interpreter")

OPERATORS = ["group_norm_silu", "spatial_norm_silu"]
GROUPS = 4


class Norms(torch.nn.Module):
    """Both norms of one tensor, as the decoder's and the encoder's blocks call them."""

    def forward(self, x, weight, bias, conv_y, conv_b):
        normed = spatial_norm_silu(x, weight, bias, GROUPS, conv_y, conv_b)
        return (group_norm_silu(normed, weight, bias, GROUPS),)


def inputs(latent_rows: int = 2, dtype: torch.dtype = torch.float32, frames: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 8, frames, 4 * latent_rows, 6), (8,), (8,), *[(2, 8, min(frames, 2), latent_rows, 3)] * 2]
    values = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return [value.contiguous(memory_format=torch.channels_last_3d) if value.dim() == 5 else value for value in values]


def operator_arguments(name: str, dtype: torch.dtype, frames: int = 3) -> list:
    x, weight, bias, conv_y, conv_b = inputs(dtype=dtype, frames=frames)
    return [x, weight, bias, GROUPS, *([conv_y, conv_b] if name == "spatial_norm_silu" else []), 1e-6]


def on_fake_cuda(values: list) -> list:
    """The same arguments as fake CUDA tensors; to be called in a fake tensor mode."""
    return [
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        if isinstance(value, torch.Tensor)
        else value
        for value in values
    ]


@contextlib.contextmanager
def default_launches():
    """Launch configurations without a device to ask for its name."""
    with contextlib.ExitStack() as stack:
        for name in ("channel_moments", *OPERATORS):
            stack.enter_context(tuning.override(name, **tuning.default_config(name, 90, torch.bfloat16)))
        yield


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, frames, dtype, device):
    arguments = [
        value.to(device) if isinstance(value, torch.Tensor) else value
        for value in operator_arguments(name, dtype, frames)
    ]
    torch.library.opcheck(getattr(torch.ops.lavin, name).default, arguments)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_fake_tensors_have_the_shapes_of_real_ones(name, frames):
    operator = getattr(torch.ops.lavin, name).default
    arguments = operator_arguments(name, torch.bfloat16, frames)
    real = operator(*arguments)
    with default_launches(), FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [operator(*arguments), operator(*on_fake_cuda(arguments))]
    for fake, device in zip(fakes, ["cpu", "cuda"], strict=True):
        assert isinstance(fake, FakeTensor) and fake.device.type == device
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_cuda_graphs_hold_the_kernels_and_write_nothing_but_their_outputs(monkeypatch):
    # PyTorch reads off Triton's intermediate code which arguments a kernel writes. Where it cannot, it copies them all.
    target = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    with default_launches(), FakeTensorMode():
        graph, _ = aot_export_module(Norms(), on_fake_cuda(inputs()), trace_joint=False)
    nodes = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    statistics = [["moments_ptr"], ["coefficients_ptr"]]
    assert [node.kwargs["tensors_to_clone"] for node in nodes] == 2 * [*statistics, ["out_ptr"]]


@pytest.mark.parametrize("strict", [False, True])
def test_export_for_any_number_of_rows(strict):
    rows = torch.export.Dim("rows", min=2, max=100)
    shapes = [{3: 4 * rows}, None, None, {3: rows}, {3: rows}]
    program = torch.export.export(Norms(), tuple(inputs()), dynamic_shapes=shapes, strict=strict)
    names = [str(node.target) for node in program.graph.nodes if "lavin" in str(node.target)]
    assert names == ["lavin.spatial_norm_silu.default", "lavin.group_norm_silu.default"]
    arguments = inputs(5)
    assert relative_error(program.module()(*arguments)[0], Norms()(*arguments)[0]) < 1e-6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_to_one_graph_with_the_results_of_eager(device):
    arguments = [value.to(device) for value in inputs()]
    (result,) = torch.compile(Norms(), fullgraph=True)(*arguments)
    assert result.is_contiguous(memory_format=torch.channels_last_3d)
    assert relative_error(result, Norms()(*arguments)[0]) < 1e-6


def test_one_compilation_serves_every_number_of_rows():
    counter = CompileCounter()
    compiled = torch.compile(Norms(), fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 7, 9):  # unlike every other size: PyTorch takes sizes that are equal once to be always
        compiled(*inputs(rows))
    assert counter.frame_count == 1
