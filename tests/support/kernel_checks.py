"""What the tests of kernels share: where a kernel runs, the error budget, launch counts, poisoned memory, mutants.

A module of kernel tests holds one `test_under_the_interpreter`, which runs the whole module again in a process in which
kernels are interpreted on the CPU; `@kernel_test` marks what tests the kernel itself. Such a test runs in that process,
and in the ordinary one on a CUDA device where there is one. `@compiled_test` marks what the interpreter cannot do.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
import triton
from torch._library.custom_ops import OPDEFS

from lavin_kernels.launch import interpreted

INTERPRETED = interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

_numbers = itertools.count()


def kernel_test(test: Callable) -> Callable:
    """A test of a kernel, on tensors of `DEVICE`."""
    return test if INTERPRETED else pytest.mark.gpu(test)


def compiled_test(test: Callable) -> Callable | None:
    """A test of what the interpreter cannot do: not collected under it."""
    return None if INTERPRETED else test


def run_under_interpreter(path: str, marker: str = "") -> str:
    """Runs a test module, or what `marker` selects of it, in a process in which kernels are interpreted; its output."""
    if int(triton.__version__.split(".")[1]) < 7 and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {triton.__version__} fails on loops with NumPy {numpy.__version__}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker, path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, f"under the interpreter:\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def random(*shape: int, dtype: torch.dtype, seed: int, magnitude: float = 1.0, device: str = DEVICE) -> torch.Tensor:
    """Normal numbers, the same for a seed on every device."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * magnitude).to(device, dtype)


def framed(tensor: torch.Tensor) -> torch.Tensor:
    """The same matrix as strided rows of a larger buffer that is NaN everywhere else."""
    rows, width = tensor.shape
    buffer = tensor.new_full((rows + 2, width + 16), math.nan)
    view = buffer[1:-1, 8:-8]
    view.copy_(tensor)
    return view


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of `dtype` at every float64 value."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs()).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent).clamp_min(info.tiny * info.eps)


def assert_within_budget(
    results: torch.Tensor | Sequence[torch.Tensor],
    references: torch.Tensor | Sequence[torch.Tensor],
    truths: torch.Tensor | Sequence[torch.Tensor],
) -> None:
    """Asserts the error budget: twice the reference's largest error in the row, plus one unit in the last place.

    Args:
        results: of the kernel.
        references: of the reference in the same dtype.
        truths: of the reference in float64 on the same numbers.
    """
    if isinstance(results, torch.Tensor):
        results, references, truths = [results], [references], [truths]
    for index, (result, reference, truth) in enumerate(zip(results, references, truths, strict=True)):
        assert result.dtype == reference.dtype and result.shape == reference.shape == truth.shape
        assert truth.dtype == torch.float64 and truth.isfinite().all()
        if not result.numel():
            continue
        error, reference_error = ((part.double() - truth).abs().flatten(1) for part in (result, reference))
        budget = 2 * reference_error.amax(1, keepdim=True) + ulp(truth, result.dtype).flatten(1)
        # A NaN compares false, so it is over the budget too.
        over = ~(error <= budget)
        worst = (error / budget).nan_to_num(math.inf).max().item()
        assert not over.any(), (
            f"output {index}: {int(over.sum())} of {over.numel()} elements over the error budget, "
            f"the worst {worst:.3g} times, first at row {int(over.any(1).nonzero()[0])}"
        )


@contextlib.contextmanager
def launches() -> Iterator[collections.Counter[str]]:
    """Counts the kernels launched inside the `with` block by their function's name."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    counts: collections.Counter[str] = collections.Counter()

    def counted(launch: Callable) -> Callable:
        def call(self, *args, **kwargs):
            function = self.fn
            counts[function.__name__] += 1
            return launch(self, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted(GridExecutor.__call__))
        patch.setattr(JITFunction, "run", counted(JITFunction.run))
        yield counts


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills memory that torch hands out uninitialised with NaN, so that an element that is not written shows."""
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = previous


def source(module: str) -> str:
    """The text of a module such as `lavin_kernels.swiglu`."""
    return Path(importlib.util.find_spec(module).origin).read_text()


def mutant(module: str, original: str, changed: str, folder: Path) -> ModuleType:
    """A copy of a kernel module with one piece of its text changed and its operators registered under other names.

    Args:
        module: such as `lavin_kernels.swiglu`.
        original: text that occurs once in it.
        changed: what stands there instead.
        folder: where the copy is written.
    """
    text = source(module)
    assert text.count(original) == 1, f"{original!r} occurs {text.count(original)} times in {module}"
    name = f"{module.rpartition('.')[2]}_mutant{next(_numbers)}"
    path = folder / f"{name}.py"
    path.write_text(text.replace(original, changed).replace('@operator("', f'@operator("{name}_'))
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    registered = dict(OPDEFS)
    spec.loader.exec_module(loaded)
    assert all(OPDEFS[operator] is definition for operator, definition in registered.items()), "took another's name"
    return loaded
