"""Every tuned operator's host path for every target, with a strict stand-in for the driver, each in its own process.

`python tests/triton_driver.py CAPABILITY all` launches every candidate of every kernel.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lavin_bench.kernels.tune import KERNELS
from lavin_kernels.launch import interpreted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreted(), reason="compiles, which the interpreter does not"),
]


@pytest.mark.parametrize(
    ("capability", "forms", "kernels"),
    [
        *((capability, "default", list(KERNELS)) for capability in (80, 89, 90, 100, 120)),
        (90, "some", ["joint_attention"]),
    ],
    ids=str,
)
def test_launches(capability, forms, kernels):
    run = subprocess.run(
        [sys.executable, "-m", "support.triton_driver", str(capability), forms, *kernels],
        capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert [line.split()[0] for line in run.stdout.splitlines()] == kernels
