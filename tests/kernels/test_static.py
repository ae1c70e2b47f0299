"""Kernels compiled for every target without a GPU: what the machine code holds, and what counts as a violation."""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from support import kernel_checks

from lavin_kernels import static
from lavin_kernels.launch import row_case
from lavin_kernels.static import CAPABILITIES, MODULES, CompileReport, check, inspect, violations

pytestmark = pytest.mark.skipif(kernel_checks.INTERPRETED, reason="the interpreter compiles nothing")


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr):
    outer, inner = tl.arange(0, SIZE), tl.arange(0, INNER)
    a = tl.load(a_ptr + outer[:, None] * INNER + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * SIZE + outer[None, :])
    tl.store(out_ptr + outer[:, None] * SIZE + outer[None, :], tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def broken_kernel(a_ptr, SIZE: tl.constexpr):
    tl.store(a_ptr + tl.arange(0, SIZE), 1)


def product(dtype: torch.dtype, precision: str = "ieee", size: int = 64, inner: int = 64):
    constexprs = {"SIZE": size, "INNER": inner, "PRECISION": precision}
    return row_case("product", product_kernel, dtype, constexprs, 4, 3 * size * size)


def sound(**changed) -> CompileReport:
    fields = {"dtype": "bfloat16", "num_warps": 8, "num_stages": 3, "useful_flops": 100, "executed_flops": 112}
    return CompileReport(
        **{"name": "joint_attention/x", "capability": 90, "bytes": 8, "wgmma": 26, **fields, **changed}
    )


def test_one_kernel_for_one_target():
    reports = check((90,), ("swiglu",))
    assert [(report.name, report.capability) for report in reports] == [("swiglu/bfloat16", 90), ("swiglu/float32", 90)]
    assert not violations(reports)
    for report in reports:
        assert 16 <= report.registers <= 64 and (report.spills, report.stack, report.shared) == (0, 0, 0)
        assert not report.mma_sync + report.wgmma + report.tcgen05 + report.bulk_copies + report.setmaxnreg
    # Three times 13,312 x 6144 elements of two bytes at 4.3 TB/s.
    assert reports[0].bytes == 490_733_568 and reports[0].least_microseconds == pytest.approx(114.1, abs=0.1)


@pytest.mark.parametrize(("capability", "kind"), [(80, "mma_sync"), (90, "wgmma"), (100, "tcgen05"), (120, "mma_sync")])
def test_matrix_instructions_are_told_apart(capability, kind):
    report = inspect(product(torch.bfloat16), capability)
    found = {name for name in ("mma_sync", "wgmma", "tcgen05") if getattr(report, name)}
    assert found == {kind} and not violations([report])


def test_tf32_is_a_violation():
    assert not violations([inspect(product(torch.float32, size=16, inner=16), 80)])
    report = inspect(product(torch.float32, "tf32", size=16, inner=16), 80)
    assert report.tf32 > 0
    assert violations([report]) == [f"product/float32 for sm_80: {report.tf32} TF32 instructions for float32 tensors"]


def test_a_huge_tile_is_a_violation():
    # Two accumulators of 256 elements a lane.
    case = next(
        case for case in import_module("lavin_kernels.ops.group_norm").static_cases(90) if "moments" in case.name
    )
    report = inspect(dataclasses.replace(case, constexprs={**case.constexprs, "BLOCK_P": 256}, num_warps=4), 90)
    assert report.spills > 0
    (line,) = violations([report])
    assert line.startswith(f"{case.name} for sm_90: {report.spills} spills")


def test_shared_memory_beyond_the_target_is_a_violation():
    case = product(torch.bfloat16, size=128, inner=256)
    assert not violations([inspect(case, 90)])
    # It spills too.
    assert "product/bfloat16 for sm_89: 128 KiB of shared memory, the target has 99" in violations([inspect(case, 89)])


def test_a_kernel_that_does_not_compile_is_a_violation():
    case = row_case("broken", broken_kernel, torch.float32, {"SIZE": 3}, 4, 0)
    report = inspect(case, 90)
    assert violations([report])[0].startswith("broken/float32 for sm_90: does not compile: ")
    assert "broken/float32" in static.table([report])


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"shared": 227 * 1024 + 16}, "227 KiB of shared memory, the target has 227"),
        ({"wgmma": 0}, "no wgmma instructions"),
        ({"executed_flops": 125}, "1.25 times the useful matrix work, at most 1.2"),
        ({"spills": 2, "stack": 8, "registers": 255}, "2 spills, 8 bytes of stack at 255 registers"),
    ],
)
def test_faults_of_attention(changed, fault):
    assert not violations([sound()])
    assert violations([sound(**changed)]) == [f"joint_attention/x for sm_90: {fault}"]


def test_unknown_target():
    with pytest.raises(ValueError, match="capabilities has 75; expected some of 80, 86, 89, 90, 100, 120"):
        check((90, 75))


def test_every_module_with_cases_is_compiled():
    folder = Path(static.__file__).parent / "ops"
    found = {path.stem for path in folder.glob("*.py") if "def static_cases(" in path.read_text()}
    assert found == set(MODULES)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(static, "MODULES", ("swiglu",))
    file = tmp_path / "static.json"
    assert static.main(["--capability", "90", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["violations"] == [] and document["ceilings"]["copy_bytes_per_second"] == 4.3e12
    assert [report["name"] for report in document["reports"]] == ["swiglu/bfloat16", "swiglu/float32"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["kernel", "sm"] and lines[1].split()[:2] == ["swiglu/bfloat16", "90"]
    monkeypatch.setattr(static, "_faults", lambda report: ["bad"])
    assert static.main(["--capability", "90"]) == 1
    assert "violation: swiglu/bfloat16 for sm_90: bad" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_violations(capability):
    reports = check((capability,))
    assert violations(reports) == []
    assert {report.name.split("/")[0] for report in reports} >= {
        "ada_rms_norm", "gated_residual", "gated_residual_ada_rms_norm", "qk_norm_rope", "swiglu", "joint_attention",
        "channel_moments", "group_moments", "group_norm_silu", "spatial_norm_silu",
    }  # fmt: skip
    assert {report.dtype for report in reports if report.name.startswith("joint_attention")} == {"bfloat16", "float32"}
    for report in reports:
        # Of the tensor cores only what float32 must not use, and on Hopper the warp-group products.
        assert not (report.dtype == "float32" and report.mma_sync + report.wgmma + report.tcgen05)
        if capability == 90 and report.name.startswith("joint_attention") and report.dtype == "bfloat16":
            assert report.wgmma and not report.mma_sync
