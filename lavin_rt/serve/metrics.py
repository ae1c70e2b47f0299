"""Figures of a service in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)


class Metrics:
    """Counters and histograms of one service, in a registry of their own.

    Args:
        waiting, running: read whenever the figures are asked for.
        device: whose memory is shown, where it is CUDA; the process's own memory always is.
    """

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int], device: torch.device):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Gauge("lavin_rt_queue_length", "Requests that wait.", registry=registry).set_function(waiting)
        Gauge("lavin_rt_running", "Requests in the run at hand.", registry=registry).set_function(running)
        if device.type == "cuda":
            Gauge("lavin_rt_device_memory_bytes", "Memory taken on the GPU.", registry=registry).set_function(
                lambda: torch.cuda.memory_reserved(device)
            )
        self.latency = Histogram(
            "lavin_rt_request_seconds",
            "From arrival to answer.",
            ["task", "speed"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            "lavin_rt_batch_requests", "Requests that ran together.", buckets=BATCHES, registry=registry
        )
        self.evaluations = Counter("lavin_rt_evaluations", "Evaluations of the network.", registry=registry)
        self.answers = Counter("lavin_rt_answers", "Requests answered with a picture.", ["task"], registry=registry)
        self.refusals = Counter(
            "lavin_rt_refusals", "Requests answered otherwise, by reason.", ["reason"], registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
