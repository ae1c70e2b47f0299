"""TensorRT code held against NVIDIA's own bindings of both majors, in processes of their own.

No TensorRT library is needed, and none is used: that an engine really builds and runs, a machine with one has to show
(`test_tensorrt_gpu.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import trt_bindings

pytestmark = pytest.mark.slow  # NVIDIA's wheels are fetched

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=trt_bindings.VERSIONS)
def bindings(request) -> Path:
    return trt_bindings.fetch(request.param, request.config.cache.mkdir("tensorrt-bindings"))


def scenario(folder: Path, name: str, *arguments: str) -> dict:
    """What one of the scenarios found; its traceback where it fails."""
    command = [sys.executable, "-m", "support.trt_scenarios", str(folder), name, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=TESTS)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_a_whole_build_and_run_and_seeded_mistakes(bindings):
    found = scenario(bindings, "engine_scenario")
    assert found["version"] == bindings.name
    assert found["classes"] > 100


def test_the_whole_export_from_a_checkpoint(bindings, tmp_path):
    """Exported, verified and sampled, ONNX Runtime in the engines' place: one form of export for each version."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    what = "command" if bindings.name == trt_bindings.VERSIONS[0] else "plain"
    found = scenario(bindings, "export_scenario", str(tmp_path), what)
    assert found["version"] == bindings.name
    assert found["parts"] == ["denoiser", "vae_decoder", "vae_encoder"]
    assert found["checks"] >= 8 and found["worst"] <= 1
