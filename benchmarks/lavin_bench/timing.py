"""The one timer: interleaved variants, medians with their spread, a cold L2 on a GPU, and a header that says where."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lavin_rt.console import installed_version
from lavin_rt.process import settle_threads

CALLS_IN_GRAPH = 8


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one variant; `samples` in the order they were taken, `graph` whether graphs were replayed."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]
    graph: bool = False

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        return cls(statistics.median(samples), min(samples), max(samples), tuple(samples))

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(
    variants: Mapping[str, Callable[[], object]],
    repeats: int = 7,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    graph: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Times every variant `repeats` times, in rounds that hold each once and start with another one each.

    On CUDA a sample is the time between two events around the call, taken after a buffer of twice the L2's size was
    written: the call finds a cold L2, and the host has the time of that write to get ahead. A call that keeps the host
    busy for longer than the device needs `graph`; a graph holds several calls, as its start takes some microseconds,
    with such a write before each, whose own time is measured beside it and taken off.

    Args:
        variants: calls without arguments, by name. Their results are dropped.
        repeats: samples per variant, at least 1.
        warmup: calls before the first sample, per variant; with `graph` they run before the capture.
        device: where the calls run.
        graph: capture each call in a CUDA graph and time its replay, on CUDA. What cannot be captured is called.
        progress: called with (samples taken, samples in all) after each.

    Raises:
        ValueError: no variants, no repeats, or `graph` without CUDA.
    """
    device = torch.device(device)
    if not variants or repeats < 1:
        raise ValueError(f"{len(variants)} variants and {repeats} repeats; expected at least one of each")
    if graph and device.type != "cuda":
        raise ValueError(f"graph=True needs a CUDA device, got {device}")
    for call in variants.values():
        for _ in range(warmup):
            call()
    replayed = {name: graph_sampler(call, device) for name, call in variants.items()} if graph else {}
    sample = cuda_sampler(device) if device.type == "cuda" else wall_clock
    samplers = {name: replayed.get(name) or partial(sample, call) for name, call in variants.items()}
    timings = in_turn(samplers, repeats, progress)
    return {name: dataclasses.replace(timing, graph=bool(replayed.get(name))) for name, timing in timings.items()}


def in_turn(
    samplers: Mapping[str, Callable[[], float]], repeats: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Timing]:
    """Seconds that the samplers themselves report, in rounds that hold each once and start with another one each."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(samplers[name]())
            if progress is not None:
                progress(sum(map(len, samples.values())), repeats * len(names))
    return {name: Timing.of(values) for name, values in samples.items()}


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds of one call on the host."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_sampler(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that gives the device seconds of one call, with a cold L2."""
    flush = l2_flush(device)

    def sample(call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            flush()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return sample


def l2_flush(device: torch.device) -> Callable[[], object]:
    """Writes a buffer of twice the L2's size."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device).zero_


def graph_sampler(call: Callable[[], object], device: torch.device) -> Callable[[], float] | None:
    """A function that gives the device seconds of one call of a graph's, each with a cold L2; None where the call
    cannot be captured.
    """
    flush, sample = l2_flush(device), cuda_sampler(device)

    def flushed() -> None:
        flush()
        call()

    both, alone = captured(flushed, device), captured(flush, device)
    if both is None or alone is None:
        return None

    def seconds(held: object = flushed) -> float:  # a graph does not hold the tensors that it reads
        return (sample(both) - sample(alone)) / CALLS_IN_GRAPH

    return seconds


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """The replay of a CUDA graph of `CALLS_IN_GRAPH` calls; None where the call cannot be captured."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails may leave its stream behind as the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                for _ in range(CALLS_IN_GRAPH):
                    call()
        except Exception:  # torch, Triton and the libraries each have errors of their own
            torch.cuda.synchronize()
            return None
    return graph.replay


def use_threads(threads: int | None) -> None:
    """What `--threads` asks of PyTorch on a CPU; None leaves it as it is."""
    if threads is not None:
        settle_threads(threads)


def header(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where and with what a measurement was made; the commit is None outside a checkout, the date is UTC."""
    device, gpu = torch.device(device), {}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        gpu = {"capability": f"{major}.{minor}", "gpu": gpu_state(device)}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        **gpu,
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "lavin_rt": installed_version("lavin-rt"),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),  # of the last minute: what else ran when this began
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def gpu_state(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power and temperature as `nvidia-smi` says them; empty where it does not answer."""
    keys = "driver_version clocks.sm clocks.mem power.draw power.limit temperature.gpu memory.total".split()
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "-i", str(device.index or 0)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(keys, answer.strip().split(", "), strict=False))


def header_line(values: Mapping[str, Any]) -> str:
    """A header for people: one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def resident_bytes(field: str, process: int | str = "self") -> int:
    """A process's `VmRSS`, or its peak `VmHWM` (the peak of getrusage starts at the parent's in a new process)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def commit() -> str | None:
    """The commit this file was checked out from, with "+" where tracked files differ from it; None outside a
    checkout.
    """

    def git(*arguments: str) -> str | None:
        folder = Path(__file__).resolve().parent
        try:
            answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    return revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if revision else None
