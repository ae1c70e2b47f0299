"""The denoiser with kernels inside that CUDA packages are compiled from."""

from __future__ import annotations

import pytest
import torch
from support.golden import relative_error
from support.kernel_checks import INTERPRETED, run_under_interpreter

from lavin_export.networks.denoiser import BranchDenoiser, dynamic_shapes, example_inputs
from lavin_export.networks.kernel_denoiser import KernelDenoiser


def test_under_the_interpreter():
    if not INTERPRETED:
        run_under_interpreter(__file__, "not slow")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter cannot be traced")
def test_graph_with_kernels_is_captured(golden_dit):
    """The graph that CUDA packages are compiled from, on the CPU: one operator of ours for every step of a block,
    every size free. With one branch the references compute it.
    """
    dit = golden_dit("dit_c")
    with torch.no_grad():
        program = torch.export.export(KernelDenoiser(dit), example_inputs(dit.config), dynamic_shapes=dynamic_shapes())
        called = [
            str(node.target).removesuffix(".default") for node in program.graph.nodes if "lavin." in str(node.target)
        ]
        inputs = example_inputs(dit.config, sizes=(1, 1, 5, 8, 4))
        error = relative_error(program.module()(*inputs), BranchDenoiser(dit)(*inputs))
    names = {"lavin.qk_norm_rope_pairs": 2, "lavin.joint_attention": 2, "lavin.swiglu": 2, "lavin.ada_rms_norm": 1}
    names["lavin.gated_residual_ada_rms_norm"] = 4
    assert {name: called.count(name) for name in set(called)} == names
    assert error < 1e-5


@pytest.mark.skipif(not INTERPRETED, reason="runs under Triton's interpreter, see above")
def test_kernels_compute_several_branches(golden_dit):
    dit = golden_dit("dit_c")
    inputs = example_inputs(dit.config, sizes=(3, 1, 2, 4, 2))
    with torch.no_grad():
        assert relative_error(KernelDenoiser(dit)(*inputs), BranchDenoiser(dit)(*inputs)) < 1e-5
