"""Operators called directly launch on their tensors' GPU, whichever is the current one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from lavin_kernels import launch

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="the interpreter has no devices")


class OnSecond:
    """A kernel that notes the current device of its launches."""

    def __init__(self, devices):
        self.devices = devices

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.devices.append(torch.cuda.current_device())


@pytest.fixture
def current(monkeypatch):
    """Stand-ins for two GPUs, of which the first is the current one."""
    state = [0]

    @contextmanager
    def device(wanted):
        before, state[0] = state[0], wanted.index
        yield
        state[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    return state


@pytest.mark.parametrize("index", [0, 1])
def test_a_launch_goes_to_the_tensors_device(index, current, monkeypatch):
    tensor, devices = torch.zeros(1), []
    monkeypatch.setattr(launch.torch.library, "wrap_triton", OnSecond)
    monkeypatch.setattr(launch, "on_device", lambda first: torch.cuda.device(torch.device("cuda", index)))
    launch.wrap_triton(devices)[(1,)](tensor, 2, three=3)
    assert devices == [index] and current == [0]


def test_a_tensor_of_a_cpu_or_of_a_trace_changes_no_device(current):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with launch.on_device(torch.zeros(1)):
        assert current == [0]
    with FakeTensorMode():
        tensor = torch.empty(1, device="cuda:1")
        with launch.on_device(tensor):
            assert current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_second_gpu():
    import lavin_kernels

    gate_up = torch.randn(64, 512, device="cuda:1", dtype=torch.bfloat16)
    with torch.cuda.device(0):
        result = lavin_kernels.swiglu(gate_up)
    gate, up = gate_up.double().chunk(2, 1)
    torch.testing.assert_close(result.double(), torch.nn.functional.silu(gate) * up, rtol=0.02, atol=0.02)
