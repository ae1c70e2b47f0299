"""Fixtures that all tests share."""

from __future__ import annotations

import pytest
import torch
from support.command import checkpoint, setup  # noqa: F401, fixtures
from support.golden import GOLDEN

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))
