"""What the tests of checkpoints share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from lavin_rt.errors import InputError
from support.golden import GOLDEN

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a golden checkpoint, as the safetensors library reads them."""
    path = GOLDEN / f"{name}.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and torch.equal(value.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name, value in one.items()
    )


def refusal(function, *arguments, **options) -> str:
    """The message, one line, of the `InputError` that a call must raise."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


def write_dit_a(folder: Path, change: Callable[[dict, dict], object] = lambda tensors, metadata: None) -> Path:
    """A copy of the smallest golden checkpoint in `folder`, after `change(tensors, metadata)`."""
    tensors, metadata = golden("dit_a")
    change(tensors, metadata)
    path = folder / "lavin_dit.safetensors"
    save_file(tensors, path, metadata)
    return path
