"""Which dtype "auto" is, and what is said of a slow one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import lavin_rt
from lavin_rt.devices import resolve_dtype

CPU = torch.device("cpu")
REPORTS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_amx_fp16_supported")


def pretend(monkeypatch: pytest.MonkeyPatch, used: str, *has: str) -> None:
    """A CPU that has these of the reports, of which PyTorch uses so much."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    for report in REPORTS:
        monkeypatch.setattr(torch.cpu, report, lambda report=report: report in has)


@pytest.mark.parametrize(
    ("used", "has", "expected"),
    [
        ("AVX512", ("_is_amx_tile_supported",), torch.bfloat16),
        ("AVX512", ("_is_avx512_bf16_supported",), torch.bfloat16),
        ("AVX512", (), torch.float32),
        ("AVX2", ("_is_amx_tile_supported", "_is_avx512_bf16_supported"), torch.float32),  # ATEN_CPU_CAPABILITY=avx2
        ("DEFAULT", (), torch.float32),
    ],
)
def test_auto_on_a_cpu_is_what_it_multiplies_fast(monkeypatch, used, has, expected):
    pretend(monkeypatch, used, *has)
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("float32", CPU) == torch.float32


def test_auto_is_float32_where_pytorch_reports_nothing(monkeypatch):
    pretend(monkeypatch, "AVX512")
    for report in REPORTS:
        monkeypatch.delattr(torch.cpu, report)
    assert resolve_dtype("auto", CPU) == torch.float32


def test_a_pipeline_takes_what_auto_is(monkeypatch):
    pretend(monkeypatch, "AVX512", "_is_amx_tile_supported")
    pipe = lavin_rt.Pipeline.from_pretrained(device="cpu")
    assert pipe.dtype == torch.bfloat16 and pipe.vae.dtype == torch.bfloat16


def test_float16_is_said_to_be_slow_where_it_is(monkeypatch, recwarn):
    pretend(monkeypatch, "AVX512", "_is_amx_tile_supported", "_is_amx_fp16_supported")
    lavin_rt.Pipeline.from_pretrained(device="cpu", dtype="float16")
    assert not recwarn
    pretend(monkeypatch, "AVX512", "_is_amx_tile_supported")
    with pytest.warns(UserWarning, match="float16 is slower than float32 on this CPU"):
        lavin_rt.Pipeline.from_pretrained(device="cpu", dtype="float16")


def test_with_instructions_switched_off_it_is_float32_and_right():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "lavin_rt", "info", "--device", "cpu", "--self-check", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["machine"]["dtype"] == "float32" and all(check["passed"] for check in record["self-check"])
