"""`lavin-rt bench startup`: from the start of a process to its first picture, part by part.

Every run is a process of its own. The first finds no compiled kernel and, where the system lets go of them, the
checkpoint's files not in the page cache (PyTorch's own files are left there); the others find both.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # before anything heavy is imported: a child's clock begins with the interpreter behind it

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

STEPS, GUIDANCE = 20, 1.5
STANDARD = {"checkpoint": None, "size": 512, "pairs": 4, "impl": "auto", "compile": False, "threads": None}
STANDARD |= {"device": "auto", "dtype": "auto"}
# Released model, 512 px and 4 pairs: seconds of a warm start on an H100 or H200, bytes on any GPU.
SECONDS_AT_MOST, RESERVED_AT_MOST, HOPPER = 25.0, 7.0e9, "9.0"


class Clock:
    """Divides the time since a process was spawned into parts that add up to all of it.

    Args:
        spawned: `time.monotonic()` of the parent just before it started this process; the clock is the machine's.
    """

    def __init__(self, spawned: float):
        self.parts: dict[str, float] = {}
        self._last = spawned

    def mark(self, part: str, now: float | None = None) -> None:
        """Counts the time since the mark before, less what `within` counted meanwhile, as `part`."""
        now = time.monotonic() if now is None else now
        self._add(part, now - self._last)
        self._last = now

    def within(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as `part`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.monotonic()
            try:
                return function(*arguments, **options)
            finally:
                seconds = time.monotonic() - began
                self._add(part, seconds)
                self._last += seconds

        return timed

    def count(self, part: str, owner: object, method: str) -> None:
        """Has an object's method counted as `part` from now on."""
        setattr(owner, method, self.within(part, getattr(owner, method)))

    def _add(self, part: str, seconds: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + seconds


def child(options: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """One start in this process, from the checkpoint's files to a picture's file. Returns the figures."""
    import torch

    from lavin_rt.checkpoint.load import load_dit, load_vae
    from lavin_rt.devices import resolve_device, resolve_dtype
    from lavin_rt.find.model import Artifact, find_model
    from lavin_rt.pictures import images
    from lavin_rt.pipeline import Pipeline
    from lavin_rt.sampling.denoisers import PackedNetwork

    clock.mark("imports")
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device = resolve_device(options["device"])
    dtype = resolve_dtype(options["dtype"], device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    clock.mark("device")
    files = find_model(options["checkpoint"])
    if isinstance(files, Artifact):
        pipe = Pipeline.from_pretrained(
            files, device, options["dtype"], impl=options["impl"], compile=options["compile"]
        )
        clock.mark("artifact")
    else:
        dit = load_dit(files.dit, device=device, dtype=dtype)
        clock.mark("transformer")
        vae = load_vae(files.vae, device=device, dtype=dtype)
        pipe = Pipeline(dit, vae, impl=options["impl"], compile=options["compile"])
        clock.mark("VAE")
        if isinstance(pipe.network, PackedNetwork):
            pipe.network.prepack()
            clock.mark("prepacking")
    size, pairs = options["size"], options["pairs"]
    shape = (2 * pairs + 1, size, size, 3)
    *context, query = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    task = pipe.task(list(zip(context[::2], context[1::2], strict=True)), size=size)
    clock.mark("context")
    clock.count("modulation table", pipe.network, "table")
    task.prepare(1, STEPS, GUIDANCE)
    clock.mark("compile and capture" if options["compile"] or pipe.executor.graphs else "preparation")
    clock.count("query's encoding", pipe, "encode")
    clock.count("decoding", pipe, "decode")
    [result] = task.run([query], steps=STEPS, guidance=GUIDANCE)
    clock.mark("sampling")
    images.save_picture(result.frames, options["picture"])
    clock.mark("writing")
    return {
        "parts": clock.parts,
        "total": sum(clock.parts.values()),
        "impl": pipe.impl,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
    }


def start(options: dict[str, Any], caches: Path) -> dict[str, Any]:
    """Spawns one process and returns its figures; `caches` is where it keeps compiled kernels."""
    command = ["env", f"TRITON_CACHE_DIR={caches / 'triton'}", f"TORCHINDUCTOR_CACHE_DIR={caches / 'inductor'}"]
    spawned = time.monotonic()
    described = json.dumps({**options, "spawned": spawned})
    command += [sys.executable, "-m", "lavin_bench.pipeline.startup", "--child", described]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process gave no picture: {' '.join(done.stderr.split())[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def leave_page_cache(files: Iterable[Path]) -> bool:
    """Asks the system to let go of files; False where it cannot be asked, or for one that cannot be read."""
    if not hasattr(os, "posix_fadvise"):
        return False
    left = True
    for path in files:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            left = False
            continue
        try:
            os.fsync(descriptor)  # pages that were not written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            left = False
        finally:
            os.close(descriptor)
    return left


def make_checkpoint(folder: Path, model: str, device: Any) -> Path:
    """Writes a checkpoint of random weights: `"tiny"` or `"small"` in float32, `"released"` (7 GB) in bfloat16."""
    import torch

    from lavin_bench.pipeline.variants import (
        CPU_CONFIG,
        CPU_VAE,
        QUICK_CONFIG,
        RELEASED,
        RELEASED_VAE,
        random_model,
        random_vae,
    )
    from lavin_rt.checkpoint.load import save_dit, save_vae
    from lavin_rt.devices import release_cached

    config, vae, dtype = {
        "tiny": (QUICK_CONFIG, CPU_VAE, torch.float32),
        "small": (CPU_CONFIG, CPU_VAE, torch.float32),
        "released": (RELEASED, RELEASED_VAE, torch.bfloat16),
    }[model]
    save_dit(random_model(config, device, dtype), folder / "lavin_dit.safetensors")
    save_vae(random_vae(vae, device, dtype).to(dtype), folder / "stvae.safetensors")
    release_cached(device)  # the memory is the children's now
    return folder


def run(options: dict[str, Any], model: str, repeats: int = 3, show: bool = True) -> dict[str, Any]:
    """One cold start and `repeats` warm ones; returns the record that `report` reads.

    Args:
        options: what `STANDARD` has; without a checkpoint a random one of `model` is made.
        model: `"small"` or `"released"`, where no checkpoint is given.
        repeats: warm starts.
        show: print as it goes.
    """
    from lavin_bench.timing import header, header_line
    from lavin_rt.devices import resolve_device
    from lavin_rt.find.model import Artifact, find_model

    device = resolve_device(options["device"])
    record: dict[str, Any] = {
        "kind": "startup",
        "header": header(device),
        "setting": f"{options['size']} px, {options['pairs']} pairs",
        "model": str(options["checkpoint"] or f"random, {model}"),
        "failures": [],
    }
    if show:
        print(header_line(record["header"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="lavin-startup-") as work:
        folder = Path(work)
        if options["checkpoint"] is None:
            (folder / "checkpoint").mkdir()
            options = {**options, "checkpoint": str(make_checkpoint(folder / "checkpoint", model, device))}
        options = {**options, "picture": str(folder / "picture.png")}
        # A hub id or an archive is fetched and unpacked before, which is not a start's business.
        files = find_model(options["checkpoint"])
        if isinstance(files, Artifact):
            read = [files.folder / name for name in files.manifest.files]
        else:
            read = [files.dit, files.vae]
        record["cold_page_cache"] = leave_page_cache(read)
        starts = []
        for number in range(1 + repeats):
            starts.append(start(options, folder / "caches"))
            if show:
                print(f"{'warm' if number else 'cold'}: {starts[-1]['total']:.2f} s", flush=True)
    cold, *warm = starts
    record |= {"impl": cold["impl"], "cold": cold, "warm": sorted(warm, key=lambda s: s["total"])[len(warm) // 2]}
    record["header"]["dtype"], record["warm_totals"] = cold["dtype"], [figures["total"] for figures in warm]
    if show:
        print("\n".join(lines(record)), flush=True)
    if model == "released" and (options["size"], options["pairs"]) == (512, 4):
        record["failures"] += beyond_bounds(record)
    return record


def beyond_bounds(record: dict[str, Any]) -> list[str]:
    """What a GPU's start of the standard run takes too much of; seconds are those of an H100 or H200."""
    head, found = record["header"], []
    if "capability" in head:
        found.append((record["cold"]["reserved_bytes"], RESERVED_AT_MOST, "bytes"))
    if head.get("capability") == HOPPER:
        found.append((record["warm"]["total"], SECONDS_AT_MOST, "s"))
    return [f"{value:.4g} {unit}; at most {most:.4g}" for value, most, unit in found if value > most]


def lines(record: dict[str, Any]) -> list[str]:
    """A record for people: a line per part."""
    cold, warm = record["cold"], record["warm"]
    rows = [f"{'part':22}{'cold':>9}{'warm':>9}   seconds, {record['setting']}, impl {record['impl']}"]
    for part in [*cold["parts"], "total"]:
        seconds = [figures["total"] if part == "total" else figures["parts"][part] for figures in (cold, warm)]
        rows.append(f"{part:22}{seconds[0]:9.2f}{seconds[1]:9.2f}")
    if cold["reserved_bytes"] is not None:
        rows.append(f"reserved on the GPU: {cold['reserved_bytes'] / 1e9:.2f} GB")
    return rows


def bench_startup(options: argparse.Namespace) -> None:
    """Runs the command; a start that is too slow or too large on a GPU raises `RuntimeError` at the end."""
    from lavin_bench.record import write_record
    from lavin_bench.timing import use_threads
    from lavin_rt.devices import resolve_device
    from lavin_rt.errors import InputError
    from lavin_rt.pictures.images import check_writable, parse_size

    if options.output:
        check_writable(options.output)
    use_threads(options.threads)  # the record's header says how many
    device = resolve_device(options.device)
    model = options.model if options.model != "auto" else "released" if device.type == "cuda" else "small"
    if model not in ("small", "released"):
        raise InputError(f"--model is {options.model!r}; expected auto, small or released")
    if options.pairs < 1:
        raise InputError(f"--pairs is {options.pairs}; expected at least 1")
    size = options.size or (128 if options.checkpoint is None and model == "small" else 512)
    parse_size(size)
    wanted = {name: getattr(options, name) for name in ("checkpoint", "pairs", "device", "dtype", "impl", "compile")}
    record = run({**wanted, "size": size, "threads": options.threads}, model)
    if options.output:
        write_record(options.output, record)
    if record["failures"]:
        raise RuntimeError(f"the start is over its bounds: {'; '.join(record['failures'])}")


def main() -> None:
    """A child: prints its figures as one line of JSON."""
    parser = argparse.ArgumentParser(prog="lavin_bench.pipeline.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--child", required=True, metavar="JSON", help="what to start; see `start`")
    options = json.loads(parser.parse_args().child)
    clock = Clock(options["spawned"])
    clock.mark("interpreter", STARTED)
    print(json.dumps(child(options, clock)))


if __name__ == "__main__":
    main()
