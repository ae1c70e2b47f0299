"""Fused operators of LaVin-DiT: Triton kernels on CUDA, their plain references on a CPU."""
