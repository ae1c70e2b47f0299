"""Our plugins through NVIDIA's plugin classes, at a model's shapes in one dtype; the kernels assembled by ptxas."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import trt_plugin_drive as plugin_drive

EPS = {"epsilon": 1e-6}


def scenario(trt: ModuleType, dtype: str, capability: str) -> dict:
    from lavin_export import trt_plugins

    registry = plugin_drive.prepare(trt)
    trt_plugins.register(trt, int(capability))
    trt_plugins.register(trt, int(capability))
    with pytest.raises(ValueError, match="registered for capability"):
        trt_plugins.register(trt, 75)
    rows, f32, i32 = getattr(trt.DataType, dtype), trt.DataType.FLOAT, trt.DataType.INT32
    heads, kv_heads, size, hidden, inner = 32, 8, 72, 2304, 6144
    sizes = {"batch": 2, "cond": 640, "x": 64, "rows": 1408}
    vector = ((hidden,), f32)
    qkv = (heads + 2 * kv_heads) * size
    tables = [(("rows",), i32), (("rows", 3), i32), ((1024, size // 6), f32), ((1024, size // 6), f32)]
    weights = [((2, heads * size), rows), ((2, kv_heads * size), rows)]
    x = ("batch", "x", qkv), rows
    length, keys = 704, (2, 704, kv_heads, size)
    cases = {
        "LavinAdaRmsNorm": ([(("batch", "cond", hidden), rows), vector], EPS, [(2, 640, hidden)], 2 * 640, []),
        "LavinGatedResidualAdaRmsNorm": (
            [(("batch", "x", hidden), rows)] * 2 + [vector] * 2,
            EPS,
            [(2, 64, hidden)] * 2,
            2 * 64,
            [],
        ),
        "LavinSwiglu": ([(("batch", "cond", 2 * inner), rows)], {}, [(2, 640, inner)], None, []),
        "LavinQkNormRope": (
            [(("batch", "cond", qkv), rows), x, *tables, *weights],
            {**EPS, "head_size": size},
            [(2, length, heads, size), keys, keys],
            2 * length,
            [2 * 640],
        ),
        "LavinKeyNormRope": (
            [(("batch", "cond", 2 * kv_heads * size), rows), x, *tables, *weights],
            {**EPS, "head_size": size},
            [(2, 64, heads, size), keys, keys],
            2 * length,
            [2 * 640],
        ),
    }
    found = {}
    for name, (inputs, attributes, shapes, blocks, integers) in cases.items():
        driven = plugin_drive.drive(trt, registry, name, inputs, sizes, attributes)
        assert driven.shapes == shapes, (name, driven.shapes)
        assert driven.dtypes == [rows] * len(shapes)
        assert driven.tactics
        for tactic in driven.tactics:
            pointers = len(inputs) + len(shapes)
            entry = re.search(rf"\.visible \.entry {tactic.name}\(([^)]*)\)", tactic.ptx)
            assert len(entry.group(1).split(",")) == pointers + len(integers), entry.group(1)
            assert tactic.integers == integers
            assert tactic.shared <= 48 * 1024
            assert tactic.grid[1:] == (1, 1)
            declared = int(re.search(r"\.reqntid (\d+)", tactic.ptx).group(1))
            assert declared == tactic.threads, (declared, tactic.threads)
            if blocks is not None:
                assert tactic.grid[0] == blocks, (name, tactic.grid)
            assemble(tactic.ptx)
        found[name] = [[tactic.grid[0], tactic.threads, tactic.shared] for tactic in driven.tactics]
    # 2 * 640 rows of 6144 in blocks of 512, 1024, 1024, 2048, 2048 and 4096.
    assert [grid for grid, _, _ in found["LavinSwiglu"]] == [1280 * n for n in (12, 6, 6, 3, 3, 2)]
    return {"version": trt.__version__, "tactics": found}


def assemble(ptx: str) -> None:
    """Machine code of PTX by NVIDIA's assembler, which comes with Triton."""
    import triton

    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, f"-arch={target}", str(path), "-o", f"{folder}/kernel.cubin"]
        subprocess.run(command, check=True, capture_output=True, text=True)
