"""The packed sampling step against the plain two-pass loop: `python -m lavin_bench.sampling_forms`.

Hidden 576, depth 6, 8 heads, kv_group 4, 128 px, 4 pairs, 20 knots, guidance 1.5, random weights, float32. Each form
runs whole samplings, from condition latents to target latents, eagerly and through `torch.compile`; one whose latents
differ from the plain loop's gets no time.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lavin_bench.timing import header, header_line, measure
from lavin_rt.config import DiTConfig
from lavin_rt.knots import schedule
from lavin_rt.layout import Layout, Shape
from lavin_rt.model import JDiT, randomize_
from lavin_rt.modulation import modulation_table
from lavin_rt.packed import PackedStep
from lavin_rt.sampler import euler, packed_denoiser, plain_denoiser

TOLERANCE = 1e-4  # relative error of a whole sampling, float32
CONFIG = DiTConfig(hidden_size=576, depth=6, num_heads=8, kv_group=4)
STEPS, GUIDANCE, PAIRS, LATENT = 20, 1.5, 4, 16
FORMS = ("plain", "packed", "plain, compiled", "packed, compiled")


def sampling(form: str) -> Callable[[], torch.Tensor]:
    """A call that samples once; what is compiled is compiled in the first."""
    dit = randomize_(JDiT(CONFIG)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(1, 16, 2 * PAIRS + 1, LATENT, LATENT, generator=generator)
    noise = torch.randn(1, 16, 1, LATENT, LATENT, generator=generator)
    knots = schedule(STEPS)
    kind, _, compiled = form.partition(", ")
    if kind == "plain":
        denoise = plain_denoiser(dit, cond, knots, GUIDANCE, compile=bool(compiled))

        def run() -> torch.Tensor:
            return euler(denoise, noise, knots)

    else:
        shape = Shape(1, cond.shape[2], 1, 1, LATENT, LATENT, guided=True)
        step = PackedStep(dit, Layout.make(CONFIG, shape), "torch")
        network = step.compiled() if compiled else step

        def run() -> torch.Tensor:
            # Table and condition are made anew in every sampling: the plain loop gets nothing for free either.
            table = modulation_table(dit, knots[:-1])
            return euler(packed_denoiser(network, step, step.embed_condition(cond), table, GUIDANCE), noise, knots)

    def without_gradients() -> torch.Tensor:
        with torch.no_grad():
            return run()

    return without_gradients


def peak_bytes(form: str) -> int:
    """Highest resident memory of a process that samples twice, beyond what it held after its imports."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    run = sampling(form)
    run()
    run()
    # Not ru_maxrss, which in a child process starts at its parent's.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    return peak - resident_pages * resource.getpagesize()


def peak_in_new_process(form: str, threads: int) -> int:
    command = [sys.executable, "-m", "lavin_bench.sampling_forms", "--peak", form, "--threads", str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(repeats: int, threads: int) -> list[dict[str, Any]]:
    """One row per form; raises `SystemExit` where a result is wrong."""
    runs = {form: sampling(form) for form in FORMS}
    truth = runs["plain"]().double()
    errors = {form: float((run().double() - truth).norm() / truth.norm()) for form, run in runs.items()}
    wrong = {form: error for form, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise SystemExit(f"no times, the latents differ from the plain loop's by {wrong} (limit {TOLERANCE})")
    timings = measure(runs, repeats)
    return [
        {
            "form": form,
            "seconds": timing.as_dict(),
            "relative_error": errors[form],
            "peak_bytes": peak_in_new_process(form, threads),
        }
        for form, timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="lavin_bench.sampling_forms", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--peak", metavar="FORM", help="print one form's peak memory in bytes only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak_bytes(arguments.peak))
        return
    where = header()
    print(header_line(where))
    rows = compare(arguments.repeats, arguments.threads)
    medians = {row["form"]: row["seconds"]["median"] for row in rows}
    print(f"one sampling of {STEPS - 1} evaluations, float32, median of {arguments.repeats} (lowest - highest)")
    for row in rows:
        seconds = row["seconds"]
        print(
            f"{row['form']:18}{seconds['median']:7.3f} s ({seconds['low']:.3f} - {seconds['high']:.3f})"
            f"  error {row['relative_error']:.1e}  peak {row['peak_bytes'] / 2**20:5.0f} MiB"
        )
    for form, base in (
        ("packed", "plain"),
        ("packed, compiled", "plain"),
        ("packed, compiled", "plain, compiled"),
    ):
        print(f"{form} is {medians[base] / medians[form]:.2f}x as fast as {base}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"header": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
