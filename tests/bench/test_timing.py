"""The timer: who is called when, and what comes out. No test here depends on how long anything takes."""

from __future__ import annotations

import json

import pytest
import torch

from lavin_bench import timing as timer
from lavin_bench.timing import Timing, header, header_line, measure


def test_variants_are_interleaved_and_take_turns_to_start():
    calls: list[str] = []
    timings = measure({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=4, warmup=2)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    for timing in timings.values():
        assert len(timing.samples) == 4
        assert 0 <= timing.low <= timing.median <= timing.high
    assert list(timings) == ["a", "b", "c"]


def test_timing_of_samples():
    timing = Timing.of([3.0, 1.0, 2.0, 10.0])
    assert (timing.median, timing.low, timing.high) == (2.5, 1.0, 10.0)
    assert json.loads(json.dumps(timing.as_dict()))["samples"] == [3.0, 1.0, 2.0, 10.0]


@pytest.mark.parametrize("wrong", [{"variants": {}}, {"repeats": 0}, {"graph": True}])
def test_what_cannot_be_measured(wrong):
    with pytest.raises(ValueError, match=r"expected at least one|needs a CUDA device"):
        measure(**{"variants": {"a": lambda: None}} | wrong)


def test_header_is_json_and_one_line():
    values = header()
    assert json.loads(json.dumps(values)) == values
    assert values["torch"] == torch.__version__ and values["threads"] == torch.get_num_threads()
    assert values["device"] and values["date"].endswith("+00:00")
    assert "\n" not in header_line(values) and "None" not in header_line(values)


def test_every_call_of_a_graph_finds_a_cold_l2(monkeypatch):
    """With a stand-in for the device: a flush takes 25 s, a call 5 s, and 1 s where the L2 is warm."""
    clock, cold, device = 0.0, True, torch.device("cuda")

    def flush() -> None:
        nonlocal clock, cold
        clock, cold = clock + 25, True

    def call() -> None:
        nonlocal clock, cold
        clock, cold = clock + (5 if cold else 1), False

    def sample(replay) -> float:
        before = clock
        replay()
        return clock - before

    monkeypatch.setattr(timer, "l2_flush", lambda device: flush)
    monkeypatch.setattr(timer, "cuda_sampler", lambda device: sample)
    monkeypatch.setattr(timer, "captured", lambda call, device: lambda: [call() for _ in range(timer.CALLS_IN_GRAPH)])
    [found] = measure({"a": call}, repeats=2, warmup=0, device=device, graph=True).values()
    assert found.samples == (5.0, 5.0) and found.graph
    monkeypatch.setattr(timer, "captured", lambda call, device: None)
    [found] = measure({"a": call}, repeats=1, warmup=1, device=device, graph=True).values()
    assert found.samples == (1.0,) and not found.graph


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_gpu_samples_are_device_time(graph):
    x = torch.randn(1 << 24, device="cuda")
    timings = measure({"once": lambda: x + 1, "often": lambda: [x + 1 for _ in range(20)]}, device="cuda", graph=graph)
    assert 0 < timings["once"].median < timings["often"].median
