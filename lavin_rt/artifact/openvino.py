"""A network of an artifact in OpenVINO's form, run on a CPU: torch tensors in, torch tensors out.

The files hold float32; what is computed in is OpenVINO's to be told when it compiles, and is always told.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lavin_rt.artifact.manifest import Manifest
from lavin_rt.artifact.parts import Part
from lavin_rt.artifact.sizes import bind_sizes, sized
from lavin_rt.devices import DTYPES
from lavin_rt.errors import InputError, missing_extra, one_line
from lavin_rt.host_state import own_state

SHAPES_HELD = 8
BYTES_HELD = 2**30  # of weights, of which every compiled shape has a copy in the order that it wants them


class OpenVinoSession:
    """One network, read; compiled for every set of shapes that it is called with.

    A network compiled for its shapes is faster than one for any, but has its weights for itself. The last 8 sets of
    shapes are held, or as many as have 1 GiB of weights together; a network of which not even two fit, the branches of
    a guided step, is compiled once for all shapes.

    Args:
        folder: of the artifact, whose hashes have been checked.
        part: of `manifest.parts`.
        manifest: the artifact's; its dtype is what is computed in: float32 exactly, or bfloat16 where the processor has
            it. One without is told of in a warning, and computes in float32.
        any_shape: compile it once for all shapes, however small it is.

    Raises:
        InputError: OpenVINO is missing, a dtype that it does not compute in here, a network that it cannot read, or
            another one than the manifest says.
    """

    def __init__(self, folder: Path, part: Part, manifest: Manifest, any_shape: bool = False):
        self.part, self.path = part, Path(folder) / part["file"]
        self._library = openvino = import_openvino("running an OpenVINO artifact")
        self._core = core(openvino)
        self._settings = {
            "INFERENCE_PRECISION_HINT": precision(manifest.dtype, self.path.parent),
            # OpenVINO's own number would be of the machine, and its threads each bound to a core that others have, too.
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        self._model = read_network(openvino, folder, part)
        self._check_tensors()
        weights = sum((Path(folder) / name).stat().st_size for name in part["weights"])
        self._held = 1 if any_shape else min(SHAPES_HELD, BYTES_HELD // max(1, weights))
        self._requests: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()
        self._lock = threading.Lock()  # a request serves one call at a time
        self.computes_in = computes_in(self._core, manifest.dtype)
        if self.computes_in != manifest.dtype:
            warnings.warn("this processor has no bfloat16: OpenVINO computes in float32", stacklevel=2)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The network's outputs, tensors of their own.

        Raises:
            InputError: shapes that the artifact was not exported for, or a network that cannot be compiled for them.
        """
        sizes = bind_sizes(self.part, [tensor.shape for tensor in inputs], self.path.stem)
        shapes = [sized(tensor["shape"], sizes) for tensor in self.part["outputs"]]
        with own_state(), self._lock:
            arrays = [
                tensor.to("cpu", DTYPES[wanted["dtype"]]).contiguous().numpy()
                for tensor, wanted in zip(inputs, self.part["inputs"], strict=True)
            ]
            request = self._request([array.shape for array in arrays])
            for index, array in enumerate(arrays):
                request.set_input_tensor(index, self._library.Tensor(array, shared_memory=True))
            try:
                request.infer()
            except Exception as error:  # OpenVINO's errors have no common type
                raise RuntimeError(f"OpenVINO failed in {self.path.name}: {one_line(error, 400)}") from error
            # Copied: the next call writes into the same memory.
            outputs = [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in range(len(shapes))]
        found = [tuple(output.shape) for output in outputs]
        if found != shapes:
            raise InputError(f"{self.path} gives {found}, its manifest says {shapes}; export it again")
        return tuple(
            output.to(DTYPES[described["dtype"]])
            for output, described in zip(outputs, self.part["outputs"], strict=True)
        )

    def _request(self, shapes: Sequence[tuple[int, ...]]) -> Any:
        """What runs these shapes."""
        key = tuple(shapes) if self._held >= 2 else ()
        request = self._requests.pop(key, None)
        if request is None:
            while key and len(self._requests) >= self._held:  # before another one takes its memory
                self._requests.popitem(last=False)
            try:
                model = self._model
                if key:
                    model = model.clone()
                    model.reshape(dict(enumerate(map(list, key))))
                request = self._core.compile_model(model, "CPU", self._settings).create_infer_request()
            except Exception as error:  # as above
                raise InputError(
                    f"{self.path} cannot be compiled for {list(shapes)}: {one_line(error, 400)}; "
                    "export or fetch the artifact again"
                ) from error
        self._requests[key] = request
        return request

    def _check_tensors(self) -> None:
        """The manifest says of inputs and outputs what the network says."""
        for role, entries, ports in (
            ("inputs", self.part["inputs"], self._model.inputs),
            ("outputs", self.part["outputs"], self._model.outputs),
        ):
            said = [(e["name"], e["dtype"], [n if type(n) is int else -1 for n in e["shape"]]) for e in entries]
            names = [entry["name"] for entry in entries] + [""] * len(ports)
            has = [
                (name if name in port.names else min(port.names, default=""), *_described(port))
                for name, port in zip(names, ports, strict=False)
            ]
            if said != has:
                raise InputError(f"{self.path} has the {role} {has}, its manifest says {said}; export it again")


def _described(port: Any) -> tuple[str, list[int]]:
    """Dtype and shape of an input or output, -1 for what varies."""
    kind, shape = port.element_type.get_type_name(), port.partial_shape
    sizes = [size.get_length() if size.is_static else -1 for size in shape] if shape.rank.is_static else [-1]
    return "float32" if kind == "f32" else kind, sizes


def precision(dtype: torch.dtype, where: object) -> str:
    """OpenVINO's name of what to compute in; an `InputError` for float16, which is no faster than float32 on a CPU."""
    names = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if dtype not in names:
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"{where} in {name}: OpenVINO computes in float32 or bfloat16 on a CPU; choose one of these")
    return names[dtype]


@functools.cache
def core(openvino: ModuleType) -> Any:
    """OpenVINO's core, one for the process and kept to its end.

    Its CPU plugin sets a signal stack for the thread that it starts on, and when it ends puts back the one before. Of
    two cores that end in the order in which they began, the second puts back the first one's, which is gone: the next
    signal that Python handles would end the process.
    """
    return openvino.Core()


def computes_in(core: Any, dtype: torch.dtype) -> torch.dtype:
    """What a processor computes in that is asked for a dtype: float32 where it has no bfloat16."""
    has = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return dtype if has else torch.float32


def read_network(openvino: ModuleType, folder: Path, part: Part) -> Any:
    """The network of a part's files, its weights mapped.

    Raises:
        InputError: a file that OpenVINO cannot read, or that is of another of the forms that it reads, some of which
            name further files to be read.
    """
    path = Path(folder) / part["file"]
    if len(part["weights"]) != 1:
        raise InputError(f"{path} has the weights {part['weights']}, expected one file; export the artifact again")
    with open(path, "rb") as file:
        if file.read(1) != b"<":
            raise InputError(f"{path} is no XML file of OpenVINO; export or fetch the artifact again")
    try:
        return core(openvino).read_model(str(path), str(Path(folder) / part["weights"][0]))
    except Exception as error:  # as above
        raise InputError(
            f"{path} cannot be loaded: {one_line(error, 400)}; export or fetch the artifact again"
        ) from error


def import_openvino(purpose: str) -> ModuleType:
    """The module `openvino`; an `InputError` where it is not installed."""
    try:
        import openvino
    except ImportError:
        raise missing_extra("openvino", "openvino", purpose) from None
    return openvino
