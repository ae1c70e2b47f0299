"""What is known of devices without one: the ways in which memory is refused."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from lavin_rt.devices import memory_at_hand, out_of_memory
from lavin_rt.errors import InputError

ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", RuntimeError)

REFUSED = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1000 bytes."),
    OSError(12, "Cannot allocate memory"),
    ACCELERATOR_ERROR("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the documentation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError(
        "ONNX Runtime failed in vae_decoder.onnx: [ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate "
        "memory for requested buffer of size 134217728"
    ),
    RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0"),
    RuntimeError("bfc_arena.cc:376 Available memory of 1024 is smaller than requested bytes of 2048"),
    RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
    RuntimeError(
        "a.plan: TensorRT failed: [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"
    ),
    RuntimeError("a.plan: TensorRT failed: Requested amount of GPU memory (123 bytes) could not be allocated."),
]
OTHERS = [
    None,
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
    RuntimeError("CUDA error: operation failed due to a previous error during capture"),
    RuntimeError("Expected all tensors to be on the same device"),
    InputError("too little memory on cuda to decode; the device is out of memory"),
    KeyboardInterrupt("out of memory"),
]


@pytest.mark.parametrize("error", REFUSED, ids=str)
def test_a_refusal_of_memory_is_told(error):
    assert out_of_memory(error)
    for link in ("__cause__", "__context__"):
        hiding = RuntimeError("CUDA error: operation failed due to a previous error during capture")
        setattr(hiding, link, error)
        assert out_of_memory(hiding)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not(error):
    assert not out_of_memory(error)


def test_memory_of_a_graphs_pool_is_not_at_hand(monkeypatch):
    """Only the replays of its graphs may use it, whatever of it no tensor holds."""

    def segment(total: int, active: int, pool: tuple[int, int] = (0, 0), device: int = 0) -> dict:
        return {"device": device, "total_size": total, "active_size": active, "segment_pool_id": pool}

    segments = [segment(100, 60), segment(50, 50), segment(700, 0, (0, 1)), segment(900, 10, device=1)]
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 850)
    for fraction, free in ((1.0, 1000), (0.5, 150), (0.4, 0)):  # what a process may take beside what it has
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=fraction: share)
        assert memory_at_hand(torch.device("cuda")) == memory_at_hand(torch.device("cuda:0")) == free + 40


def test_memory_of_the_drivers_own_pool(monkeypatch):
    """`PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync`, whose snapshot raises."""
    refuses = Mock(side_effect=RuntimeError("Calling snapshot with backend:cudaMallocAsync is not meaningful."))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", refuses)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 850)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 810)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert memory_at_hand(torch.device("cuda:0")) == 1040
