"""What becomes of a kernel on its way into a plugin, and what is refused."""

from __future__ import annotations

import re

import pytest
import triton
import triton.language as tl

from lavin_export import trt_kernels as kernels
from lavin_kernels.launch import interpreted

pytestmark = pytest.mark.skipif(interpreted(), reason="compiles, which the interpreter does not")

PTX = """
.version 8.0
.target sm_90a
.visible .entry copy(
	.param .u64 .ptr .global .align 16 copy_param_0,
	.param .u32 copy_param_1,
	.param .u64 .ptr .global .align 1 copy_param_2,
	.param .u64 copy_param_3
)
.reqntid 128
{
	ld.param.b64 %rd1, [copy_param_0];
}
"""


def parameters(ptx: str) -> int:
    return len(re.search(r"\.entry \w+\(([^)]*)\)", ptx).group(1).split(","))


def test_parameters_that_nothing_reads_go():
    stripped = kernels.without_hidden_parameters(PTX, "copy", 2)
    assert parameters(PTX) == 4 and parameters(stripped) == 2
    assert "copy_param_1\n)" in stripped and "copy_param_2" not in stripped
    assert stripped.partition(")")[2] == PTX.partition(")")[2]
    assert parameters(kernels.without_hidden_parameters(PTX, "copy", 4)) == 4


def test_parameters_that_are_read_stay():
    read = PTX.replace("[copy_param_0];", "[copy_param_0];\n\tld.param.b64 %rd2, [copy_param_3];")
    with pytest.raises(ValueError, match="reads copy_param_3"):
        kernels.without_hidden_parameters(read, "copy", 2)
    with pytest.raises(ValueError, match="no entry move"):
        kernels.without_hidden_parameters(PTX, "move", 2)
    with pytest.raises(ValueError, match="has 4 parameters; expected 5"):
        kernels.without_hidden_parameters(PTX, "copy", 5)


def test_only_as_many_parameters_as_tensorrt_passes_and_ptx_that_old_drivers_read():
    arguments = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16"}
    for capability, version, target in ((80, "7.8", "sm_80"), (89, "7.8", "sm_89"), (90, "8.0", "sm_90a")):
        constants = {"INNER": 256, "BLOCK": 128}
        kernel = kernels.compile_kernel(kernels.lavin_swiglu, arguments, constants, capability, 2)
        assert parameters(kernel.ptx) == 2 and kernel.threads == 64
        assert ".debug" not in kernel.ptx and ".py" not in kernel.ptx and "kernels/" not in kernel.ptx
        assert f".version {version}\n" in kernel.ptx and f".target {target}\n" in kernel.ptx


@triton.jit
def product(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + rows * N + columns), tl.load(b_ptr + rows * N + columns)
    tl.store(out_ptr + rows * N + columns, tl.dot(a, b).to(tl.bfloat16))


@triton.jit
def through_descriptor(a_ptr, out_ptr, N: tl.constexpr):
    source = tl.make_tensor_descriptor(a_ptr, [N, N], [N, 1], [N, N])
    target = tl.make_tensor_descriptor(out_ptr, [N, N], [N, 1], [N, N])
    target.store([0, 0], source.load([0, 0]))


def test_too_much_shared_memory_is_refused():
    arguments = dict.fromkeys(["a_ptr", "b_ptr", "out_ptr"], "*bf16")
    assert kernels.compile_kernel(product, arguments, {"N": 64}, 90, 4).shared <= kernels.MOST_SHARED
    with pytest.raises(ValueError, match="bytes of shared memory; a plugin has 49152"):
        kernels.compile_kernel(product, arguments, {"N": 256}, 90, 8)


def test_scratch_memory_is_refused():
    with pytest.raises(ValueError, match="bytes of scratch memory"):
        kernels.compile_kernel(through_descriptor, dict.fromkeys(["a_ptr", "out_ptr"], "*bf16"), {"N": 64}, 100, 4)
