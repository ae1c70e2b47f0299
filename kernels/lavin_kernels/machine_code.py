"""Reads NVIDIA machine code as `nvdisasm -c` prints it: instructions, loops, and what a loop of attention costs.

`python -m lavin_kernels.machine_code` compiles attention's forms and the row-wise kernels, without a GPU, and prints
their counts: what a multiprocessor spends on one tile of queries and keys in clocks of its four schedulers, its matrix
units and its exponentials. What is bound by the first could go faster with fewer instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
from collections.abc import Sequence

import torch

from lavin_kernels import tuning
from lavin_kernels.static import disassembled
from lavin_kernels.static_case import StaticCase

# Products of bfloat16, added in float32, that the matrix units of a multiprocessor do in a clock; registers, KiB of
# shared memory and threads that it has (CUDA C++ Programming Guide, data sheets).
PRODUCTS = {80: 1024, 90: 2048, 100: 4096}
EXPONENTIALS = 16
REGISTERS = 65536
SHARED = {80: 164, 90: 228, 100: 228}
THREADS = 2048
ROW_KERNELS = ("ada_norm", "qk_norm_rope", "swiglu")


@dataclasses.dataclass(frozen=True)
class Code:
    """Instructions in order, and the index that each label stands before."""

    instructions: list[str]
    labels: dict[str, int]

    @classmethod
    def of(cls, text: str) -> Code:
        """Of what `nvdisasm -c` prints."""
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"^(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.match(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*(/\*.*)?$", line):
                instructions.append(instruction[1])
        return cls(instructions, labels)

    def target(self, index: int) -> int:
        """Where a branch goes; of any other instruction, the instruction itself."""
        branch = re.search(r"BRA(?:\.\w+)*\s.*?`\((\.L_x_\d+)\)", self.instructions[index])
        return self.labels.get(branch[1], index) if branch else index

    def _loops(self) -> list[range]:
        """From the target of each backward branch to the branch."""
        branches = ((self.target(index), index) for index in range(len(self.instructions)))
        return [range(start, end + 1) for start, end in branches if start < end]

    def _within(self, loop: range) -> list[str]:
        """What every round of a loop does: without what a branch inside of it may pass over, as the mask that only the
        first tile of keys needs, or what one warp of many does.
        """
        passed: set[int] = set()
        for index in loop:
            if index < self.target(index) <= loop[-1]:
                passed.update(range(index + 1, self.target(index)))
        return [self.instructions[index] for index in loop if index not in passed]

    def main_loop(self) -> list[str]:
        """The shortest loop with matrix instructions and a softmax's exponentials in it."""
        loops = [(loop, self.instructions[loop.start : loop.stop]) for loop in self._loops()]
        found = [loop for loop, code in loops if count(code, "MUFU.EX2") >= 16 and count(code, "MMA")]
        return self._within(min(found, key=len))


def count(instructions: Sequence[str], name: str) -> int:
    """Instructions with `name` in them."""
    return sum(name in instruction for instruction in instructions)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of one compiled form of attention.

    Attributes:
        instructions: of a warp's main loop, for one tile of queries and keys, without what branches may pass over.
        issue, products, exponentials: clocks of a multiprocessor for that tile: of its four schedulers, of its matrix
            units with heads as they are padded, of its special-function units.
        registers: per thread as compiled; warp groups may move them among themselves.
        shared: bytes of shared memory per program.
        programs: how many fit on a multiprocessor at once.
    """

    instructions: int
    issue: float
    products: float
    exponentials: float
    registers: int
    shared: int
    programs: int


def attention_counts(config: tuning.Launch, capability: int) -> tuple[Counts, str]:
    """Of attention at the standard run's blocks in bfloat16 in a launch configuration, and the machine code."""
    attention = importlib.import_module("lavin_kernels.ops.joint_attention")
    kernel = attention.static_case(config, torch.bfloat16, x_only=False).compile(capability)
    usage, text = disassembled(kernel.asm["cubin"])
    loop = Code.of(text).main_loop()
    block_m, block_n = config["block_m"], config["block_n"]
    # A warp group of the Gluon form has 64 rows of its own and runs the whole loop.
    warps = block_m // 16 if config["variant"] == "gluon" else config["num_warps"]
    threads = int(re.findall(r"\.reqntid (\d+)", kernel.asm["ptx"])[0])
    shared = kernel.metadata.shared
    limits = (
        REGISTERS // (-(-usage["REG"] // 8) * 8 * threads),
        SHARED[capability] * 1024 // (shared + 1024),  # of which every program takes 1 KiB
        THREADS // threads,
    )
    counts = Counts(
        instructions=len(loop),
        issue=len(loop) * warps / 4,
        products=2 * block_m * block_n * sum(attention.head_pieces(72)) / PRODUCTS[capability],
        exponentials=count(loop, "MUFU") * warps * 32 / EXPONENTIALS,
        registers=usage["REG"],
        shared=shared,
        programs=min(limits),
    )
    return counts, text


def row_instructions(case: StaticCase, capability: int) -> int:
    """Instructions that all warps together issue for one program, of code without loops."""
    _, text = disassembled(case.compile(capability).asm["cubin"])
    code = Code.of(text).instructions
    return sum(not instruction.startswith("NOP") for instruction in code) * case.num_warps


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m lavin_kernels.machine_code", description="Counts in the machine code of the kernels."
    )
    parser.add_argument("--capability", type=int, nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    options = parser.parse_args(arguments)
    attention = importlib.import_module("lavin_kernels.ops.joint_attention")
    print("sm   attention (* default)    loop  issue  products  issue/products  exponentials  registers  KiB  programs")
    for capability in options.capability:
        default = dict(tuning.default_config("joint_attention", capability, torch.bfloat16))
        listed = [c for c in attention.CANDIDATES if c["num_stages"] == 2 and attention.fits(c, capability)]
        for config in [default, *([attention.PLAIN] if capability == 90 else []), *(c for c in listed if c != default)]:
            counts, _ = attention_counts(config, capability)
            name = f"{config['variant']} {config['block_m']}x{config['block_n']}"
            name += f" w{config['num_warps']} s{config['num_stages']}{' *' * (config == default)}"
            print(
                f"{capability:<5}{name:<24}{counts.instructions:>5}{counts.issue:>7.0f}{counts.products:>10.0f}"
                f"{counts.issue / counts.products:>16.2f}{counts.exponentials:>14.0f}{counts.registers:>11}"
                f"{counts.shared / 1024:>5.0f}{counts.programs:>10}",
                flush=True,
            )
    print("sm   row-wise kernel                        warps  instructions a program")
    for capability in options.capability:
        for module in ROW_KERNELS:
            for case in importlib.import_module(f"lavin_kernels.ops.{module}").static_cases(capability):
                if case.dtype == torch.bfloat16:
                    print(f"{capability:<5}{case.name:<39}{case.num_warps:>5}{row_instructions(case, capability):>24}")


if __name__ == "__main__":
    main()
