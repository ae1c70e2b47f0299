"""Attention as an operator: registration, traces, bad input, and machine code for every target, all without a GPU.

Needs a process without Triton's interpreter: what it runs is neither traced nor compiled.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lavin_kernels import Branches, joint_attention, joint_attention_with_lse, tuning
from lavin_kernels.launch import interpreted
from lavin_kernels.reference import dit as reference

module = importlib.import_module("lavin_kernels.ops.joint_attention")

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter can neither trace nor compile a kernel")

SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB for one block
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def inputs(x_only=False):
    torch.manual_seed(0)
    q = torch.randn(6 if x_only else 22, 4, 24)
    k, v = torch.randn(22, 2, 24), torch.randn(22, 2, 24)
    return q, k, v, Branches.make((11, 5), (4, 2)), 24


class Attend(torch.nn.Module):
    """Both operators over fixed branches."""

    def __init__(self, branches: Branches, head_size: int):
        super().__init__()
        self.branches, self.head_size = branches, head_size

    def forward(self, q, k, v):
        out, lse = joint_attention_with_lse(q * 2, k, v, self.branches, self.head_size)
        return joint_attention(q, k, v, self.branches, self.head_size) + out, lse


@pytest.mark.parametrize("x_only", [False, True])
@pytest.mark.parametrize("name", ["joint_attention", "joint_attention_with_lse"])
def test_opcheck(name, x_only):
    torch.library.opcheck(getattr(torch.ops.lavin, name).default, module._checked(*inputs(x_only), None))


def test_on_a_cpu_it_is_the_reference():
    q, k, v, branches, head_size = inputs()
    out, lse = reference.joint_attention_with_lse(q, k, v, branches, head_size)
    assert torch.equal(joint_attention(q, k, v, branches, head_size), out)
    assert torch.equal(joint_attention_with_lse(q, k, v, branches, head_size)[1], lse)
    double = joint_attention(q.double(), k.double(), v.double(), branches, head_size)
    assert double.dtype == torch.float64


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend):
    q, k, v, branches, head_size = inputs()
    attend = Attend(branches, head_size)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)(q, k, v)
    for result, expected in zip(compiled, attend(q, k, v), strict=True):
        torch.testing.assert_close(result, expected)


def test_exports():
    q, k, v, branches, head_size = inputs(x_only=True)
    attend = Attend(branches, head_size)
    program = torch.export.export(attend, (q, k, v))
    names = {node.target.name() for node in program.graph.nodes if hasattr(node.target, "name")}
    assert {"lavin::joint_attention", "lavin::joint_attention_with_lse"} <= names
    for result, expected in zip(program.module()(q, k, v), attend(q, k, v), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("x_only", [False, True])
def test_a_trace_for_cuda_holds_the_pointer_kernel(x_only, monkeypatch):
    """Traced without a GPU: descriptors need addresses, so graphs get the form of the kernel that needs none."""
    config = tuning.default_config("joint_attention", 90, torch.bfloat16)
    assert config["variant"] == "gluon"
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    rows, heads = 6 if x_only else 22, 4
    with FakeTensorMode(), tuning.override("joint_attention", **config):
        q = torch.empty(rows, heads, 80, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.empty(22, 2, 80, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        table = torch.empty(2, 4, device="cuda", dtype=torch.int32)
        graph = make_fx(lambda *parts: module._launch(*parts, 200, 72, 0.1, with_lse=False)[0])(q, k, v, table)
    config = module.PLAIN
    (launch,) = (node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target))
    constants = launch.kwargs["kwargs"]
    assert constants["BLOCK_M"] == config["block_m"] and constants["X_ONLY"] is x_only
    assert launch.kwargs["grid"] == [((rows // config["block_m"] + 2) * heads, 1, 1)]
    out = graph.graph.find_nodes(op="output")[0].args[0].meta["val"]
    assert out.shape == (rows, heads * 72) and out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"q": None}, TypeError, "q is of type NoneType"),
        ({"q": torch.zeros(22, 4, 24, dtype=torch.int32)}, TypeError, "q has dtype int32"),
        ({"q": torch.zeros(22, 96)}, ValueError, "q has shape"),
        ({"q": torch.zeros(21, 4, 24)}, ValueError, "q has 21 rows; expected 22, or the 6"),
        ({"q": torch.zeros(22, 3, 24)}, ValueError, "k has 2 heads"),
        ({"q": torch.zeros(22, 24, 4).transpose(1, 2)}, ValueError, "q has stride"),
        ({"q": torch.zeros(22, 4, 16)}, ValueError, "q stores 16 elements a head"),
        ({"k": torch.zeros(22, 2, 24, dtype=torch.bfloat16)}, TypeError, "k has dtype bfloat16"),
        ({"k": torch.zeros(23, 2, 24)}, ValueError, "k has 23 rows; expected 22"),
        ({"k": torch.zeros(22, 2, 24, device="meta")}, ValueError, "k is on meta"),
        ({"v": torch.zeros(22, 1, 24)}, ValueError, "v has 1 heads"),
        ({"v": torch.zeros(20, 2, 24)}, ValueError, "v has 20 rows"),
        ({"branches": [11, 5]}, TypeError, "branches is of type list"),
        ({"branches": Branches.make((30,), (4,))}, ValueError, "k has 22 rows; expected 34"),
        ({"branches": Branches.make((11, 5), (4, 2), "meta")}, ValueError, "branches.table is on meta"),
        ({"head_size": 24.0}, TypeError, "head_size is of type float"),
        ({"head_size": 20}, ValueError, "head_size is 20"),
        ({"head_size": 136}, ValueError, "head_size is 136"),
        ({"scale": 0.0}, ValueError, "scale is 0.0"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
    ],
)
def test_bad_input_is_named(change, error, names):
    arguments = dict(zip(("q", "k", "v", "branches", "head_size"), inputs(), strict=True)) | change
    for operator in (joint_attention, joint_attention_with_lse):
        with pytest.raises(error, match=re.escape(names)):
            operator(**arguments)


@pytest.mark.parametrize(
    ("head_size", "pieces"),
    [(8, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (88, (64, 32)), (104, (128, 0))],
)
def test_head_pieces_are_the_least_that_one_or_two_powers_of_two_cover(head_size, pieces):
    assert module.head_pieces(head_size) == pieces


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_executed_matrix_work_of_the_standard_run(capability):
    for case in module.static_cases(capability):
        assert 1 <= case.executed_flops / case.useful_flops <= 1.2, case.name


def disassembled(cubin: bytes, folder: Path) -> tuple[int, int, str]:
    """Registers and bytes of stack of a thread, and the machine code."""
    (folder / "kernel.cubin").write_bytes(cubin)
    output = [
        subprocess.run([tool, *options, folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
        for tool, options in ((TOOLS / "cuobjdump", ["-res-usage"]), (TOOLS / "nvdisasm", ["-c"]))
    ]
    registers, stack = (int(re.search(rf"{field}:(\d+)", output[0])[1]) for field in ("REG", "STACK"))
    return registers, stack, output[1]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_machine_code(capability, tmp_path):
    """No spills, shared memory within the limit, the target's matrix instructions, and float32 that is float32."""
    for case in module.static_cases(capability):
        compiled = case.compile(capability)
        ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
        _, stack, code = disassembled(compiled.asm["cubin"], tmp_path)
        assert stack == 0 and not re.search(r"\b(STL|LDL)\b", code), case.name
        assert shared <= SHARED_LIMIT[capability] * 1024, case.name
        if case.dtype == torch.float32:
            assert "tf32" not in ptx and "mma" not in ptx, case.name
            continue
        instruction = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")
        assert instruction in ptx, case.name
        assert ("cp.async.bulk.tensor" in ptx) == ("/gluon/" in case.name), case.name
        assert ("setmaxnreg" in ptx) == ("/gluon/" in case.name), case.name
        if capability == 90:
            # Where the assembler gives up, every wgmma waits for the one before: one wait for each, instead of one for
            # the products of a tile.
            assert 3 * code.count("WARPGROUP.DEPBAR") < code.count("HGMMA"), case.name
