"""What the device at hand can do at most: the copy and the matrix product that every other figure is held against."""

from __future__ import annotations

import torch

from lavin_bench.timing import Timing, measure


def copy_ceiling(device: torch.device, repeats: int = 15) -> dict[str, float]:
    """Bytes per second, read and written, of a copy far larger than the L2.

    Returns:
        `bytes_per_second`, and the `bytes` of one copy.
    """
    count = 2**30 if device.type == "cuda" else 2**26
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, repeats, warmup=3, device=device)["copy"]
    return {"bytes": 2 * count, "bytes_per_second": 2 * count / timing.median}


def matmul_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 15) -> dict[str, float]:
    """FLOP per second of a square product of random matrices (8192 on CUDA, 2048 on a CPU)."""
    size = 8192 if device.type == "cuda" else 2048
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    timing: Timing = measure({"matmul": lambda: a @ b}, repeats, warmup=3, device=device)["matmul"]
    # A CPU is slower at a process's beginning, and where others run: its most is the fastest sample's.
    seconds = timing.median if device.type == "cuda" else timing.low
    return {"flops": 2 * size**3, "flops_per_second": 2 * size**3 / seconds}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Both ceilings of a device."""
    return {"copy": copy_ceiling(device), "matmul": matmul_ceiling(device, dtype)}
