"""Launch configurations as data: one JSON file per tuned device, safe defaults elsewhere.

`configs/default.json` maps kernel -> compute capability -> dtype -> values; an entry serves every capability from its
own up to the next one that is listed. `configs/<device name>.json` maps kernel -> dtype -> values for a device on which
kernels were timed, and wins where it has an entry. A dtype may be named (`bfloat16`, `float16`, `float32`) or be `any`;
float16 takes the values of bfloat16 where it has none.

Values are whatever the kernel's launcher reads: block sizes, `num_warps`, `num_stages`, `variant`. The module of a
kernel lists what is worth timing on a device in `CANDIDATES`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"
# What the interpreter on a CPU runs with: the defaults that every target can run.
CPU_CAPABILITY = 80

# `Any`: a kernel's launcher reads numbers from it, and names of forms.
Launch = Mapping[str, Any]
_overrides: dict[str, dict[str, Any]] = {}


def config(kernel: str, device: torch.device, dtype: torch.dtype) -> Launch:
    """The launch configuration of `kernel` for rows of `dtype`: tuned for that device, or its capability's default.

    The first call for a CUDA device asks the driver for its name; later ones are a dictionary look-up.

    Raises:
        KeyError: no configuration of that kernel is stored.
    """
    if kernel in _overrides:
        return _overrides[kernel]
    return _device_config(kernel, device.type, device.index, dtype)


def default_config(kernel: str, capability: int, dtype: torch.dtype) -> Launch:
    """The default of a compute capability such as 90, whatever device is at hand."""
    by_capability = _stored("default")[kernel]
    listed = sorted(int(key) for key in by_capability)
    nearest = max((key for key in listed if key <= capability), default=listed[0])
    values = _of_dtype(by_capability[str(nearest)], dtype)
    if values is None:
        raise KeyError(f"no launch configuration of {kernel} for {dtype} at compute capability {capability}")
    return values


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, such as 90; of any other the one whose defaults it runs with."""
    return _device_capability(device) if device.type == "cuda" else CPU_CAPABILITY


@contextlib.contextmanager
def override(kernel: str, **values: int | str) -> Iterator[None]:
    """Launches `kernel` with exactly these values inside the `with` block, on every device: for tuning and tests."""
    previous = _overrides.get(kernel)
    _overrides[kernel] = values
    try:
        yield
    finally:
        if previous is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = previous


def config_file(device_name: str) -> Path:
    """Where the tuned configurations of a device are kept: "NVIDIA H200" is `configs/nvidia-h200.json`."""
    return CONFIGS / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")


@functools.cache
def _device_capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _device_config(kernel: str, device_type: str, index: int | None, dtype: torch.dtype) -> Launch:
    if device_type != "cuda":
        return default_config(kernel, CPU_CAPABILITY, dtype)
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    tuned = _stored(config_file(torch.cuda.get_device_name(device)).stem).get(kernel, {})
    return _of_dtype(tuned, dtype) or default_config(kernel, capability(device), dtype)


def _of_dtype(by_dtype: Mapping[str, Launch], dtype: torch.dtype) -> Launch | None:
    name = str(dtype).removeprefix("torch.")
    for key in (name, *(["bfloat16"] if name == "float16" else []), "any"):
        if key in by_dtype:
            return by_dtype[key]
    return None


@functools.cache
def _stored(stem: str) -> dict:
    path = CONFIGS / f"{stem}.json"
    return json.loads(path.read_text()) if path.exists() else {}
