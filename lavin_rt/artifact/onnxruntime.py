"""An ONNX graph of an artifact in ONNX Runtime: torch tensors in, torch tensors out, bound where they lie."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lavin_rt.artifact.manifest import Manifest
from lavin_rt.artifact.onnx_file import check_external_files
from lavin_rt.artifact.parts import Part
from lavin_rt.artifact.sizes import bind_sizes, sized
from lavin_rt.devices import DTYPES
from lavin_rt.errors import InputError, missing_extra, one_line
from lavin_rt.host_state import own_state

ELEMENT_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}  # of onnx.TensorProto
PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")
SHAPES_HELD = 8
ERRORS_ONLY = 3
NO_GRAPH = "-1"  # of a run that ONNX Runtime neither captures nor replays


@dataclasses.dataclass(frozen=True, eq=False)
class _Bound:
    """Buffers of one set of shapes, bound once: what a CUDA graph needs. `captured` says whether there is one."""

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    binding: Any
    options: Any
    captured: bool


class OrtSession:
    """One graph, loaded.

    On a CPU inputs and outputs are bound where torch has them, nothing is copied. On CUDA every set of shapes has
    buffers of its own, which ONNX Runtime captures into its CUDA graph at the first call and replays after (not run by
    the project so far: it had no GPU with ONNX Runtime's package); the outputs are then those buffers, good until the
    next call of the same shapes. ONNX Runtime never lets a captured graph go, so the first 8 sets of shapes have one
    and later ones run without; so do all where it refuses to capture, which is said once.

    Args:
        folder: of the artifact, whose hashes have been checked.
        part: of `manifest.parts`.
        manifest: the artifact's.
        device: the CPU or a CUDA device.
        provider: "auto" (the device's own), "cpu", "cuda", or "tensorrt" (then CUDA for what it does not take).

    Raises:
        InputError: ONNX Runtime is missing or has no such provider, a dtype that it does not compute in, a graph that
            names files beyond its own weights, or one that cannot be loaded.
    """

    capturable = False  # it captures by itself

    def __init__(self, folder: Path, part: Part, manifest: Manifest, device: torch.device, provider: str = "auto"):
        self.part, self.device = part, device
        self.path = Path(folder) / part["file"]
        check_external_files(self.path, part["weights"])
        cpu = device.type == "cpu"
        if cpu and manifest.dtype == torch.bfloat16:
            raise InputError(
                f"{self.path.parent} is in bfloat16, which ONNX Runtime cannot compute on a CPU; "
                "export it with --dtype float32 or float16, or run it on CUDA"
            )
        self._ort = ort = import_onnxruntime()
        self._stream = None if cpu else torch.cuda.Stream(device)
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if cpu:
            options.intra_op_num_threads = torch.get_num_threads()
        # Two providers in one session capture no graph of CUDA's own.
        self._captures = not cpu and provider != "tensorrt"
        self.session = self._load(options, provider)
        self._check_tensors()
        self._bound: OrderedDict[tuple[tuple[int, ...], ...], _Bound] = OrderedDict()
        self._captured = 0

    def _load(self, options: Any, provider: str) -> Any:
        providers = self._providers(provider, self.device)
        try:
            return self._ort.InferenceSession(str(self.path), options, providers=providers, disable_fallback=True)
        except Exception as error:  # ONNX Runtime's errors have no common type
            reason = one_line(error, 400)
        if self._captures:  # which asks for a CUDA kernel for every node
            self._captures = False
            session = self._load(options, provider)
            warnings.warn(f"{self.path.name} runs without a CUDA graph, slower: {reason}", stacklevel=3)
            return session
        raise InputError(f"{self.path} cannot be loaded: {reason}; export or fetch the artifact again")

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The graph's outputs.

        Raises:
            InputError: shapes that the artifact was not exported for.
        """
        sizes = bind_sizes(self.part, [tensor.shape for tensor in inputs], self.path.stem)
        with own_state():
            return self._answer(inputs, sizes)

    def _answer(self, inputs: tuple[torch.Tensor, ...], sizes: dict[str, int]) -> tuple[torch.Tensor, ...]:
        inputs = tuple(
            tensor.to(self.device, DTYPES[wanted["dtype"]]).contiguous()
            for tensor, wanted in zip(inputs, self.part["inputs"], strict=True)
        )
        if self._stream is None:
            outputs = self._outputs(sizes)
            self._run(self._bind(inputs, outputs), None)
            return outputs
        key = tuple(tuple(tensor.shape) for tensor in inputs)
        bound = self._bound.pop(key, None) or self._make_bound(inputs, sizes)
        self._bound[key] = bound
        loose = [shapes for shapes, one in self._bound.items() if not one.captured]
        for shapes in loose[: max(0, len(loose) - SHAPES_HELD)]:
            del self._bound[shapes]
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            for buffer, tensor in zip(bound.inputs, inputs, strict=True):
                buffer.copy_(tensor)
                tensor.record_stream(self._stream)
            self._run(bound.binding, bound.options)
        caller.wait_stream(self._stream)
        return bound.outputs

    def _run(self, binding: Any, options: Any) -> None:
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:  # as above
            raise RuntimeError(f"ONNX Runtime failed in {self.path.name}: {one_line(error, 400)}") from error

    def _make_bound(self, inputs: tuple[torch.Tensor, ...], sizes: dict[str, int]) -> _Bound:
        buffers = tuple(torch.empty_like(tensor) for tensor in inputs)
        outputs = self._outputs(sizes)
        options = self._ort.RunOptions()
        captured = self._captures and self._captured < SHAPES_HELD
        self._captured += captured
        options.add_run_config_entry("gpu_graph_id", str(self._captured) if captured else NO_GRAPH)
        return _Bound(buffers, outputs, self._bind(buffers, outputs), options, captured)

    def _outputs(self, sizes: dict[str, int]) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.empty(sized(tensor["shape"], sizes), dtype=DTYPES[tensor["dtype"]], device=self.device)
            for tensor in self.part["outputs"]
        )

    def _bind(self, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Any:
        binding = self.session.io_binding()
        for bind, described, tensors in (
            (binding.bind_input, self.part["inputs"], inputs),
            (binding.bind_output, self.part["outputs"], outputs),
        ):
            for tensor, entry in zip(tensors, described, strict=True):
                place = (self.device.type, self.device.index or 0, ELEMENT_TYPES[tensor.dtype])
                bind(entry["name"], *place, tuple(tensor.shape), tensor.data_ptr())
        return binding

    def _providers(self, provider: str, device: torch.device) -> list:
        if provider not in PROVIDERS:
            raise InputError(f"provider is {provider!r}; expected one of {', '.join(PROVIDERS)}")
        wanted = device.type if provider == "auto" else provider
        if (wanted == "cpu") != (device.type == "cpu"):
            raise InputError(f"ONNX Runtime's provider {wanted} does not run on {device}")
        if wanted == "cpu":
            return ["CPUExecutionProvider"]
        available = self._ort.get_available_providers()
        assert self._stream is not None  # there is one on every device but a CPU
        stream = {
            "device_id": str(device.index or 0),
            "user_compute_stream": str(self._stream.cuda_stream),
        }
        # TF32 would not be float32.
        graph = str(int(self._captures))
        cuda = ("CUDAExecutionProvider", {**stream, "enable_cuda_graph": graph, "use_tf32": "0"})
        tensorrt = ("TensorrtExecutionProvider", {**stream, "trt_cuda_graph_enable": "1"})
        chosen = [tensorrt, cuda] if wanted == "tensorrt" else [cuda]
        missing = [name for name, _ in chosen if name not in available]
        if missing:
            raise InputError(
                f"ONNX Runtime here has no {missing[0]} (it has {', '.join(available)}); "
                "uninstall onnxruntime, then: pip install 'lavin-rt[ort-gpu]'; or run on --device cpu"
            )
        return chosen

    def _check_tensors(self) -> None:
        """The manifest says of inputs and outputs what the graph says, or memory of the wrong size would be bound."""
        kinds = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}
        for role, entries, found in (
            ("inputs", self.part["inputs"], self.session.get_inputs()),
            ("outputs", self.part["outputs"], self.session.get_outputs()),
        ):
            said = [(entry["name"], kinds[entry["dtype"]], entry["shape"]) for entry in entries]
            has = [(tensor.name, tensor.type, list(tensor.shape)) for tensor in found]
            if said != has:
                raise InputError(f"{self.path} has the {role} {has}, its manifest says {said}; export it again")


def import_onnxruntime() -> ModuleType:
    """The module `onnxruntime`, with NVIDIA's libraries loaded where its GPU package is installed.

    Raises:
        InputError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", "ort", "running an ONNX artifact") from None
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    return onnxruntime
