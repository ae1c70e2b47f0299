"""The wheel, in a clean environment outside the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.golden import GOLDEN

ROOT = Path(__file__).parents[2]


def call(*command: object, cwd: Path) -> str:
    result = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path):
    source = tmp_path / "source"
    # A copy, so that nothing which lies about in the checkout can get into the wheel unseen.
    files = call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    call(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("lavin_kernels", "lavin_rt", "lavin_export", "lavin_bench"):
        assert f"{package}/__init__.py" in names and f"{package}/py.typed" in names
    assert "lavin_kernels/configs/default.json" in names
    assert not any(name.startswith(("tests", "kernels", "export", "benchmarks")) for name in names)

    call(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    binaries = tmp_path / "env" / "bin"
    constraints = ROOT / "constraints.txt"
    call(binaries / "python", "-m", "pip", "install", "-q", "-c", constraints, wheel, cwd=tmp_path)
    command = binaries / "lavin-rt"
    work = tmp_path / "work"
    work.mkdir()
    assert "usage: lavin-rt" in call(command, "--help", cwd=work)
    assert "impl" in call(command, "info", "--self-check", cwd=work)
    for name, golden in (("lavin_dit.safetensors", "dit_c.safetensors"), ("stvae.pt", "stvae.pt")):
        shutil.copy(GOLDEN / golden, work / name)
    (work / "task").mkdir()
    for name in ("task/0_input.png", "task/0_target.png", "query.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(work / name)
    options = "--checkpoint . --task task --pairs 1 --query query.png -o out.png --size 32 --steps 4".split()
    assert "out.png  seed 0" in call(command, "run", *options, cwd=work)
    assert Image.open(work / "out.png").size == (32, 32)
