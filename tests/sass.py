"""Hazards of Hopper's asynchronous matrix instructions in machine code."""

from __future__ import annotations

import re
from collections import deque

from lavin_kernels.machine_code import Code

_NONE = (frozenset(), frozenset())
# Instructions whose first operand is no register that they write.
_NO_RESULT = (
    *("ST", "BAR", "BRA", "SYNCS", "UTMALDG", "RED", "EXIT", "WARP", "MEMBAR", "FENCE", "BSYNC", "BSSY", "NOP"),
    *("ISETP", "FSETP", "R2UR", "PLOP3", "VOTE", "R2P"),
)


def successors(code: Code, index: int) -> list[int]:
    """Indices of instructions that may follow."""
    instruction, after = code.instructions[index], []
    branch = code.target(index) != index
    if branch:
        after.append(code.target(index))
    if instruction.startswith("BRX"):
        after += [code.labels[label] for label in re.findall(r"\.L_x_\d+", instruction) if label in code.labels]
    always = branch and not instruction.startswith("@") and "BRA.DIV" not in instruction
    if not always and not instruction.startswith(("EXIT", "BRX")):
        after.append(index + 1)
    return [target for target in after if target < len(code.instructions)]


def _results(instruction: str) -> set[int]:
    """Registers that an ordinary instruction writes."""
    name, _, operands = re.sub(r"^@!?U?P[0-9T]+\s+", "", instruction).partition(" ")
    register = re.match(r"R(\d+)\b", operands)
    if name.startswith(_NO_RESULT) or not register:
        return set()
    width = 1
    if name.startswith("LD"):
        width = 4 if ".128" in name or "LDSM" in name else 2 if ".64" in name else 1
    elif ".WIDE" in name or (name.startswith("CS2R") and not name.startswith("CS2R.32")):
        width = 2
    return set(range(int(register[1]), int(register[1]) + width))


def _product(instruction: str) -> tuple[frozenset[int], frozenset[int]]:
    """Registers that a matrix instruction accumulates in, and those that it reads its first operand from."""
    found = re.search(r"HGMMA\.64x(\d+)x16\S*\s+R(\d+),\s*(?:R(\d+)|gdesc\[\w+\])", instruction)
    acc = frozenset(range(int(found[2]), int(found[2]) + int(found[1]) // 2))
    return acc, frozenset(range(int(found[3]), int(found[3]) + 4)) if found[3] else frozenset()


def _merged(first: tuple, second: tuple) -> tuple:
    length = max(len(first), len(second))
    pairs = zip(first + (_NONE,) * (length - len(first)), second + (_NONE,) * (length - len(second)), strict=True)
    return tuple((a[0] | b[0], a[1] | b[1]) for a, b in pairs)


def hazards(code: Code) -> list[str]:
    """Instructions that touch a register of a matrix instruction which may still run.

    What is in flight is followed along all branches, as groups from the newest on: a group ends with `gsb0`, and a wait
    for all but N leaves the N newest.
    """
    flight: list[tuple | None] = [None] * len(code.instructions)
    flight[0], waiting = (_NONE,), deque([0])
    while waiting:
        index = waiting.popleft()
        state, instruction = flight[index], code.instructions[index]
        if "HGMMA" in instruction:
            acc, operand = _product(instruction)
            state = ((state[0][0] | acc, state[0][1] | operand), *state[1:])
            if "gsb0" in instruction:
                state = (_NONE, *state)[:9]
        elif wait := re.search(r"WARPGROUP\.DEPBAR\S*\s+gsb0, 0x([0-9a-f]+)", instruction):
            state = state[: 1 + int(wait[1], 16)]
        for target in successors(code, index):
            merged = state if flight[target] is None else _merged(flight[target], state)
            if merged != flight[target]:
                flight[target] = merged
                waiting.append(target)
    found = []
    for state, instruction in zip(flight, code.instructions, strict=True):
        if state is None or "HGMMA" in instruction or instruction.startswith("WARPGROUP"):
            continue
        acc = frozenset().union(*(group[0] for group in state))
        operands = frozenset().union(*(group[1] for group in state))
        named = {int(register) for register in re.findall(r"\bR(\d+)\b", instruction)}
        if _results(instruction) & (acc | operands) or named & acc:
            found.append(instruction)
    return found
