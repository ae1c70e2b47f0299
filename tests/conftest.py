"""Fixtures that all tests share."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command import checkpoint, setup  # noqa: F401, fixtures
from support.golden import GOLDEN, ROOT
from support.once import made_once

from lavin_rt.checkpoint.load import load_dit
from lavin_rt.dit.model import JDiT


@pytest.fixture(scope="session")
def golden_dit():
    """`golden_dit("dit_a", dtype)`: a golden checkpoint's model, loaded once."""
    models: dict[tuple[str, torch.dtype], JDiT] = {}

    def load(name: str, dtype: torch.dtype = torch.float32) -> JDiT:
        if (name, dtype) not in models:
            models[name, dtype] = load_dit(GOLDEN / f"{name}.safetensors", dtype=dtype)
        return models[name, dtype]

    return load


@pytest.fixture(scope="session")
def configure() -> Callable[..., subprocess.CompletedProcess]:
    """`configure(folder, *options)` has CMake prepare a build of the native runner there."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"

    def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
        command = ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, prefix, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def native_build(configure, tmp_path_factory) -> Path:
    """The folder of the native runner and of the programs that test it, built once."""

    def build(folder: Path) -> None:
        configured = configure(folder, "-DLAVIN_TESTS=ON")
        if missing := re.search("lavin-native lacks .*", configured.stderr):
            pytest.skip(missing[0])
        assert configured.returncode == 0, configured.stderr
        command = ["cmake", "--build", str(folder), "-j2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"

    return made_once(tmp_path_factory, "native", build)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))
