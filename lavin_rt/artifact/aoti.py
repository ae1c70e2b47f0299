"""A network compiled by AOTInductor: a `.pt2` package of code, and its weights in a safetensors file.

A package is machine code that runs in this process; nothing here runs it before the manifest's hashes were checked
(`Manifest.check_files`) and the file found to be the same since (`Manifest.check_unchanged`), the loader's business.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from lavin_rt.artifact.manifest import Manifest
from lavin_rt.artifact.parts import Part
from lavin_rt.artifact.sizes import bind_sizes
from lavin_rt.container import folder_fault, temporary_folder
from lavin_rt.devices import DTYPES
from lavin_rt.errors import InputError, one_line
from lavin_rt.files import utf8_path
from lavin_rt.host_state import full_float32

# What the weights file says about tensors whose memory order is not the order of their dimensions.
PERMUTED = "permuted"
# Vector instructions, each level runs what those before it have.
CPU_LEVELS = ("DEFAULT", "AVX2", "AVX512")


class AotiSession:
    """One network of an AOTInductor artifact, loaded; call it with its inputs in the manifest's order.

    On a CPU the weights are the mapped file itself, shared with every process that maps it; on a GPU they are read
    once. A package without its weights would crash the process when it runs, so there is no session without them.
    Calls run on torch's current stream and do not wait for it, so that they may be captured into a CUDA graph; results
    are tensors of their own.

    Args:
        folder: the artifact's.
        part: of `manifest.parts`.
        manifest: whose files are known to be those that were exported.
        device: where the inputs are and the outputs will be.
        weights: of the files that other parts have read, by name; what this one reads is added, so that parts which
            name one file share its memory.

    Raises:
        InputError: another device, processor or torch version than it was made for, weights that do not belong to the
            package, or a package that cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        part: Part,
        manifest: Manifest,
        device: torch.device,
        weights: dict[str, dict[str, torch.Tensor]] | None = None,
    ):
        self.part, self.device = part, device
        self.path = Path(folder) / part["file"]
        manifest.check_device(device)
        check_versions(self.path, manifest.versions.get("torch", "none"), part, device)
        self._weights: dict[str, torch.Tensor] = {}
        known = {} if weights is None else weights
        for name in part["weights"]:
            if name not in known:
                known[name] = read_weights(Path(folder) / name, device)
            self._weights |= known[name]
        with _loading(self.path), utf8_path(self.path) as readable:
            # What torch._inductor.aoti_load_package wraps, without the compiler, whose import takes a second. The third
            # argument leaves out locks between threads, which a capture into a CUDA graph does not allow.
            index = -1 if device.index is None else device.index
            self._loader = torch._C._aoti.AOTIModelPackageLoader(readable, "model", True, 1, index)
            wanted = list(self._loader.get_constant_fqns())
        missing = [name for name in wanted if name not in self._weights]
        if missing:
            raise InputError(
                f"{self.path}: its weights are not all there, {len(missing)} of {len(wanted)} are missing, e.g. "
                f"{missing[0]}; export the artifact again"
            )
        with _loading(self.path):
            # The package keeps pointers to these tensors: no second copy, and this object must hold them.
            self._loader.load_constants({name: self._weights[name] for name in wanted}, False, True, True)
        self._dtypes = [DTYPES[tensor["dtype"]] for tensor in part["inputs"]]

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The network's outputs.

        Raises:
            InputError: inputs that it was not exported for.
        """
        # Compiled code believes what it is given: another shape or dtype would read memory that is not there.
        bind_sizes(self.part, [tensor.shape for tensor in inputs], self.path.stem)
        for tensor, dtype, described in zip(inputs, self._dtypes, self.part["inputs"], strict=True):
            if tensor.dtype != dtype or tensor.device.type != self.device.type:
                raise InputError(
                    f"{self.path.stem}: {described['name']} is {tensor.dtype} on {tensor.device}; "
                    f"the artifact takes {dtype} on {self.device}"
                )
        # Compiled code asks the process's settings.
        with full_float32 if inputs[0].dtype == torch.float32 else contextlib.nullcontext():
            return tuple(self._loader.boxed_run([tensor.contiguous() for tensor in inputs]))


def check_versions(path: Path, torch_version: str, part: Part, device: torch.device) -> None:
    """Raises an `InputError` where a package was compiled for another torch or a processor with more instructions."""
    if _release(torch_version) != _release(torch.__version__):
        raise InputError(
            f"{path} was compiled for torch {torch_version}, this is {torch.__version__}; "
            f"export it again, or install torch {_release(torch_version)}"
        )
    machine, level = part.get("machine"), part.get("cpu_level")
    if machine != platform.machine():
        raise InputError(f"{path} was compiled for {machine} processors, this is {platform.machine()}; export it again")
    found = torch.backends.cpu.get_cpu_capability()
    if level in CPU_LEVELS and found in CPU_LEVELS and CPU_LEVELS.index(level) > CPU_LEVELS.index(found):
        raise InputError(
            f"{path} was compiled for processors with {level}, this one has {found}; export it on this machine"
        )


def read_weights(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a weights file; on a CPU they are the mapped file.

    Raises:
        InputError: no such file, not a safetensors file, or a truncated one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt", device=str(device)) as file:
            orders = json.loads((file.metadata() or {}).get(PERMUTED, "{}"))
            weights = {name: file.get_tensor(name) for name in list(file.keys())}
            return {name: value.permute(orders.get(name, [*range(value.dim())])) for name, value in weights.items()}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the artifact is not complete, export or fetch it again") from None
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as weights ({one_line(error)}); export or fetch the artifact again"
        ) from None


def _release(version: str) -> str:
    """ "2.13" of "2.13.0+cpu"."""
    return ".".join(version.partition("+")[0].split(".")[:2])


@contextlib.contextmanager
def _loading(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        folder = temporary_folder()  # into which a package is unpacked
        fault = folder_fault(folder)
        if fault:
            raise InputError(
                f"{path} cannot be loaded by way of the temporary folder {folder}: {fault}; name another one in the "
                "environment's TMPDIR"
            ) from None
        raise InputError(f"{path} cannot be loaded ({one_line(error, 300)}); export it again on this machine") from None
