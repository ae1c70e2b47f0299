"""`lavin-rt bench tune`: times every kernel's launch candidates on the GPU at hand and writes the device's file.

A candidate whose result is outside the kernel's error budget, or that does not fit the device, is dropped with the
reason. Times are taken at the standard run's shapes, the candidates interleaved.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lavin_bench.cases import Case, cases, settings
from lavin_bench.kernels import check, relative_error
from lavin_bench.timing import header, measure
from lavin_kernels import tuning
from lavin_rt.devices import current_device, resolve_device
from lavin_rt.errors import InputError
from lavin_rt.files import written_whole
from lavin_rt.images import check_writable

# Every tuned kernel: the module that lists its candidates, and the operator whose case times it.
KERNELS = {
    "ada_rms_norm": ("ada_norm", "ada_rms_norm"),
    "gated_residual": ("ada_norm", "gated_residual"),
    "gated_residual_ada_rms_norm": ("ada_norm", "gated_residual_ada_rms_norm"),
    "qk_norm_rope": ("qk_norm_rope", "qk_norm_rope"),
    "swiglu": ("swiglu", "swiglu"),
    "joint_attention": ("joint_attention", "joint_attention"),
    "channel_moments": ("group_norm", "group_norm_silu"),
    "group_norm_silu": ("group_norm", "group_norm_silu"),
    "spatial_norm_silu": ("spatial_norm", "spatial_norm_silu"),
}


def candidates(kernel: str, capability: int) -> list[dict[str, int | str]]:
    """The launch configurations that a kernel's module lists as worth timing, and that the capability can run."""
    module = importlib.import_module(f"lavin_kernels.{KERNELS[kernel][0]}")
    listed = module.CANDIDATES[kernel] if isinstance(module.CANDIDATES, Mapping) else module.CANDIDATES
    fits = getattr(module, "fits", None)
    return [candidate for candidate in listed if fits is None or fits(candidate, capability)]


def overridden(kernel: str, candidate: Mapping[str, int | str], call: Callable[[], Any]) -> Callable[[], Any]:
    """A call with one kernel launched as the candidate says."""

    def run() -> Any:
        with tuning.override(kernel, **candidate):
            return call()

    return run


def tune(kernel: str, case: Case, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Times a kernel's candidates and today's configuration in one case; returns times, what was dropped, the best."""
    today = dict(tuning.config(kernel, device, dtype))
    today_name = _named(today)
    ours = case.variants["ours"]
    kept: dict[str, Callable[[], Any]] = {}
    configs: dict[str, dict[str, int | str]] = {}
    dropped: dict[str, str] = {}
    truth = case.truth()
    allowed = 2 * check(dataclasses.replace(case, variants={"eager": case.variants["eager"]}), dtype)["eager"]
    for candidate in [today, *(c for c in candidates(kernel, tuning.capability(device)) if c != today)]:
        name = _named(candidate)
        run = overridden(kernel, candidate, ours.call)
        try:
            error = relative_error(ours.compared(run()), truth)
            torch.cuda.synchronize(device)
        except Exception as failure:  # Triton raises its own errors for what does not fit a device.
            dropped[name] = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
            continue
        if not error <= allowed + torch.finfo(dtype).eps:
            dropped[name] = f"wrong result, error {error:.1e}"
            continue
        kept[name], configs[name] = run, candidate
    if today_name not in kept:
        raise RuntimeError(f"{kernel}: today's configuration fails on this device: {dropped[today_name]}")
    small = device.type == "cuda" and not case.flops
    timings = measure(kept, repeats, warmup=2, device=device, graph=small)
    best = min(timings, key=lambda name: timings[name].median)
    times = {name: timing.as_dict() for name, timing in timings.items()}
    return {"case": case.name, "today": today_name, "best": configs[best], "times": times, "dropped": dropped}


def _named(candidate: Mapping[str, int | str]) -> str:
    return " ".join(f"{key}={value}" for key, value in candidate.items())


def bench_tune(options: argparse.Namespace) -> None:
    """Runs the command."""
    device = resolve_device(options.device)
    if device.type != "cuda":
        raise InputError("tuning needs a CUDA device, this machine has none; the defaults of lavin_kernels serve it")
    if not any(options.operator in operator for _, operator in KERNELS.values()):
        raise InputError(
            f"no tuned operator has {options.operator!r} in its name; expected one of "
            + ", ".join(dict.fromkeys(operator for _, operator in KERNELS.values()))
        )
    path = Path(options.output) if options.output else tuning.config_file(torch.cuda.get_device_name(device))
    check_writable(path)
    try:
        tuned = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); repair it or take it away") from None
    standard, dtype = settings(device)[0], torch.bfloat16
    record: dict[str, Any] = {"kind": "tuning", "header": header(device), "kernels": {}}
    with torch.no_grad(), current_device(device):
        for kernel, (_, operator) in KERNELS.items():
            if options.operator not in operator:
                continue
            case = next(case for case in cases(standard, device, dtype) if case.operator == operator)
            found = tune(kernel, case, device, dtype, options.repeats)
            record["kernels"][kernel] = found
            tuned.setdefault(kernel, {})["bfloat16"] = found["best"]
            before, after = (
                found["times"][name]["median"]
                for name in (found["today"], min(found["times"], key=lambda n: found["times"][n]["median"]))
            )
            print(f"{kernel}: {before * 1e6:.1f} -> {after * 1e6:.1f} us with {found['best']}", flush=True)
            # After every kernel, so that a failure in a later one loses nothing.
            for target, content in ((path, tuned), *([(Path(options.json), record)] if options.json else [])):
                with written_whole(target) as partial:
                    partial.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path}")
