"""A strict stand-in for Triton's driver: specialises and compiles for a GPU that is not there, and checks every launch.

What is real is all of Triton but its last step: arguments' types are looked at, kernels compiled to machine code for
the capability, descriptors made. What a GPU would refuse is an `AssertionError` here; nothing runs, and results are
what memory held. Run as a program it launches an operator at the model's widths in its candidates:

    python -m support.triton_driver CAPABILITY all|some|default [KERNEL ...]
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
import types

import torch
import triton
from triton.backends.compiler import GPUTarget

from lavin_kernels import launch, tuning
from lavin_kernels.static import MODULES, SHARED_KIB
from lavin_kernels.table import KERNELS

SWIZZLED = {1: 32, 2: 64, 3: 128}  # widest row of a bulk copy, in bytes


class Utils:
    """What Triton asks a driver library for."""

    def __init__(self, capability):
        self.shared = SHARED_KIB[capability] * 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": self.shared, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name, kernel, shared, device):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel)
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", output[output.index("Function ") :])}
        registers = -(-usage["REG"] // 8) * 8
        return object(), object(), usage["REG"], usage["STACK"], min(1024, 65536 // max(registers, 1) // 32 * 32)


def check_descriptor(descriptor, meta):
    """The driver's rules for a tensor map, and that it stays within its tensor's storage."""
    base = descriptor.base
    size, block = base.element_size(), meta["block_size"]
    assert base.data_ptr() % 16 == 0
    assert all(stride > 0 and stride * size % 16 == 0 and stride * size < 2**40 for stride in descriptor.strides[:-1])
    assert all(1 <= extent <= 256 for extent in block), block
    assert block[-1] * size % 16 == 0 and block[-1] * size <= SWIZZLED.get(meta["swizzle"], 16 * 256), (block, meta)
    assert all(0 < extent <= 2**32 for extent in descriptor.shape), descriptor.shape
    last = sum((extent - 1) * stride for extent, stride in zip(descriptor.shape, descriptor.strides, strict=True))
    assert (last + 1 + base.storage_offset()) * size <= base.untyped_storage().nbytes(), "beyond the storage"


class Launcher:
    """Takes the place of a compiled launcher and looks at what it is given."""

    launches = 0

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        assert 0 < x < 2**31 and 0 < y <= 65535 and 0 < z <= 65535, (x, y, z)
        assert self.metadata.num_warps * 32 <= 1024 and not self.metadata.global_scratch_size
        metas = iter(getattr(self.metadata, "tensordesc_meta", None) or [])
        for (name, kind), argument in zip(self.source.signature.items(), arguments, strict=True):
            if kind.startswith("tensordesc"):
                check_descriptor(argument, next(metas))
            elif kind.startswith("*"):
                assert isinstance(argument, torch.Tensor), (name, kind, argument)
            elif kind in ("i32", "i64"):
                bits = int(kind[1:]) - 1
                assert isinstance(argument, int) and -(2**bits) <= argument < 2**bits, (name, kind, argument)
            else:
                assert kind == "constexpr" or (kind == "fp32" and isinstance(argument, float)), (name, kind, argument)
        assert next(metas, None) is None
        Launcher.launches += 1


def install(capability: int) -> None:
    """Makes this process one on a GPU of that capability, for tensors of the CPU."""
    driver = types.SimpleNamespace(
        utils=Utils(capability),
        launcher_cls=Launcher,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_device_capability=lambda device=None: divmod(capability, 10),
        get_current_device=lambda: 0,
        set_current_device=lambda device: None,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
        map_python_to_cpp_type=str,
        get_device_interface=lambda: torch.cuda,
    )
    triton.runtime.driver.set_active(driver)
    tuning.CPU_CAPABILITY = capability
    for name in (*(f"ops.{name}" for name in MODULES), "validate"):
        module = importlib.import_module(f"lavin_kernels.{name}")
        if hasattr(module, "runs_kernel"):
            module.runs_kernel = lambda device: True
    launch.runs_kernel = lambda device: True


def main(capability: int, kernels: list[str], forms: str) -> None:
    import lavin_kernels
    from lavin_bench.kernels import cases, tune

    def ours(operator, arguments, device):
        return {"ours": cases.OperatorVariant(lambda: getattr(lavin_kernels, operator)(*arguments))}, {}

    cpu, cases.variants = torch.device("cpu"), ours
    setting = cases.ShapeSetting(128, 4)  # branches of 640 and 192 rows
    prepared = list(cases.cases(setting, cpu, torch.bfloat16))
    install(capability)
    for kernel in kernels or tune.KERNELS:
        call = next(case for case in prepared if case.operator == KERNELS[kernel]).variants["ours"].call
        listed = tune.candidates(kernel, capability)
        some = [c for c in listed if c.get("num_stages", 2) == 2][::3] + listed[-1:]
        before, refused, tried = Launcher.launches, 0, {"all": listed, "some": some, "default": []}[forms]
        for candidate in [dict(tuning.config(kernel, cpu, torch.bfloat16)), *tried]:
            try:
                with torch.no_grad(), tuning.override(kernel, **candidate):
                    call()
            except triton.runtime.errors.OutOfResources:
                assert candidate in tried, f"{kernel}: the default does not fit"
                refused += 1  # which the tuner drops too
        assert Launcher.launches > before + len(tried) - refused, "nothing was launched"
        print(f"{kernel} sm_{capability}: {len(tried) + 1} forms launched, {refused} of them do not fit", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[3:], sys.argv[2])
