"""A checkpoint exported, verified and sampled through our TensorRT code, ONNX Runtime computing what an engine would.

The stand-in's parser reads the graph, its plan is the graph's place, and its execution contexts take shapes and
addresses as TensorRT's do and hand them to ONNX Runtime. So everything of ours runs, from the checkpoint to the
verified result; nothing of TensorRT's libraries does.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import lavin_export.to_tensorrt.export as to_tensorrt
import lavin_rt.artifact.tensorrt as trt_session
from lavin_export.to_tensorrt.profiles import parse
from lavin_export.verify.artifact import verify_artifact
from lavin_rt.artifact.manifest import Manifest
from lavin_rt.errors import InputError
from support import trt_bindings
from support.onnx_exports import golden_checkpoint
from support.trt_host_cuda import Device, Torch
from support.trt_libraries import Libraries, floats
from support.trt_stand_in import HostMemory, StandIn

PROFILE = "batch=1:1:3,cond_frames=3:5:9,target_frames=1:1:2,height=16:32:96,width=16:32:96"


class OnnxLibraries(Libraries):
    """Engines that ONNX Runtime computes. Plans hold the place of a copy of their graph, and their profiles."""

    def __init__(self, real: ModuleType, folder: Path):
        super().__init__(real)
        self.folder, self.built, self.kept = folder, 0, None

    def _values(self) -> dict[str, Any]:
        return {
            **super()._values(),
            "ICudaEngine.num_io_tensors": lambda engine: len(self._tensors(engine)),
            "ICudaEngine.num_optimization_profiles": lambda engine: len(engine.state["profiles"]),
        }

    def OnnxParser__parse_from_file(self, parser, model):
        onnx.checker.check_model(model)
        self.kept = self.folder / f"graph{self.built}"
        self.built += 1
        self.kept.mkdir()
        for path in (Path(model), Path(f"{model}.data")):
            shutil.copy(path, self.kept)
        self.kept /= Path(model).name
        self.profiles = []
        return True

    def Builder__build_serialized_network(self, builder, network, config):
        if super().Builder__build_serialized_network(builder, network, config) is None:
            return None
        return HostMemory(json.dumps({"graph": str(self.kept), "profiles": self.profiles}).encode())

    def Runtime__deserialize_cuda_engine(self, runtime, serialized_engine):
        plan = json.loads(bytes(memoryview(serialized_engine)))
        engine = runtime._stand_in.made("ICudaEngine")
        engine.state["profiles"] = plan["profiles"]
        engine.state["session"] = onnxruntime.InferenceSession(plan["graph"], providers=["CPUExecutionProvider"])
        return engine

    def _tensors(self, engine) -> dict[str, tuple[Any, Any]]:
        session, modes = engine.state["session"], self.real.TensorIOMode
        tensors = {value.name: (value, modes.OUTPUT) for value in session.get_outputs()}
        return tensors | {value.name: (value, modes.INPUT) for value in session.get_inputs()}

    def ICudaEngine__get_tensor_name(self, engine, index):
        return list(self._tensors(engine))[index]

    def ICudaEngine__get_tensor_mode(self, engine, name):
        return self._tensors(engine)[name][1]

    def ICudaEngine__get_tensor_dtype(self, engine, name):
        assert self._tensors(engine)[name][0].type == "tensor(float)"
        return self.real.DataType.FLOAT

    def ICudaEngine__get_tensor_shape(self, engine, name):
        shape = self._tensors(engine)[name][0].shape
        return self.real.Dims([size if isinstance(size, int) else -1 for size in shape])

    def ICudaEngine__get_tensor_profile_shape(self, engine, name, profile_index):
        return [self.real.Dims(shape) for shape in engine.state["profiles"][profile_index][name]]

    def ICudaEngine__create_execution_context(self, engine, strategy):
        context = super().ICudaEngine__create_execution_context(engine, strategy)
        context.state["engine"] = engine
        return context

    def IExecutionContext__set_input_shape(self, context, name, shape):
        bounds = context.state["engine"].state["profiles"][context.state["profile"]].get(name)
        if bounds is not None:
            least, _, most = bounds
            assert all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        context.state["shapes"][name] = tuple(shape)
        return True

    def IExecutionContext__infer_shapes(self, context):
        """Shapes of the outputs, by running on zeros, since ONNX Runtime does not tell them otherwise."""
        session, shapes = context.state["engine"].state["session"], context.state["shapes"]
        zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        names = [value.name for value in session.get_outputs()]
        context.state["outputs"] = {
            name: value.shape for name, value in zip(names, session.run(names, zeros), strict=True)
        }
        return []

    def IExecutionContext__update_device_memory_size_for_shapes(self, context):
        return 1024

    def IExecutionContext__get_tensor_shape(self, context, name):
        return self.real.Dims(list(context.state["outputs"][name]))

    def IExecutionContext__execute_async_v3(self, context, stream_handle):
        state = context.state
        feeds = {name: floats(state["addresses"][name], shape) for name, shape in state["shapes"].items()}
        results = state["engine"].state["session"].run(list(state["outputs"]), feeds)
        for name, result in zip(state["outputs"], results, strict=True):
            floats(state["addresses"][name], result.shape)[:] = result
        return True


def scenario(trt: ModuleType, folder: str, what: str) -> dict:
    """`what` is "plain", one with nothing but profiles, or "command", one by command line with all that there is."""
    folder = Path(folder)
    weights, kept, output = folder / "checkpoint", folder / "kept", folder / what
    checkpoint = golden_checkpoint(weights, "dit_c")
    kept.mkdir()
    libraries = OnnxLibraries(trt, kept)
    pretend(StandIn(trt, trt_bindings.dump(trt), libraries.script()))
    if what == "plain":
        common = {"dtype": torch.float32, "profiles": [parse(PROFILE)], "verify": False, "quiet": True, "steps": (4,)}
        check_plain(to_tensorrt.export_tensorrt(checkpoint, output, **common), trt.__version__)
        failing(checkpoint, folder / "failing", libraries, common)
    else:
        check_commanded(by_command(weights, output))
    verification = verify_artifact(output, checkpoint, "cpu")
    checks = [check for part in verification["parts"].values() for check in part]
    return {
        "version": trt.__version__,
        "parts": sorted(verification["parts"]),
        "checks": len(checks),
        "worst": max(check["error"] / check["budget"] for check in [*checks, verification["sampling"]]),
    }


def pretend(stand_in: StandIn) -> None:
    """Makes the host a GPU of compute capability 9.0 with the stand-in for its TensorRT."""
    host = Torch()
    host.cuda.get_device_capability = lambda device: (9, 0)
    host.cuda.get_device_name = lambda device: "a GPU"
    own = trt_session.TensorRTSession

    class Session(own):
        def __init__(self, folder, part, manifest, device):
            super().__init__(folder, part, manifest, Device())

    for module in (to_tensorrt, trt_session):
        module.torch, module.import_tensorrt = host, lambda purpose: stand_in
    to_tensorrt.resolve_device = lambda device: Device()
    to_tensorrt.resolve_dtype = lambda dtype, device: host.float32
    trt_session.TensorRTSession = Session
    Manifest.check_device = lambda manifest, device: None


def check_plain(manifest: Manifest, version: str) -> None:
    assert manifest.kind == "tensorrt" and manifest.versions["tensorrt"] == version
    assert manifest.target == {"device": "cuda", "compute_capability": [9, 0]}
    parts = ("denoiser", "vae_encoder", "vae_decoder")
    files = {f"{part}.{kind}" for part in parts for kind in ("plan", "layers.json")} | {"modulation.safetensors"}
    assert set(manifest.files) == files, manifest.files
    assert sorted(path.name for path in manifest.folder.iterdir()) == sorted([*files, "manifest.json"])
    assert not list(manifest.folder.parent.glob(".lavin-rt*")), "the graphs were left behind"
    sizes = {"batch": [1, 3], "height": [2, 12], "width": [2, 12], "target_frames": [1, 2]}
    branches = [{**sizes, "cond_frames": [3, 9]}, {**sizes, "cond_frames": [2, 3]}]
    assert manifest.parts["denoiser"]["ranges"] == branches
    assert manifest.parts["vae_encoder"]["ranges"] == [{"rows": [2, 12], "columns": [2, 12]}]
    build = manifest.parts["denoiser"]["build"]
    assert build["attention"] == {"nodes": 2, "fused": 1} and build["plan_bytes"] > 0
    plan = json.loads((manifest.folder / "denoiser.plan").read_text())
    assert plan["profiles"][1]["cond_latents"] == [[1, 16, 2, 2, 2], [1, 16, 2, 4, 4], [3, 16, 3, 12, 12]]
    assert set(plan["profiles"][0]) == {"latents", "cond_latents"}, "tensors of fixed shape need no profile"
    plan = json.loads((manifest.folder / "vae_encoder.plan").read_text())
    assert plan["profiles"] == [{"pixels": [[1, 3, 1, 16, 16], [1, 3, 1, 32, 32], [1, 3, 1, 96, 96]]}]


def by_command(checkpoint: Path, output: Path) -> Manifest:
    """`lavin-rt export tensorrt` with all its own options."""
    parser = argparse.ArgumentParser()
    to_tensorrt.add_arguments(parser)
    line = (
        f"--profile {PROFILE} --keep-onnx --tf32 --optimization-level 1 --workspace 0.5 "
        f"--timing-cache {output.parent / 'timing'}"
    )
    options = parser.parse_args(line.split())
    own = {"checkpoint": str(checkpoint), "revision": None, "output": str(output), "device": "auto", "dtype": "auto"}
    rest = {"steps": [4], "speeds": [], "clip_frames": [], "templates": True, "verify": False, "quiet": True}
    vars(options).update({**own, **rest})
    return to_tensorrt.from_arguments(options)


def check_commanded(manifest: Manifest) -> None:
    assert manifest.options == {"optimization_level": 1, "tf32": True}
    for name in manifest.parts:
        assert {f"{name}.onnx", f"{name}.onnx.data"} <= set(manifest.files)
    text = (manifest.folder / "manifest.json").read_text()
    assert str(manifest.folder.parent) not in text, "a path of this machine in the manifest"
    assert (manifest.folder.parent / "timing").exists()


def failing(checkpoint: Any, output: Path, libraries: OnnxLibraries, common: dict) -> None:
    """What goes wrong leaves nothing behind."""
    before = sorted(output.parent.iterdir())
    libraries.fault = "build"
    with pytest.raises(RuntimeError, match="no tactic"):
        to_tensorrt.export_tensorrt(checkpoint, output, **common)
    libraries.fault = ""
    with pytest.raises(InputError, match="the graph takes 2 to 512"):
        to_tensorrt.export_tensorrt(checkpoint, output, **{**common, "profiles": [parse("height=32768")]})
    with pytest.raises(InputError, match="clip"):
        to_tensorrt.export_tensorrt(checkpoint, output, **common, clip_frames=(4,))
    assert sorted(output.parent.iterdir()) == before
