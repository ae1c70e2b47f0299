"""Devices and dtypes by name, and how much memory is left on a device."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from lavin_rt.container import give_back_freed_memory, memory_left
from lavin_rt.errors import InputError

# How memory is refused by PyTorch's CPU allocator and the system, the CUDA driver and runtime (and so Triton and
# TensorRT), cuBLAS, cuDNN (whose plans all want a workspace), ONNX Runtime's arena and TensorRT's allocators.
REFUSALS = re.compile(
    r"not enough memory|can(?:'t|not) allocate memory|out of memory|cudaErrorMemoryAllocation|_STATUS_ALLOC_FAILED"
    r"|HOST_ALLOCATION_FAILED|unable to find an engine to execute|failed to allocate memory|std::bad_alloc"
    r"|available memory of \d+ is smaller than requested|memory .{0,40}could not be (?:allocated|obtained)"
    r"|insufficient (?:device |gpu )?memory",
    re.IGNORECASE,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device that a name means; `"auto"` is CUDA where there is one, else the CPU.

    Raises:
        InputError: no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError):
        found = f"cpu, cuda:0..{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
        raise InputError(f"no device {str(device)!r} on this machine; expected auto or one of {found}") from None
    if resolved.type == "meta":
        raise InputError("device 'meta' holds no numbers; expected auto, cpu or cuda")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a name means; `"auto"` is bfloat16 where that is the fast one, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if fast_in_bfloat16(device) else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise InputError(f"dtype is {str(dtype)!r}; expected auto, {', '.join(DTYPES)}")
    return resolved


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrices are multiplied faster than float32 ones: on CUDA from compute capability 8.0 on, on a
    CPU with tiles (AMX) or dot products of it, if PyTorch may use them.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # A CPU's reports know nothing of ATEN_CPU_CAPABILITY, which may forbid what they tell of.
    allowed = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return device.type == "cpu" and allowed and _cpu_has("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def slow_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether float32 is faster than this: float16 on a CPU that has no tiles for it."""
    return dtype == torch.float16 and device.type == "cpu" and not _cpu_has("_is_amx_fp16_supported")


def _cpu_has(*reports: str) -> bool:
    return any(getattr(torch.cpu, report, bool)() for report in reports)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one, on which Triton launches whatever the tensors' device is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def memory_at_hand(device: torch.device) -> int:
    """Bytes that can be taken on a device: on CUDA what the driver has free, as far as this process may take it, and
    what PyTorch's allocator has unused, private pools aside, which serve the replays of their graphs alone; else what
    the system calls available, as far as the limits of the process and of its control groups go.
    """
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        reserved = torch.cuda.memory_reserved(device)
        if torch.cuda.get_allocator_backend() == "native":
            unused = sum(
                segment["total_size"] - segment["active_size"]
                for segment in torch.cuda.memory_snapshot()
                if segment["device"] == device.index and tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
            )
        else:  # the driver's pool, which has no snapshot, and in which no graph's memory is counted
            unused = reserved - torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free, max(0, allowed - reserved)) + unused
    give_back_freed_memory()  # which the command line keeps, and which is at hand
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    left = memory_left()
    return available if left is None else min(available, left)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a device's or the system's refusal to give memory.

    A refusal during a CUDA graph's capture is followed by the complaint that the capture is broken, which hides it.
    """
    return any(
        isinstance(one, torch.OutOfMemoryError | MemoryError)
        or (isinstance(one, RuntimeError | OSError) and bool(REFUSALS.search(str(one))))
        for one in causes(error)
    )


def let_go(error: BaseException) -> None:
    """Empties the frames through which an error came, which hold the tensors that they made."""
    for one in causes(error):
        traceback.clear_frames(one.__traceback__)


def release_cached(device: torch.device) -> None:
    """Hands what PyTorch's allocator holds unused back to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gigabytes(count: int) -> str:
    """Bytes as decimal gigabytes, `"1.25"`."""
    return f"{count / 1e9:.2f}"
