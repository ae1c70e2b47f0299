"""How TensorRT's libraries behave as far as our code relies on it: what the stand-in does when it is called.

Rules that the documentation states and the signatures do not are asserted here: what must outlive what, what must be
set before what.
"""

from __future__ import annotations

import ctypes
import json
import math
import signal
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from support.trt_stand_in import HostMemory

PLAN = b"a plan"
GRAPH = b"\x3a\x03\x12\x01g"  # the least that is an ONNX file: a graph named g
DECOMPOSED = "node_scaled_dot_product_attention_1"
LAYERS = {
    "Layers": [
        {
            "Name": f"{DECOMPOSED}_gemm",
            "LayerType": "gemm",
            "Inputs": [{"Name": f"{DECOMPOSED}_query"}],
            "Outputs": [{"Name": DECOMPOSED}],
            "TacticName": "sm90_xmma_gemm_bf16bf16_f32",
            "Metadata": f"[ONNX Layer: {DECOMPOSED}]",
        },
        {"Name": "__myl_MulSum_0", "LayerType": "kgen"},
        {"Name": "attention_0", "LayerType": "kgen", "TacticName": "__mye_fused_mha_sm90"},
        {"Name": "shuffle_0", "LayerType": "shuffle"},
        "attention_1",
    ],
    "Bindings": ["latents"],
}


class Libraries:
    """The builder's, parser's and runtime's side. `script()` is what `trt_stand_in.StandIn` takes.

    The engine has inputs `latents` `[-1, 3]` and `scale` `[3]` and gives `velocity = latents * scale`, which it really
    computes, at the addresses that it was given. It has two profiles: 1 to 2 rows, and 2 to 8 rows.

    Attributes:
        fault: "parse", "profile", "build" or "run": what goes wrong; "SIGINT" or "SIGTERM": the signal that comes in
            the middle of a build.
    """

    PROFILES = ((1, 1, 2), (2, 4, 8))

    def __init__(self, real: ModuleType, fault: str = ""):
        self.real, self.fault = real, fault
        self.flags: set[Any] = set()
        self.profiles: list[dict] = []
        self.network_flags = 0
        self.attention: list[Any] = []
        self.contexts: list[Any] = []
        self.streams: list[int] = []
        self.timing = b""
        self.config = self.parser = None

    def script(self) -> dict[str, Any]:
        named = {
            "OnnxParser": lambda parser, network, logger: setattr(self, "parser", weakref.ref(parser)),
            "Builder": self._logger,
            "Runtime": self._logger,
        }
        own = {name.replace("__", "."): getattr(self, name) for name in dir(self) if name[0].isupper() and "__" in name}
        return {**named, **own, **self._values()}

    def _values(self) -> dict[str, Any]:
        return {
            "INetworkDefinition.num_layers": 3,
            "IAttentionBoundaryLayer.attention": self._attention,
            "OnnxParser.num_errors": 2,
            "ParserError.code": lambda error: _Code("UNSUPPORTED_NODE"),
            "ParserError.desc": lambda error: "No importer registered\n for op",
            "ParserError.node_name": lambda error: "node_7",
            "ParserError.node_operator": lambda error: "Frobnicate",
            "ICudaEngine.num_io_tensors": 3,
            "ICudaEngine.num_optimization_profiles": len(self.PROFILES),
        }

    def _logger(self, owner: Any, logger: Any) -> None:
        self.logger = logger

    def _attention(self, layer: Any) -> Any:
        attention = layer.state.setdefault("attention", layer._stand_in.made("IAttention"))
        self.attention.append(attention)
        return attention

    # Building.

    def Builder__create_network(self, builder, flags=0):
        self.network_flags = flags
        return builder._stand_in.made("INetworkDefinition")

    def OnnxParser__parse_from_file(self, parser, model):
        assert Path(model).read_bytes().startswith(GRAPH[:1])
        return self.fault != "parse"

    def OnnxParser__get_error(self, parser, index):
        return parser._stand_in.made("ParserError")

    def INetworkDefinition__get_layer(self, network, index):
        layer = network._stand_in.made("ILayer")
        kinds = self.real.LayerType
        layer._values["type"] = kinds.MATRIX_MULTIPLY if index == 0 else kinds.ATTENTION_INPUT
        return layer

    def IBuilderConfig__set_flag(self, config, flag):
        self.flags.add(flag)

    def IBuilderConfig__clear_flag(self, config, flag):
        self.flags.discard(flag)

    def IOptimizationProfile__set_shape(self, profile, input, min, opt, max):
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        profile.state[input] = (tuple(min), tuple(opt), tuple(max))

    def IBuilderConfig__add_optimization_profile(self, config, profile):
        if self.fault == "profile":
            return -1
        self.profiles.append(profile.state)
        return len(self.profiles) - 1

    def IBuilderConfig__create_timing_cache(self, config, serialized_timing_cache):
        cache = config._stand_in.made("ITimingCache")
        cache.state["held"] = bytes(serialized_timing_cache)
        return cache

    def IBuilderConfig__set_timing_cache(self, config, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache.state["held"] == b"of another GPU":
            return False
        config.state["cache"] = weakref.ref(cache)
        return True

    def IBuilderConfig__get_timing_cache(self, config):
        cache = config._stand_in.made("ITimingCache")
        cache.state["held"] = self.timing
        return cache

    def ITimingCache__serialize(self, cache):
        return HostMemory(cache.state["held"])

    def Builder__build_serialized_network(self, builder, network, config):
        assert self.parser() is not None, "the parser must outlive the build"
        if "cache" in config.state:
            assert config.state["cache"]() is not None, "the timing cache must outlive the build"
            self.timing = config.state["cache"]().state["held"] + b" and more"
        self.config = config
        monitor = config.progress_monitor
        if isinstance(monitor, self.real.IProgressMonitor):
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("Tactics", "Building", 3)
            assert monitor.step_complete("Tactics", 0) is True
            if self.fault.startswith("SIG"):
                try:
                    signal.raise_signal(getattr(signal, self.fault))
                    if not monitor.step_complete("Tactics", 1):
                        return None
                except BaseException:
                    pass  # what a callback raises is lost in C++
            monitor.phase_finish("Tactics")
            monitor.phase_finish("Building")
        if self.fault == "build":
            self.logger.log(self.real.ILogger.ERROR, "no tactic for node_7")
            return None
        return HostMemory(PLAN)

    # Running.

    def Runtime__deserialize_cuda_engine(self, runtime, serialized_engine):
        if bytes(memoryview(serialized_engine)) != PLAN:
            self.logger.log(self.real.ILogger.ERROR, "magic tag\n does not match")
            return None
        return runtime._stand_in.made("ICudaEngine")

    def EngineInspector__get_engine_information(self, inspector, format):
        assert format == self.real.LayerInformationFormat.JSON
        return json.dumps(LAYERS)

    def ICudaEngine__get_tensor_name(self, engine, index):
        return ("velocity", "scale", "latents")[index]

    def ICudaEngine__get_tensor_mode(self, engine, name):
        kinds = self.real.TensorIOMode
        return kinds.OUTPUT if name == "velocity" else kinds.INPUT

    def ICudaEngine__get_tensor_dtype(self, engine, name):
        return self.real.DataType.FLOAT

    def ICudaEngine__get_tensor_shape(self, engine, name):
        return self.real.Dims([3] if name == "scale" else [-1, 3])

    def ICudaEngine__get_tensor_profile_shape(self, engine, name, profile_index):
        assert name == "latents", "a tensor whose shape is fixed has no profile"
        return [self.real.Dims([rows, 3]) for rows in self.PROFILES[profile_index]]

    def ICudaEngine__create_execution_context(self, engine, strategy):
        assert strategy == self.real.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine._stand_in.made("IExecutionContext")
        context.state.update(shapes={}, addresses={}, profile=None, memory=None)
        self.contexts.append(context)
        return context

    def IExecutionContext__set_optimization_profile_async(self, context, profile_index, stream_handle):
        context.state["profile"] = profile_index
        return True

    def IExecutionContext__set_input_shape(self, context, name, shape):
        assert context.state["profile"] is not None
        if name == "latents":
            least, _, most = self.PROFILES[context.state["profile"]]
            assert least <= shape[0] <= most
        context.state["shapes"][name] = tuple(shape)
        return True

    def IExecutionContext__infer_shapes(self, context):
        return [name for name in ("latents", "scale") if name not in context.state["shapes"]]

    def IExecutionContext__update_device_memory_size_for_shapes(self, context):
        assert len(context.state["shapes"]) == 2
        return 1024

    def IExecutionContext__set_device_memory(self, context, memory, size):
        assert memory and size == 1024
        context.state["memory"] = memory

    def IExecutionContext__get_tensor_shape(self, context, name):
        return self.real.Dims(list(context.state["shapes"]["latents"]))

    def IExecutionContext__set_tensor_address(self, context, name, memory):
        assert memory % 256 == 0, f"the address of {name} is not aligned"
        context.state["addresses"][name] = memory
        return True

    def IExecutionContext__execute_async_v3(self, context, stream_handle):
        state = context.state
        assert state["memory"] and set(state["addresses"]) == {"latents", "scale", "velocity"}
        assert stream_handle, "TensorRT synchronises on the default stream"
        self.streams.append(stream_handle)
        if self.fault == "run":
            self.logger.log(self.real.ILogger.ERROR, "illegal address")
            return False
        shape = state["shapes"]["latents"]
        latents, velocity = (floats(state["addresses"][name], shape) for name in ("latents", "velocity"))
        velocity[:] = latents * floats(state["addresses"]["scale"], (3,))
        return True


class _Code:
    def __init__(self, name: str):
        self.name = name


def floats(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 array at an address of this process."""
    return np.ctypeslib.as_array((ctypes.c_float * math.prod(shape)).from_address(address)).reshape(shape)
