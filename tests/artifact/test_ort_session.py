"""A session of ONNX Runtime on CUDA, with stand-ins for the package and for `torch.cuda`."""

from __future__ import annotations

import ctypes
import types
import warnings

import pytest
import torch
from support.cuda_stand_in import Cuda

from lavin_rt.artifact import onnxruntime as ort_session
from lavin_rt.artifact.onnxruntime import SHAPES_HELD, OrtSession
from lavin_rt.errors import InputError

PART = {
    "file": "double.onnx",
    "weights": [],
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["rows", 2]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["rows", 2]}],
    "ranges": {"rows": [1, 64]},
}
DEVICE = types.SimpleNamespace(type="cuda", index=0)  # the host's memory in its place


class Runtime:
    """ONNX Runtime, doubling what is bound; as the real one, it refuses to capture what falls to the CPU.

    Attributes:
        refusals: errors of the next sessions, or None.
        graphs: graph ids of the runs.
    """

    def __init__(self, *refusals: str | None):
        self.refusals, self.asked, self.graphs = list(refusals), [], []

    SessionOptions = types.SimpleNamespace

    def RunOptions(self):
        options = types.SimpleNamespace(entries={})
        options.add_run_config_entry = options.entries.__setitem__
        return options

    def get_available_providers(self):
        return ["CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, path, options, providers, disable_fallback):
        assert disable_fallback
        self.asked.append(dict(providers)["CUDAExecutionProvider"]["enable_cuda_graph"])
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            raise RuntimeError(refusal)
        described = [types.SimpleNamespace(name=name, type="tensor(float)", shape=["rows", 2]) for name in "xy"]
        return types.SimpleNamespace(
            get_inputs=lambda: described[:1],
            get_outputs=lambda: described[1:],
            io_binding=self.binding,
            run_with_iobinding=self.run,
        )

    def binding(self):
        bound = types.SimpleNamespace()
        bound.bind_input = lambda *place: setattr(bound, "x", place)
        bound.bind_output = lambda *place: setattr(bound, "y", place)
        return bound

    def run(self, binding, options):
        self.graphs.append(options.entries["gpu_graph_id"])
        count = binding.x[4][0] * 2
        x, y = ((ctypes.c_float * count).from_address(place[5]) for place in (binding.x, binding.y))
        y[:] = [2 * value for value in x]


@pytest.fixture
def load(monkeypatch, tmp_path):
    """`load(runtime)`: a session on that stand-in."""
    Cuda().install(monkeypatch, ort_session)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(ort_session, "check_external_files", lambda *files: None)

    def of(runtime: Runtime, provider: str = "auto") -> OrtSession:
        monkeypatch.setattr(ort_session, "import_onnxruntime", lambda: runtime)
        session = OrtSession(tmp_path, PART, types.SimpleNamespace(dtype=torch.float32), DEVICE, provider)
        session.device = torch.device("cpu")
        return session

    return of


def doubles(session: OrtSession, rows: int) -> bool:
    x = torch.randn(rows, 2)
    return torch.equal(session(x)[0], 2 * x)


def test_a_refused_capture_is_said_and_done_without(load):
    runtime = Runtime("This session cannot use the graph capture feature as requested by the user")
    with pytest.warns(UserWarning, match=r"double.onnx runs without a CUDA graph.*graph capture feature"):
        session = load(runtime)
    assert runtime.asked == ["1", "0"] and all(doubles(session, rows) for rows in (1, 2, 1))
    assert set(runtime.graphs) == {"-1"}
    with pytest.raises(InputError, match="cannot be loaded: no such operator; export or fetch"):
        load(Runtime("no such operator", "no such operator"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for provider, asked in (("auto", "1"), ("tensorrt", "0")):
            runtime = Runtime()
            session = load(runtime, provider)
            assert runtime.asked == [asked] and session._captures == (asked == "1")


def test_graphs_that_are_never_let_go_do_not_pile_up(load):
    runtime = Runtime()
    session = load(runtime)
    for _ in range(2):
        assert all(doubles(session, rows) for rows in range(1, 3 * SHAPES_HELD))
    captured = [graph for graph in runtime.graphs if graph != "-1"]
    assert sorted(map(int, captured)) == sorted(2 * list(range(1, SHAPES_HELD + 1)))
    assert len(session._bound) == 2 * SHAPES_HELD


def test_a_call_in_inference_mode_leaves_the_session_usable(load):
    session = load(Runtime())
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert doubles(session, 3)
