"""Attention's machine code for sm_90: no hazards, its main loop bound by products and not by issue slots."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from support import sass

from lavin_kernels import static, tuning
from lavin_kernels.launch import interpreted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreted(), reason="compiles, which the interpreter does not"),
]
module = importlib.import_module("lavin_kernels.ops.joint_attention")
FORMS = {
    " ".join(f"{key}={value}" for key, value in candidate.items() if key != "variant"): candidate
    for candidate in module.CANDIDATES
    if candidate["variant"] == "gluon" and candidate["num_stages"] == 2
}


def machine_code(config):
    """Of the standard run's blocks, and the compiler's report."""
    case = module._static_case(config, torch.bfloat16, x_only=False)
    kernel = case.compile(90)
    usage, text = static._disassembled(kernel.asm["cubin"])
    return text, usage


def clocks(loop, config):
    """Issue slots and matrix clocks of one tile on a multiprocessor: four schedulers, 2048 products a clock."""
    warps = config["block_m"] // 16 if config["variant"] == "gluon" else config["num_warps"]
    width = sum(module.head_pieces(72))
    return len(loop) * warps / 4, config["block_m"] * config["block_n"] * 2 * width / 2048


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_gluon_form(config):
    text, usage = machine_code(config)
    code = sass.Code.of(text)
    assert usage["STACK"] == 0 and not re.search(r"\b(LDL|STL)\b", text)
    assert sass.hazards(code) == []
    loop = code.main_loop()
    issue, matrix = clocks(loop, config)
    print(f"{len(loop)} instructions a tile, issue {issue:.0f}, products {matrix:.0f} clocks")
    assert issue / matrix <= 1.3  # of 64 keys; 0.9 of 128
    # Two waits a tile, for scores and for values: where the assembler gives up, every product has one of its own.
    assert sass.count(loop, "WARPGROUP.DEPBAR") == 2


def test_default_of_sm_90_is_not_bound_by_issue():
    config = tuning.default_config("joint_attention", 90, torch.bfloat16)
    issue, matrix = clocks(sass.Code.of(machine_code(config)[0]).main_loop(), config)
    assert issue / matrix <= 1.02


def test_hazards_are_found_where_waits_are_missing():
    text, _ = machine_code(tuning.default_config("joint_attention", 90, torch.bfloat16))
    broken = "\n".join(line for line in text.splitlines() if "WARPGROUP.DEPBAR" not in line)
    assert len(sass.hazards(sass.Code.of(broken))) > 100
