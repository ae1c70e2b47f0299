"""Compiles every kernel at the model's shapes for every target, without a GPU, and reads the machine code.

`python -m lavin_kernels.static` prints a table; a spill at a default launch configuration, more shared memory than the
target has, TF32 for float32 tensors, or attention that misses its matrix instructions is a violation.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lavin_kernels.static_case import StaticCase
from lavin_kernels.table import KERNELS, OPERATORS

CAPABILITIES = (80, 86, 89, 90, 100, 120)
# Those that launch kernels of their own.
MODULES = tuple(dict.fromkeys(OPERATORS[name].module for name in KERNELS.values()))
# KiB of shared memory that one block may ask for (CUDA C++ Programming Guide, compute capabilities).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# What one H200 reaches: the bytes/s of a copy and the FLOP/s of bfloat16 products as measured on such cards, and the
# float32 FLOP/s of its data sheet, since float32 products use no tensor core here. Times are for these on any target.
COPY = 4.3e12
MATMUL = {torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 67e12}
# Attention at head size 72: padding to 80 costs 1.11, so this leaves 8 % for masked parts of tiles.
MOST_EXECUTED = 1.2


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """What the compiler made of one kernel for one target.

    Attributes:
        name, dtype, num_warps, num_stages: of the case.
        capability: compute capability, such as 90.
        registers: per thread.
        stack: bytes of local memory per thread.
        spills: instructions that read or write local memory.
        shared: bytes of shared memory per block.
        mma_sync, wgmma, tcgen05: matrix instructions of the tensor cores, by generation.
        hgmma, wgmma_waits: Hopper's matrix instructions in the machine code, and the waits for them.
        tf32: matrix instructions in TF32.
        setmaxnreg: instructions that move registers between warps: present where warps are really specialised.
        bulk_copies: bulk tensor copies (TMA).
        useful_flops, executed_flops, bytes: of one launch, see `StaticCase`.
        failure: the first line of what the compiler said where it failed, and then nothing else is known.
    """

    name: str
    capability: int
    dtype: str
    num_warps: int
    num_stages: int
    useful_flops: int
    executed_flops: int
    bytes: int
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    mma_sync: int = 0
    wgmma: int = 0
    tcgen05: int = 0
    hgmma: int = 0
    wgmma_waits: int = 0
    tf32: int = 0
    setmaxnreg: int = 0
    bulk_copies: int = 0
    failure: str = ""

    @property
    def executed_over_useful(self) -> float:
        """Matrix work done for each that the mathematics needs; 0 where there is none."""
        return self.executed_flops / self.useful_flops if self.useful_flops else 0.0

    @property
    def least_microseconds(self) -> float:
        """What a launch takes at least on an H200: its bytes at the speed of a copy, or its executed matrix work."""
        rate = MATMUL[getattr(torch, self.dtype)]
        return 1e6 * max(self.bytes / COPY, self.executed_flops / rate)


def check(
    capabilities: Sequence[int] = CAPABILITIES,
    modules: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[CompileReport]:
    """Compiles every static case of the kernel modules, all by default, for every target. Triton caches its results.

    Args:
        capabilities, modules: which targets, and which kernels.
        progress: called with (cases done, cases in all, the next one's name).

    Raises:
        ValueError: a compute capability whose limits are not known.
        RuntimeError: Triton is not installed or has no NVIDIA disassembler beside it.
    """
    unknown = sorted(set(capabilities) - set(SHARED_KIB))
    if unknown:
        raise ValueError(f"capabilities has {unknown[0]}; expected some of {', '.join(map(str, SHARED_KIB))}")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed, and nothing can be compiled without it")
    loaded = [importlib.import_module(f"lavin_kernels.ops.{module}") for module in modules or MODULES]
    cases = [
        (case, capability)
        for capability in capabilities
        for module in loaded
        for case in module.static_cases(capability)
    ]
    reports: list[CompileReport] = []
    for case, capability in cases:
        if progress is not None:
            progress(len(reports), len(cases), f"{case.name} for {capability / 10}")
        reports.append(inspect(case, capability))
    return reports


def inspect(case: StaticCase, capability: int) -> CompileReport:
    """Compiles one case for one target."""
    report = CompileReport(
        name=case.name,
        capability=capability,
        dtype=str(case.dtype).removeprefix("torch."),
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        useful_flops=case.useful_flops,
        executed_flops=case.executed_flops,
        bytes=case.bytes,
    )
    try:
        kernel = case.compile(capability)
    except Exception as error:  # whatever Triton, LLVM or ptxas object to is a finding about the kernel
        return dataclasses.replace(report, failure=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    ptx = kernel.asm["ptx"]
    usage, code = disassembled(kernel.asm["cubin"])
    matrix = re.findall(r"^\s*(?:@\S+\s+)?((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*)", ptx, re.MULTILINE)
    return dataclasses.replace(
        report,
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=kernel.metadata.shared,
        mma_sync=sum(name.startswith("mma") for name in matrix),
        wgmma=sum(name.startswith("wgmma") for name in matrix),
        tcgen05=sum(name.startswith("tcgen05") for name in matrix),
        hgmma=code.count("HGMMA"),
        wgmma_waits=code.count("WARPGROUP.DEPBAR"),
        tf32=sum("tf32" in name for name in matrix),
        setmaxnreg=ptx.count("setmaxnreg."),
        bulk_copies=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
    )


def disassembled(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage of the one kernel in `cubin`, and its machine code as text."""
    import triton

    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        outputs = []
        for command in ([tools.cuobjdump.path, "--dump-resource-usage"], [tools.nvdisasm.path, "-c"]):
            try:
                run = subprocess.run([*command, path], capture_output=True, text=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise RuntimeError(f"{command[0]} of Triton cannot read machine code: {error}") from error
            outputs.append(run.stdout)
    function = outputs[0][outputs[0].index("Function ") :]
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", function)}, outputs[1]


def violations(reports: Sequence[CompileReport]) -> list[str]:
    """One line for everything that must not be, none for a sound set of kernels."""
    return [f"{report.name} for sm_{report.capability}: {fault}" for report in reports for fault in _faults(report)]


def _faults(report: CompileReport) -> list[str]:
    if report.failure:
        return [f"does not compile: {report.failure}"]
    faults = []
    limit = SHARED_KIB[report.capability]
    if report.spills or report.stack:
        faults.append(f"{report.spills} spills, {report.stack} bytes of stack at {report.registers} registers")
    if report.shared > limit * 1024:
        faults.append(f"{report.shared / 1024:.0f} KiB of shared memory, the target has {limit}")
    if report.dtype == "float32" and report.tf32:
        faults.append(f"{report.tf32} TF32 instructions for float32 tensors")
    if report.capability == 90 and report.name.startswith("joint_attention"):
        if report.dtype != "float32" and not report.wgmma:
            faults.append("no wgmma instructions")
        # Where the assembler gives up, every product waits for the one before: a wait for each, not one for a tile's.
        if 3 * report.wgmma_waits > report.hgmma:
            faults.append(f"{report.wgmma_waits} waits for {report.hgmma} products: they do not overlap")
        if report.executed_over_useful > MOST_EXECUTED:
            faults.append(f"{report.executed_over_useful:.2f} times the useful matrix work, at most {MOST_EXECUTED}")
    return faults


def table(reports: Sequence[CompileReport]) -> str:
    """The reports as text, one line each; matrix instructions by their PTX name."""
    header = (
        "kernel", "sm", "warps", "stages", "registers", "spills", "shared KiB", "matrix instructions", "TF32",
        "setmaxnreg", "TMA", "executed/useful", "MB", "GFLOP", "least us",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    for report in reports:
        kinds = {"mma.sync": report.mma_sync, "wgmma": report.wgmma, "tcgen05": report.tcgen05}
        matrix = " ".join(f"{kind} {count}" for kind, count in kinds.items() if count) or "-"
        row: tuple[str, ...] = (report.name, str(report.capability), str(report.num_warps), str(report.num_stages))
        if report.failure:
            rows.append((*row, report.failure[:60], *[""] * (len(header) - 5)))
            continue
        row += (str(report.registers), str(report.spills), f"{report.shared / 1024:.1f}", matrix, str(report.tf32))
        row += (str(report.setmaxnreg), str(report.bulk_copies))
        row += (f"{report.executed_over_useful:.2f}" if report.useful_flops else "-", f"{report.bytes / 1e6:.1f}")
        row += (f"{report.executed_flops / 1e9:.0f}", f"{report.least_microseconds:.1f}")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ceilings = f"least us: on one H200 at {COPY / 1e12} TB/s of copying and {MATMUL[torch.bfloat16] / 1e12:.0f} TFLOP/s"
    return "\n".join([*lines, f"{ceilings} in bfloat16, {MATMUL[torch.float32] / 1e12:.0f} in float32"])


def as_json(reports: Sequence[CompileReport]) -> str:
    """Reports, violations, versions and the ceilings assumed, as one JSON document."""
    import triton

    document = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": {
            "copy_bytes_per_second": COPY,
            "matmul_flops_per_second": {str(dtype).removeprefix("torch."): rate for dtype, rate in MATMUL.items()},
        },
        "violations": violations(reports),
        "reports": [
            {**dataclasses.asdict(report), "least_microseconds": round(report.least_microseconds, 3)}
            for report in reports
        ],
    }
    return json.dumps(document, indent=1) + "\n"


def _say(done: int, total: int, name: str) -> None:
    """Where it stands, on stderr: one line that changes on a terminal, else one for every tenth."""
    if sys.stderr.isatty():
        print(f"\r\033[Kcompiling {done + 1}/{total}: {name}", end="\n" if done + 1 == total else "", file=sys.stderr)
    elif done * 10 // total != (done - 1) * 10 // total:
        print(f"compiling {done + 1}/{total}: {name}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 where there is a violation."""
    parser = argparse.ArgumentParser(prog="python -m lavin_kernels.static", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--json", type=Path, help="write the reports to this file too")
    options = parser.parse_args(arguments)
    reports = check(options.capability, progress=_say)
    print(table(reports))
    if options.json:
        options.json.write_text(as_json(reports))
    found = violations(reports)
    for line in found:
        print(f"violation: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
