"""Triton's interpreter with the float32 arithmetic of a GPU's compiled code, which errs otherwise than NumPy's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _fused(a: numpy.ndarray, b: numpy.ndarray, c: numpy.ndarray) -> numpy.ndarray:
    """`a * b + c` in float32, rounded once."""
    return (a.astype(numpy.float64) * b + c).astype(numpy.float32)


@contextlib.contextmanager
def as_compiled() -> Iterator[None]:
    """Inside the `with` block a float32 product that is added to or subtracted from is one multiply-add with that, and
    every element of a matrix product is one chain of them.
    """
    add, multiply, subtract = (getattr(InterpreterBuilder, f"create_f{name}") for name in ("add", "mul", "sub"))

    def product(self, a, b):
        result = multiply(self, a, b)
        if result.data.dtype == numpy.float32:
            result.factors = a.data, b.data
        return result

    def total(self, a, b):
        for one, other in ((a, b), (b, a)):
            if hasattr(one, "factors"):
                return TensorHandle(_fused(*one.factors, other.data), a.dtype.scalar)
        return add(self, a, b)

    def difference(self, a, b):
        if hasattr(a, "factors"):
            return TensorHandle(_fused(*a.factors, -b.data), a.dtype.scalar)
        if hasattr(b, "factors"):
            return TensorHandle(_fused(-b.factors[0], b.factors[1], a.data), a.dtype.scalar)
        return subtract(self, a, b)

    def dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        result = acc.data
        for column in range(a.data.shape[1]):
            result = _fused(a.data[:, column : column + 1], b.data[column : column + 1], result)
        return TensorHandle(result, acc.dtype.scalar)

    def multiply_add(self, a, b, c):
        return TensorHandle(_fused(a.data, b.data, c.data), c.dtype.scalar)

    replaced = {"fadd": total, "fmul": product, "fsub": difference, "dot": dot, "fma": multiply_add}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in replaced.items():
            patch.setattr(InterpreterBuilder, f"create_{name}", function)
        yield
