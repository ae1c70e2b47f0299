"""`lavin-rt bench kernels`: every operator at the model's real shapes, correct first, then timed.

Each variant's result is held against a float32 or float64 truth before anything is timed. One that errs more than twice
as much as eager PyTorch in the same dtype, plus one unit in the last place, gets no time and fails the run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lavin_bench.ceilings import ceilings
from lavin_bench.kernels.cases import OPERATORS, Case, ShapeSetting, Tensors, cases, settings
from lavin_bench.record import write_record
from lavin_bench.timing import Timing, header, header_line, measure
from lavin_rt.devices import current_device, resolve_device, resolve_dtype
from lavin_rt.errors import InputError
from lavin_rt.pictures.images import check_writable
from lavin_rt.sampling.self_check import relative_error


class WrongResult(RuntimeError):
    """A variant computed something else than the operator."""


def largest_error(results: Tensors, truth: Tensors) -> float:
    """The largest `||result - truth|| / ||truth||` of several results, in float64."""
    if len(results) != len(truth):
        raise WrongResult(f"{len(results)} results; expected {len(truth)}")
    errors = [relative_error(*pair) for pair in zip(results, truth, strict=True)]
    # A NaN would lose every comparison.
    return max(float("inf") if error != error else error for error in errors)


def check(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Errors of all variants of a case.

    Raises:
        WrongResult: a variant is outside the error budget.
    """
    truth = case.truth()
    errors = {name: largest_error(v.compared(v.call()), truth) for name, v in case.variants.items()}
    allowed = 2 * errors["eager"] + torch.finfo(dtype).eps
    # Eager PyTorch sets the budget, so it is itself held to a bound that any honest arithmetic keeps.
    bounds = {name: 0.05 if name == "eager" else allowed for name in errors}
    wrong = {name: error for name, error in errors.items() if not error <= bounds[name]}
    if wrong:
        found = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        raise WrongResult(f"{case.name}: no times, wrong results: {found}; allowed {allowed:.1e}")
    return errors


def row(case: Case, name: str, error: float, timing: Timing, top: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One variant's figures: useful FLOP/s where the operator is matrix work, else bytes per second, and their share
    of the ceiling measured in the same run."""
    if case.flops:
        rate, ceiling, unit = case.flops / timing.median, top["matmul"]["flops_per_second"], "FLOP/s"
    else:
        rate, ceiling, unit = case.bytes / timing.median, top["copy"]["bytes_per_second"], "B/s"
    return {
        "operator": case.operator,
        "setting": case.setting,
        "variant": name,
        "seconds": timing.as_dict(),
        "bytes": case.bytes,
        "flops": case.flops,
        "rate": rate,
        "unit": unit,
        "share_of_ceiling": rate / ceiling,
        "relative_error": error,
    }


def run(
    chosen: Iterable[ShapeSetting],
    device: torch.device,
    dtype: torch.dtype,
    operators: str = "",
    repeats: int = 15,
    show: bool = True,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Checks and times all cases whose operator contains `operators`; returns the record that `report` reads.

    A case with a wrong result, or one that does not run, is not timed: it is listed in the record's `failures`. `save`
    gets the record after every case.

    Raises:
        InputError: no operator's name contains `operators`.
    """
    if not any(operators in operator for operator in OPERATORS):
        raise InputError(f"no operator has {operators!r} in its name; expected one of {', '.join(OPERATORS)}")
    top = ceilings(device, dtype)
    record: dict[str, Any] = {
        "kind": "kernels",
        "header": {**header(device), "dtype": str(dtype).removeprefix("torch."), "repeats": repeats},
        "ceilings": top,
        "rows": [],
        "skipped": [],
        "failures": [],
    }
    if show:
        print(header_line(record["header"]))
        print(f"copy {_si(top['copy']['bytes_per_second'])}B/s, matmul {_si(top['matmul']['flops_per_second'])}FLOP/s")
    for setting in chosen:
        for case in cases(setting, device, dtype):
            if operators not in case.operator:
                continue
            try:
                errors = check(case, dtype)
                timings = timed(case, repeats, device)
            except Exception as error:  # Triton's errors have no common base
                record["failures"].append(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                print(f"FAILED {record['failures'][-1]}", flush=True)
                save(record)
                continue
            rows = [row(case, name, errors[name], timing, top) for name, timing in timings.items()]
            skipped = [
                {"operator": case.operator, "setting": case.setting, "variant": name, "reason": reason}
                for name, reason in case.skipped.items()
            ]
            record["rows"] += rows
            record["skipped"] += skipped
            save(record)
            if show:
                _show(case, rows, skipped)
    return record


def timed(case: Case, repeats: int, device: torch.device) -> dict[str, Timing]:
    """Times of a case's variants; on CUDA as graphs, since a launch from Python takes longer than a small kernel."""
    calls = {name: variant.call for name, variant in case.variants.items()}
    return measure(calls, repeats, warmup=3, device=device, graph=device.type == "cuda")


def _show(case: Case, rows: list[dict[str, Any]], skipped: list[dict[str, str]]) -> None:
    print(case.name)
    for figures in rows:
        seconds = figures["seconds"]
        print(
            f"  {figures['variant']:10}{seconds['median'] * 1e6:10.1f} us"
            f" ({seconds['low'] * 1e6:.1f} - {seconds['high'] * 1e6:.1f})"
            f"  {_si(figures['rate'])}{figures['unit']}  {figures['share_of_ceiling']:6.1%} of the ceiling"
            f"  error {figures['relative_error']:.1e}"
        )
    for reason in skipped:
        print(f"  {reason['variant']:10}skipped: {reason['reason']}")


def _si(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def bench_kernels(options: argparse.Namespace) -> None:
    """Runs the command; a wrong result or a violation raises `RuntimeError` when all the rest is done."""
    if options.json:
        check_writable(options.json)
    if options.static:
        from lavin_kernels import static

        if static.main(["--json", options.json] if options.json else []):
            raise RuntimeError("the static check found violations, named above")
        return
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    if options.repeats < 1:
        raise InputError(f"--repeats is {options.repeats}; expected at least 1")
    with torch.no_grad(), current_device(device):
        record = run(settings(device, options.full), device, dtype, options.operator, options.repeats)
    if options.json:
        write_record(options.json, record)
    if record["failures"]:
        raise WrongResult(f"{len(record['failures'])} cases got no time: {record['failures'][0]}")
