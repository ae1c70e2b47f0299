"""The autoencoder's fast form against its plain one: `python -m lavin_bench.pipeline.vae_forms`.

Widths and layers of the released weights, random weights, one square picture. All forms compute the same function of
the same weights; where one does not, no times are printed. In 16 bits the fast form in float32 stands beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lavin_bench.pipeline.variants import random_vae
from lavin_bench.programs import at_least, multiple_of, program
from lavin_bench.record import write_record
from lavin_bench.timing import header, header_line, measure, resident_bytes
from lavin_rt.devices import DTYPES, resolve_device
from lavin_rt.pictures.images import check_writable
from lavin_rt.sampling.self_check import relative_error
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.layers import DerivedKernel
from lavin_rt.vae.model import STVAE

TOLERANCE = 1e-5  # relative error of a whole pass in float32
# How a form computes, and whether its input is channels-last: the plain one in both memory layouts, so that the
# comparison does not hang on the layout.
FORMS = {
    "plain": ("plain", False),
    "plain, channels-last": ("plain", True),
    "torch": ("torch", False),
    "triton": ("triton", False),
}
FLOAT32 = "torch, float32"  # beside the others where they compute in 16 bits
DIRECTIONS = ("encode", "decode")
Run = Callable[[], torch.Tensor]


def one_pass(vae: STVAE, form: str, direction: str, size: int) -> Run:
    """A call that encodes or decodes one picture of `size` pixels a side."""
    impl, channels_last = FORMS["torch" if form == FLOAT32 else form]
    shape = (1, 3, 1, size, size) if direction == "encode" else (1, 16, 1, size // 8, size // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(vae.device, vae.dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x

    chosen = vae.in_form(impl)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return chosen.encode(x).mean if direction == "encode" else chosen.decode(x)

    return run


def peak_bytes(vae: STVAE, run: Run) -> tuple[int, int]:
    """Highest memory of a first pass beyond what was held before, and what of it are derived kernels that stay."""
    if vae.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = resident_bytes("VmRSS")
        run()
        peak = resident_bytes("VmHWM") - before
    return peak, sum(module.kept_bytes for module in vae.modules() if isinstance(module, DerivedKernel))


def peak_in_new_process(form: str, direction: str, options: argparse.Namespace) -> list[int]:
    """`peak_bytes` where nothing ran before, so that neither allocator nor derived kernels are warm."""
    command = [sys.executable, "-m", "lavin_bench.pipeline.vae_forms", "--peak", form, direction]
    command += ["--size", str(options.size), "--threads", str(options.threads)]
    command += ["--device", options.device, "--dtype", "float32" if form == FLOAT32 else options.dtype]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def checked_errors(runs: dict[str, Run], truth: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Every form's relative error against the plain form in float32; exits where one is above its limit."""
    errors = {form: relative_error(run().cpu(), truth) for form, run in runs.items()}
    limit = TOLERANCE if dtype == torch.float32 else 2 * errors["plain"]
    wrong = {form: error for form, error in errors.items() if not error <= limit}
    if wrong:
        raise SystemExit(f"no times: relative errors {wrong} are above {limit:.1e}")
    return errors


def compare(direction: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per form."""
    dtype = DTYPES[options.dtype]
    forms = [form for form in FORMS if form != "triton" or options.device != "cpu"]
    vae = random_vae(VAEConfig(), torch.device("cpu"))
    truth = one_pass(vae, "plain", direction, options.size)().double()
    vae = vae.to(options.device)
    in_float32 = copy.deepcopy(vae)
    vae = vae.to(dtype)
    runs = {form: one_pass(vae, form, direction, options.size) for form in forms}
    if dtype != torch.float32:
        runs[FLOAT32] = one_pass(in_float32, FLOAT32, direction, options.size)
    errors = checked_errors(runs, truth, dtype)
    timings = measure(runs, options.repeats, device=options.device)
    rows = []
    for form, timing in timings.items():
        peak, kept = peak_in_new_process(form, direction, options)
        speedup = timings["plain"].median / timing.median
        row = {"direction": direction, "form": form, "seconds": timing.as_dict(), "speedup": speedup}
        rows.append(row | {"relative_error": errors[form], "peak_bytes": peak, "derived_kernel_bytes": kept})
    return rows


@program
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lavin_bench.pipeline.vae_forms", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels, a multiple of 8")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--peak", nargs=2, metavar=("FORM", "DIRECTION"), help="print peak and derived bytes of one pass"
    )
    options = parser.parse_args(arguments)
    at_least(options, repeats=1, threads=1)
    multiple_of(options, 8)
    if options.json:
        check_writable(options.json)
    resolve_device(options.device)
    torch.set_num_threads(options.threads)
    if options.peak:
        form, direction = options.peak
        vae = random_vae(VAEConfig(), torch.device("cpu")).to(options.device, DTYPES[options.dtype])
        print(json.dumps(peak_bytes(vae, one_pass(vae, form, direction, options.size))))
        return
    where = header(options.device)
    print(header_line(where))
    rows = [row for direction in DIRECTIONS for row in compare(direction, options)]
    picture = f"one frame of {options.size}x{options.size} pixels, {options.dtype}"
    print(f"{picture}, median of {options.repeats} (lowest, highest)")
    for row in rows:
        seconds = row["seconds"]
        print(
            f"{row['direction']:8}{row['form']:22}{1e3 * seconds['median']:9.2f} ms "
            f"({1e3 * seconds['low']:.2f}, {1e3 * seconds['high']:.2f})  {row['speedup']:.2f}x"
            f"  error {row['relative_error']:.1e}  peak {row['peak_bytes'] / 2**20:.0f} MiB"
            f" of which derived kernels {row['derived_kernel_bytes'] / 2**20:.0f}"
        )
    if options.json:
        result = {
            "header": where,
            "size": options.size,
            "dtype": options.dtype,
            "repeats": options.repeats,
            "rows": rows,
        }
        write_record(options.json, result)


if __name__ == "__main__":
    sys.exit(main())
