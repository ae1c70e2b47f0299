"""Everything that one GPU visit should bring: `make gpu-check DIR=results` runs this in under nine minutes.

The GPU tests, the ceilings, the kernels and one sampling at the standard run and at 256 px with 4 pairs. Each part
writes its own JSON file into the folder, so that a part that fails takes nothing with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lavin_bench import kernels
from lavin_bench.cases import RELEASED, Setting, settings
from lavin_bench.ceilings import ceilings
from lavin_bench.timing import Timing, header, measure
from lavin_rt.knots import schedule
from lavin_rt.model import JDiT
from lavin_rt.modulation import ModulationTable
from lavin_rt.packed import PackedStep
from lavin_rt.sampler import euler, packed_denoiser


def gpu_tests(folder: Path) -> dict[str, Any]:
    """Runs `pytest -m gpu` and keeps its report."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={folder / 'gpu-tests.xml'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / "gpu-tests.log").write_text(done.stdout + done.stderr)
    return {"kind": "tests", "exit_code": done.returncode, "last_line": done.stdout.strip().splitlines()[-1:]}


@torch.no_grad()
def random_dit(device: torch.device, dtype: torch.dtype) -> JDiT:
    """The released shapes with random weights, without modulation linears, made on the device."""
    with torch.device("meta"):
        dit = JDiT(RELEASED)
    for block in dit.blocks:
        block.modulation.drop()
    dit = dit.to_empty(device=device).to(dtype).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in dit.named_parameters():
        norm = name.endswith(("_norm", "embedder.1.weight"))
        std = 0.1 if norm or parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.normal_(float(norm), std, generator=generator)
    return dit


def standard_run(device: torch.device, setting: Setting, repeats: int = 5) -> dict[str, Any]:
    """One sampling from an encoded context to final latents, packed step, kernels against plain operators."""
    dtype = torch.bfloat16
    dit, layout, knots = random_dit(device, dtype), setting.layout(device), schedule(20)
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    latent = setting.size // 8
    table = ModulationTable(
        random(19, RELEASED.depth, 2, 4, RELEASED.hidden_size) * 0.1, random(19, RELEASED.hidden_size) * 0.1
    )
    cond, noise = random(1, 16, 2 * setting.pairs + 1, latent, latent), random(1, 16, 1, latent, latent)
    results, calls = {}, {}
    for impl in ("triton", "torch"):
        step = PackedStep(dit, layout, impl)
        denoise = packed_denoiser(step, step.embed_condition(cond), table, 1.5)
        calls[impl] = lambda denoise=denoise: euler(denoise, noise, knots)
        results[impl] = calls[impl]()
    difference = float((results["triton"] - results["torch"]).norm() / results["torch"].norm())
    torch.cuda.reset_peak_memory_stats(device)
    timings: dict[str, Timing] = measure(calls, repeats, warmup=1, device=device)
    branches = layout.branches
    lens = [cond + x for cond, x in zip(branches.cond_lens, branches.x_lens, strict=True)]
    linear = sum(p.numel() for name, p in dit.blocks.named_parameters() if not name.endswith("_norm")) // 2
    flops = 19 * (
        2 * linear * branches.rows + RELEASED.depth * sum(4 * rows * rows * RELEASED.hidden_size for rows in lens)
    )
    return {
        "kind": "sampling",
        "header": header(device),
        "setting": setting.name,
        "useful_flops": flops,
        "seconds": {impl: timing.as_dict() for impl, timing in timings.items()},
        "useful_flops_per_second": {impl: flops / timing.median for impl, timing in timings.items()},
        "difference_of_latents": difference,
        "peak_bytes_reserved": torch.cuda.max_memory_reserved(device),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="lavin_bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--full", action="store_true", help="all sizes and pairs; takes longer")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("lavin-rt: error: no CUDA device on this machine; gpu-check measures a GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = settings(device, options.full)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": lambda: gpu_tests(options.output),
        "ceilings": lambda: {"kind": "ceilings", "header": header(device), **ceilings(device, torch.bfloat16)},
        "kernels": lambda: kernels.run(chosen, device, torch.bfloat16),
        **{f"sampling-{s.size}": lambda s=s: standard_run(device, s) for s in settings(device)},
    }
    failed = []
    for name, part in parts.items():
        began = time.perf_counter()
        try:
            with torch.no_grad():
                record = part()
        except Exception:
            # One part's failure must not take the others' figures with it; it is reported and fails the whole.
            record = {"kind": "failure", "traceback": traceback.format_exc()}
        if record["kind"] == "failure" or record.get("exit_code", 0) != 0:
            failed.append(name)
        record["part_seconds"] = time.perf_counter() - began
        (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {'FAILED' if name in failed else 'done'} in {record['part_seconds']:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
