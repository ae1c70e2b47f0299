"""AOTInductor on the CPU, from Python and from the native runner, against the best of PyTorch:
`python -m lavin_bench.native`.

Hidden 576, depth 6, 8 heads, kv_group 4 with a small VAE, 128 px, 4 pairs, 20 knots, guidance 1.5, random weights,
float32. Three forms sample from the same condition and noise, in turn; one whose latents differ gets no time. Then
whole processes, from their start to the picture on disk, in turn as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lavin_bench.pipeline.variants import CPU_CONFIG, CPU_VAE
from lavin_bench.record import write_record
from lavin_bench.timing import header, header_line, in_turn
from lavin_rt.checkpoint.load import load_dit, save_dit, save_vae
from lavin_rt.dit.layout import Shape
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.pictures.images import load_clip, save_picture
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.denoisers import make_network
from lavin_rt.sampling.executor import Executor
from lavin_rt.sampling.schedule import schedule
from lavin_rt.sampling.self_check import relative_error
from lavin_rt.task import Task
from lavin_rt.vae.model import STVAE

TOLERANCE = 1e-4  # relative error of a whole sampling, float32
STEPS, GUIDANCE, PAIRS, SIZE = 20, 1.5, 4, 128
FORMS = ("packed, compiled", "AOTI, Python", "AOTI, native")


def prepare(folder: Path, threads: int) -> dict[str, Path]:
    """Checkpoint, pictures, artifact and program in a folder; what is there already is taken."""
    places = {
        "checkpoint": folder / "checkpoint",
        "artifact": folder / "artifact",
        "task": folder / "task",
        "query": folder / "query.png",
        "context": folder / "context.safetensors",
        "noise": folder / "noise.safetensors",
        "program": folder / "build" / "lavin-native",
    }
    if not places["checkpoint"].exists():
        places["checkpoint"].mkdir(parents=True)
        save_dit(randomize_(JDiT(CPU_CONFIG)), places["checkpoint"] / "lavin_dit.safetensors")
        torch.manual_seed(0)
        save_vae(STVAE(CPU_VAE), places["checkpoint"] / "stvae.safetensors")
    if not places["query"].exists():
        places["task"].mkdir()
        generator = torch.Generator().manual_seed(0)
        names = [places["task"] / f"{pair}_{role}.png" for pair in range(PAIRS) for role in ("input", "target")]
        for name in [*names, places["query"]]:
            save_picture(torch.randint(256, (3, SIZE, SIZE), generator=generator).to(torch.uint8), name)
    if not places["artifact"].exists():
        from lavin_export.to_aoti import export_aoti
        from lavin_rt.find.model import find_checkpoint

        export_aoti(find_checkpoint(places["checkpoint"]), places["artifact"], device="cpu", dtype="float32")
    if not places["program"].exists():
        build, source = places["program"].parent, Path(__file__).resolve().parents[2]
        prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
        subprocess.run(["cmake", "-S", source, "-B", build, prefix], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cmake", "--build", build, f"-j{threads}"], check=True, stdout=subprocess.DEVNULL)
    return places


def condition(places: dict[str, Path]) -> tuple[Pipeline, torch.Tensor, torch.Tensor]:
    """The artifact's pipeline, the condition's latents `[1, 16, 2 * PAIRS + 1, h, w]`, the noise; context and noise are
    also written for the native runner.
    """
    from safetensors.torch import save_file

    pipe = Pipeline.from_pretrained(places["artifact"], device="cpu")
    task: Task = pipe.task(places["task"], pairs=PAIRS, size=SIZE)
    task.context.save(places["context"])
    noise = torch.randn(1, 16, 1, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0))
    save_file({"noise": noise}, places["noise"])
    clip = load_clip(places["query"]).float().div(127.5).sub(1)  # [1, 3, H, W]
    query = pipe.encode([clip.transpose(0, 1)[None]])[0]
    return pipe, torch.cat([task.context.latents, query], dim=2), noise


def forms(places: dict[str, Path], threads: int) -> dict[str, Callable[[], tuple[float, torch.Tensor]]]:
    """For every form a call that samples once and returns its seconds and the latents."""
    pipe, cond, noise = condition(places)
    shape = Shape(1, cond.shape[2], 1, 1, noise.shape[3], noise.shape[4], guided=True)
    knots = schedule(STEPS)
    dit = load_dit(places["checkpoint"] / "lavin_dit.safetensors", dtype=torch.float32)

    def of_network(network) -> Callable[[], tuple[float, torch.Tensor]]:
        executor = Executor(network)

        def run() -> tuple[float, torch.Tensor]:
            began = time.perf_counter()
            with torch.no_grad():
                frames = executor.embed(cond)
                rows = frames.shape[1] // shape.cond_frames
                latents = executor.sample(shape, frames[:, :-rows], frames[:, -rows:], noise, knots, GUIDANCE)
            return time.perf_counter() - began, latents

        return run

    def native() -> tuple[float, torch.Tensor]:
        from safetensors.torch import load_file

        latents = places["program"].parent / "latents.safetensors"
        # Every process answers twice: what the first answer alone does (pages of the weights, threads) is start-up.
        answer = run_process(
            [*native_command(places), "--noise", places["noise"], "--save-latents", latents, "--time", "--repeat", 2],
            threads,
        )
        return json.loads(answer)["sampling"][-1], load_file(latents)["latents"]

    return dict(zip(FORMS, (of_network(make_network(dit, "torch", True)), of_network(pipe.dit), native), strict=True))


def native_command(places: dict[str, Path]) -> list[Any]:
    picture = places["program"].parent / "native.png"
    return [
        places["program"], "--artifact", places["artifact"], "--task", places["context"], "--query", places["query"],
        "-o", picture, "--steps", STEPS, "--guidance", GUIDANCE,
    ]  # fmt: skip


def processes(places: dict[str, Path]) -> dict[str, list[Any]]:
    """Commands from nothing to a picture."""

    def python(checkpoint: Path, *more: str) -> list[Any]:
        picture = places["program"].parent / "python.png"
        return [
            sys.executable, "-m", "lavin_rt.cli.main", "run", "--checkpoint", checkpoint, "--task", places["context"],
            "--query", places["query"], "-o", picture, "--size", SIZE, "--steps", STEPS, "--guidance", GUIDANCE, "-q",
            "--device", "cpu", *more,
        ]  # fmt: skip

    # The context was encoded by the artifact's VAE, whose fingerprint is the checkpoint's.
    commands = (python(places["checkpoint"], "--compile"), python(places["artifact"]), [*native_command(places), "-q"])
    return dict(zip(FORMS, commands, strict=True))


def run_process(command: list[Any], threads: int) -> str:
    setting = ["env", f"OMP_NUM_THREADS={threads}", f"MKL_NUM_THREADS={threads}"]
    done = subprocess.run([*setting, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr}")
    return done.stdout


def timed_process(command: list[Any], threads: int) -> float:
    began = time.perf_counter()
    run_process(command, threads)
    return time.perf_counter() - began


def _seconds_of(run: Callable[[], tuple[float, torch.Tensor]]) -> float:
    return run()[0]


def compare(places: dict[str, Path], repeats: int, threads: int) -> list[dict[str, Any]]:
    """One row per form; raises `SystemExit` where a result is wrong."""
    runs = forms(places, threads)
    results = {name: run()[1] for name, run in runs.items()}
    errors = {name: relative_error(result, results[FORMS[0]]) for name, result in results.items()}
    if not all(error <= TOLERANCE for error in errors.values()):
        raise SystemExit(f"no times, the latents differ by {errors} (limit {TOLERANCE})")
    sampling = in_turn({name: partial(_seconds_of, run) for name, run in runs.items()}, repeats)
    commands = processes(places)
    for command in commands.values():
        run_process(command, threads)  # the compiler's cache on disk, the page cache
    starts = in_turn({n: partial(timed_process, c, threads) for n, c in commands.items()}, min(repeats, 3))
    return [
        {
            "form": name,
            "sampling_seconds": sampling[name].as_dict(),
            "process_seconds": starts[name].as_dict(),
            "relative_error": errors[name],
        }
        for name in FORMS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="lavin_bench.native", description=__doc__.split("\n\n")[0].replace("\n", " "))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="keep checkpoint, artifact and program here, and take what is there"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = header()
    print(header_line(where))
    with tempfile.TemporaryDirectory(prefix="lavin-rt-native-") as temporary:
        places = prepare((arguments.folder or Path(temporary)).resolve(), arguments.threads)
        rows = compare(places, arguments.repeats, arguments.threads)
    print(
        f"one sampling of {STEPS - 1} evaluations, float32, median of {arguments.repeats} (lowest - highest); process"
    )
    for row in rows:
        seconds = row["sampling_seconds"]
        print(
            f"{row['form']:18}{seconds['median']:7.3f} s ({seconds['low']:.3f} - {seconds['high']:.3f})  error "
            f"{row['relative_error']:.1e}  from nothing to a picture {row['process_seconds']['median']:.2f} s"
        )
    medians = {row["form"]: row["sampling_seconds"]["median"] for row in rows}
    for form, base in ((FORMS[1], FORMS[0]), (FORMS[2], FORMS[1])):
        print(f"{form} is {medians[base] / medians[form]:.2f}x as fast as {base}")
    if arguments.json:
        write_record(arguments.json, {"kind": "native", "header": where, "rows": rows})


if __name__ == "__main__":
    main()
