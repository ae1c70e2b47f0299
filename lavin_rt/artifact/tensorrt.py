"""A TensorRT plan of an artifact, loaded: torch tensors in, torch tensors out, on torch's current stream.

Written against NVIDIA's Python bindings of TensorRT 10.16 and 11.4 and checked with them; the project has not yet run
a plan with the real libraries.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lavin_rt.artifact.manifest import Manifest
from lavin_rt.artifact.parts import Part, TensorSpec
from lavin_rt.artifact.tensorrt_library import check_version, create, import_tensorrt, make_logger, signals_noted
from lavin_rt.errors import InputError

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
# What TensorRT asks of the address of an input or output.
ALIGNMENT = 256
SHAPES_HELD = 16


@dataclasses.dataclass
class _Bound:
    """An execution context with its shapes and its own scratch memory, so that a CUDA graph may hold on to it."""

    context: Any
    memory: torch.Tensor
    outputs: list[tuple[str, torch.dtype, tuple[int, ...]]]
    captured: bool = False


class Calls:
    """A session's plan with execution contexts of its own, which go when this does: for whoever captures calls and
    knows how long the graphs live.
    """

    def __init__(self, session: TensorRTSession):
        self._session = session
        self._bound: dict[tuple[tuple[int, ...], ...], _Bound] = {}

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As the session."""
        return self._session.run(inputs, self._bound)

    def __del__(self):
        if self._bound:  # a context may not end while it runs
            torch.cuda.synchronize(self._session.device)


class TensorRTSession:
    """One plan, deserialised on a GPU.

    A call runs on torch's current stream without waiting for it (on a stream of its own, joined by events, where that
    is the default stream, on which TensorRT would synchronise), allocates its outputs with torch and may be captured
    into a CUDA graph once it has been called with the same shapes. Every set of shapes has an execution context and
    scratch memory of its own; the 16 sets used last are held, besides all that a graph has captured, which the session
    holds as long as it lives: `calls` gives a caller contexts that go with it.

    Args:
        folder: of the artifact; hashes of its files have been checked.
        part: the manifest's entry: `file`, `inputs`, `outputs` (`name`, `dtype`, `shape`).
        manifest: the artifact's.
        device: a CUDA device.

    Attributes:
        engine: TensorRT's.

    Raises:
        InputError: TensorRT is missing, the plan is of another version or GPU or cannot be read, or its inputs and
            outputs are not those of the manifest.
    """

    def __init__(self, folder: Path, part: Part, manifest: Manifest, device: torch.device):
        if device.type != "cuda":
            raise InputError(f"a TensorRT plan runs on CUDA; the device is {device}; use --device cuda")
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self.path = Path(folder) / part["file"]
        self._trt = trt = import_tensorrt("running a TensorRT artifact")
        manifest.check_device(self.device)
        check_version(manifest.versions.get("tensorrt"), trt.__version__)
        self.logger = make_logger(trt)
        with torch.cuda.device(device):
            self._runtime = create(trt.Runtime, self.logger)
            self.engine = self._deserialise()
        self._inputs = self._tensors(part["inputs"], trt.TensorIOMode.INPUT)
        self._outputs = self._tensors(part["outputs"], trt.TensorIOMode.OUTPUT)
        self._bound: dict[tuple[tuple[int, ...], ...], _Bound] = {}
        self._stream: torch.cuda.Stream | None = None

    def _deserialise(self) -> Any:
        if self.path.stat().st_size == 0:
            raise InputError(f"{self.path.name} is empty; export it again")
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
            signals_noted(),
        ):
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise InputError(f"{self.path.name}: TensorRT cannot read the plan: {self.logger.why}; export it again")
        return engine

    def _tensors(self, declared: Sequence[TensorSpec], mode: Any) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape with -1 where it varies) in the manifest's order, compared with the plan's own."""
        trt, engine = self._trt, self.engine
        dtypes = {getattr(trt.DataType, name): dtype for name, dtype in DTYPES.items()}
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        own = {name for name in names if engine.get_tensor_mode(name) == mode}
        wanted = [entry["name"] for entry in declared]
        if own != set(wanted):
            raise InputError(f"{self.path.name} has tensors {sorted(own)}; its manifest says {sorted(wanted)}")
        tensors = []
        for entry in declared:
            dtype = dtypes.get(engine.get_tensor_dtype(entry["name"]))
            if dtype is None or str(dtype) != f"torch.{entry['dtype']}":
                raise InputError(f"{self.path.name}: {entry['name']} is {dtype}; its manifest says {entry['dtype']}")
            tensors.append((entry["name"], dtype, tuple(engine.get_tensor_shape(entry["name"]))))
        return tensors

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs the plan.

        Args:
            inputs: on the session's device, in the manifest's order and dtypes; copied where they are not contiguous
                or not aligned to 256 bytes.

        Returns:
            Fresh tensors, one per output.

        Raises:
            InputError: the shapes lie outside every optimisation profile.
            TypeError, ValueError: another number, dtype, rank or device of inputs.
            RuntimeError: TensorRT failed, or shapes are new in the middle of a capture.
        """
        return self.run(inputs, None)

    def calls(self) -> Calls:
        """The same plan, for calls that end up in CUDA graphs: its contexts go when what this gives does."""
        return Calls(self)

    def run(self, inputs: tuple[torch.Tensor, ...], own: dict | None) -> tuple[torch.Tensor, ...]:
        """A call on the session's contexts, or on those of `Calls`."""
        with torch.cuda.device(self.device):
            return self._run(tuple(self._checked(*pair) for pair in zip(self._inputs, inputs, strict=True)), own)

    def _run(self, inputs: tuple[torch.Tensor, ...], own: dict | None) -> tuple[torch.Tensor, ...]:
        current = torch.cuda.current_stream(self.device)
        capturing = torch.cuda.is_current_stream_capturing()
        bound = self._context(tuple(tuple(value.shape) for value in inputs), capturing, own)
        outputs = tuple(torch.empty(shape, dtype=dtype, device=self.device) for _, dtype, shape in bound.outputs)
        context = bound.context
        for (name, _, _), value in zip(self._inputs, inputs, strict=True):
            context.set_tensor_address(name, value.data_ptr())
        for (name, _, _), value in zip(bound.outputs, outputs, strict=True):
            context.set_tensor_address(name, value.data_ptr())
        on_default = current == torch.cuda.default_stream(self.device)
        stream = self._own_stream() if on_default else current
        if on_default:
            stream.wait_stream(current)
        if not context.execute_async_v3(stream_handle=stream.cuda_stream):
            raise RuntimeError(f"{self.path.name}: TensorRT failed: {self.logger.why}")
        if on_default:
            current.wait_stream(stream)
        return outputs

    def _checked(self, declared: tuple[str, torch.dtype, tuple[int, ...]], value: torch.Tensor) -> torch.Tensor:
        name, dtype, shape = declared
        if value.dtype != dtype:
            raise TypeError(f"{name} has dtype {value.dtype}; expected {dtype}")
        if value.device != self.device:
            raise ValueError(f"{name} is on {value.device}; expected {self.device}")
        if value.dim() != len(shape):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {len(shape)} dimensions")
        if value.is_contiguous() and value.data_ptr() % ALIGNMENT == 0:
            return value
        return torch.empty(value.shape, dtype=dtype, device=self.device).copy_(value)

    def _own_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    def _context(self, shapes: tuple[tuple[int, ...], ...], capturing: bool, own: dict | None) -> _Bound:
        held = self._bound if own is None else own
        bound = held.pop(shapes, None)
        if bound is None:
            if capturing:
                raise RuntimeError(f"{self.path.name}: run once with shapes {shapes} before capturing a CUDA graph")
            loose = [key for key, one in held.items() if not one.captured] if own is None else []
            for key in loose[: max(0, len(loose) - SHAPES_HELD + 1)]:
                torch.cuda.synchronize(self.device)
                del held[key]
            bound = self._bind(shapes)
        bound.captured |= capturing
        held[shapes] = bound
        return bound

    def _bind(self, shapes: tuple[tuple[int, ...], ...]) -> _Bound:
        """A context for these input shapes, ready to run."""
        trt = self._trt
        profile = self.profile(shapes)
        context = self.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise RuntimeError(f"{self.path.name}: no execution context: {self.logger.why}")
        stream = self._own_stream()
        if not context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise RuntimeError(f"{self.path.name}: profile {profile} cannot be used: {self.logger.why}")
        for (name, _, _), shape in zip(self._inputs, shapes, strict=True):
            if not context.set_input_shape(name, shape):
                raise RuntimeError(f"{self.path.name}: {name} cannot have shape {shape}: {self.logger.why}")
        unknown = context.infer_shapes()
        if unknown:
            raise RuntimeError(f"{self.path.name}: shapes do not follow from the inputs': {', '.join(unknown)}")
        size = context.update_device_memory_size_for_shapes()
        memory = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        context.set_device_memory(memory.data_ptr(), size)
        outputs = [(name, dtype, tuple(context.get_tensor_shape(name))) for name, dtype, _ in self._outputs]
        # Once per shape: the profile's change must have happened before another stream uses the context.
        stream.synchronize()
        return _Bound(context, memory, outputs)

    def profile(self, shapes: Sequence[Sequence[int]]) -> int:
        """The optimisation profile for these input shapes: of those that cover them, the one tuned nearest to them.

        Raises:
            InputError: none covers them; the line lists what there is.
        """
        distances = {}
        ranges = []
        for index in range(self.engine.num_optimization_profiles):
            bounds = [
                [tuple(bound) for bound in self.engine.get_tensor_profile_shape(name, index)]
                if -1 in own
                else [own] * 3
                for name, _, own in self._inputs
            ]
            ranges.append(bounds)
            if all(
                low <= size <= high
                for shape, (least, _, most) in zip(shapes, bounds, strict=True)
                for low, size, high in zip(least, shape, most, strict=True)
            ):
                distances[index] = sum(
                    abs(math.log(size / best))
                    for shape, (_, tuned, _) in zip(shapes, bounds, strict=True)
                    for size, best in zip(shape, tuned, strict=True)
                )
        if not distances:
            held = "; ".join(
                ", ".join(
                    f"{name} {list(least)} to {list(most)}"
                    for (name, _, shape), (least, _, most) in zip(self._inputs, bounds, strict=True)
                    if -1 in shape
                )
                for bounds in ranges
            )
            given = ", ".join(
                f"{name} {list(shape)}" for (name, _, own), shape in zip(self._inputs, shapes, strict=True) if -1 in own
            )
            raise InputError(f"{self.path.name} has no profile for {given}; it has {held}; export one that covers it")
        return min(distances, key=distances.__getitem__)
