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
from lavin_bench.cases import Setting, settings
from lavin_bench.ceilings import ceilings
from lavin_bench.timing import Timing, header, measure
from lavin_kernels import Branches
from lavin_rt.config import DiTConfig
from lavin_rt.knots import schedule
from lavin_rt.model import JDiT
from lavin_rt.modulation import ModulationTable
from lavin_rt.packed import PackedStep
from lavin_rt.sampler import euler, packed_denoiser

# What a part may take, so that all of them together end within nine minutes; 60 where nothing is said.
SECONDS = {"tests": 210, "kernels": 150}


def gpu_tests(folder: Path) -> dict[str, Any]:
    """Runs `pytest -m gpu` into a log; exit code 124 where the time did not suffice."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={folder / 'gpu-tests.xml'}"]
    log = folder / "gpu-tests.log"
    with log.open("w") as out:
        try:
            # Ends before its part does, so that no test is left behind on the device.
            limit = SECONDS["tests"] - 20
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 124
    return {"kind": "tests", "exit_code": code, "last_line": log.read_text().strip().splitlines()[-1:]}


@torch.no_grad()
def random_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> JDiT:
    """A model with random weights, without modulation linears, made on the device."""
    with torch.device("meta"):
        dit = JDiT(config)
    for block in dit.blocks:
        block.modulation.drop()
    dit = dit.to_empty(device=device).to(dtype).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in dit.named_parameters():
        norm = name.endswith(("_norm", "embedder.1.weight"))
        std = 0.1 if norm or parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.normal_(float(norm), std, generator=generator)
    return dit


def standard_run(
    device: torch.device, setting: Setting, dtype: torch.dtype, impls: tuple[str, ...], repeats: int = 5
) -> dict[str, Any]:
    """One sampling from an encoded context to final latents by each implementation of the packed step."""
    config, layout, knots = setting.config, setting.layout(device), schedule(20)
    dit = random_dit(config, device, dtype)
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    latent = setting.size // 8
    table = ModulationTable(
        random(19, config.depth, 2, 4, config.hidden_size) * 0.1, random(19, config.hidden_size) * 0.1
    )
    cond, noise = random(1, 16, 2 * setting.pairs + 1, latent, latent), random(1, 16, 1, latent, latent)
    results, calls, peaks = {}, {}, {}
    for impl in impls:
        step = PackedStep(dit, layout, impl)
        denoise = packed_denoiser(step, step, step.embed_condition(cond), table, 1.5)
        calls[impl] = lambda denoise=denoise: euler(denoise, noise, knots)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        results[impl] = calls[impl]()
        peaks[impl] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    truth = results[impls[-1]]
    timings: dict[str, Timing] = measure(calls, repeats, warmup=1, device=device)
    flops = 19 * useful_flops(dit, layout.branches)
    return {
        "kind": "sampling",
        "header": header(device),
        "setting": setting.name,
        "useful_flops": flops,
        "seconds": {impl: timing.as_dict() for impl, timing in timings.items()},
        "useful_flops_per_second": {impl: flops / timing.median for impl, timing in timings.items()},
        f"difference_from_{impls[-1]}": {
            impl: float((latents - truth).norm() / truth.norm()) for impl, latents in results.items()
        },
        "peak_bytes_allocated": peaks,
    }


def useful_flops(dit: JDiT, branches: Branches) -> int:
    """Of one step of the unpruned model with unpadded heads: its linears and its attention."""
    config = dit.config
    lens = [cond + x for cond, x in zip(branches.cond_lens, branches.x_lens, strict=True)]
    linear = sum(p.numel() for name, p in dit.blocks.named_parameters() if not name.endswith("_norm")) // 2
    return 2 * linear * branches.rows + config.depth * sum(4 * rows * rows * config.hidden_size for rows in lens)


def parts(device: torch.device, folder: Path, full: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to do, by the name of its file."""
    dtype = torch.bfloat16
    return {
        "tests": lambda: gpu_tests(folder),
        "ceilings": lambda: {"kind": "ceilings", "header": header(device), **ceilings(device, dtype)},
        "kernels": lambda: kernels.run(settings(device, full), device, dtype),
        **{
            f"sampling-{setting.size}": lambda s=setting: standard_run(device, s, dtype, ("triton", "torch"))
            for setting in settings(device)
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="lavin_bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--full", action="store_true", help="all sizes and pairs; takes longer")
    parser.add_argument("--part", help="run this part alone, in this process")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("lavin-rt: error: no CUDA device on this machine; gpu-check measures a GPU", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    todo = parts(torch.device("cuda"), options.output, options.full)
    if options.part:
        return run_part(options.part, todo[options.part], options.output)
    failed = []
    for name in todo:
        # Each in a process of its own: an illegal address ends a process's use of the device, and a kernel may hang.
        command = [sys.executable, "-m", "lavin_bench.gpu_check", "--output", str(options.output), "--part", name]
        limit = None if options.full else SECONDS.get(name, 60)
        try:
            done = subprocess.run([*command, *(["--full"] if options.full else [])], timeout=limit)
            failed += [name] if done.returncode else []
        except subprocess.TimeoutExpired:
            print(f"{name}: FAILED, not done after {limit} s", flush=True)
            failed.append(name)
    return 1 if failed else 0


@torch.no_grad()
def run_part(name: str, part: Callable[[], dict[str, Any]], folder: Path) -> int:
    """Runs one part and writes its file; returns 1 where it failed."""
    began = time.perf_counter()
    try:
        record = part()
    except Exception:  # whatever it was, it is written down and fails the whole
        record = {"kind": "failure", "failures": [traceback.format_exc()]}
    failed = bool(record.get("failures") or record.get("exit_code"))
    record["part_seconds"] = time.perf_counter() - began
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}: {'FAILED' if failed else 'done'} in {record['part_seconds']:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
