"""A mapping taught by low-rank adapters from a dozen pairs: `python -m lavin_bench.quality.taught`.

Solarizing, which no family has. The pairs are crops of photographs of the training's, the queries crops of others.
Asked before and after, with the same five of the pairs, through `lavin-rt run --task FOLDER`; the merged checkpoint is
also exported, and the artifacts asked.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from lavin_bench.programs import at_least, program
from lavin_bench.quality.figures import fidelity, interval
from lavin_bench.quality.report import taught_table
from lavin_bench.quality.strangers import PAIRS, answers, prepare, save_pairs
from lavin_bench.record import write_record
from lavin_bench.timing import header
from lavin_rt.cli.main import main as lavin_rt
from lavin_rt.errors import InputError
from lavin_rt.mini.train.__main__ import main as train
from lavin_rt.mini.world.sources import photograph_crop

TAUGHT = 12  # pairs
RANK, TOKENS, PEAK = 16, 1536, 0.004
KINDS = ("onnx", "aoti")


def solarized(colour: np.ndarray) -> np.ndarray:
    return np.where(colour > 127, 255 - colour, colour)


def teach(pairs: list[tuple[np.ndarray, np.ndarray]], steps: int, options: argparse.Namespace, place: Path) -> Path:
    """The folder of the merged checkpoint.

    Raises:
        InputError: the training fails.
    """
    folder, taught = place / "pairs", place / "taught"
    save_pairs(folder, pairs)
    command = ["--output", taught, "--pairs", folder, "--warm-start", options.checkpoint, "--size", options.size]
    command += ["--lora", RANK, "--dit-steps", steps, "--tokens", TOKENS, "--peak", PEAK, "--device", "cpu"]
    command += ["--threads", options.threads] if options.threads else []
    if train([str(part) for part in command]):
        raise InputError("the training failed")
    return taught


def measure(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The record; `options` are the command's."""
    rng = np.random.default_rng(options.seed)
    inputs = [photograph_crop("train", rng, options.size) for _ in range(TAUGHT)]
    queries = [photograph_crop("evaluation", rng, options.size) for _ in range(options.queries)]
    pairs, targets = [(one, solarized(one)) for one in inputs], [solarized(one) for one in queries]

    def asked(name: str, checkpoint: Path | str) -> list[np.ndarray]:
        return answers(place / name, pairs[:PAIRS], queries, ["--checkpoint", str(checkpoint), "--device", "cpu"])

    def psnr(results: list[np.ndarray]) -> np.ndarray:
        return np.array([fidelity(*pair) for pair in zip(results, targets, strict=True)])

    before = asked("before", options.checkpoint)
    began = time.perf_counter()
    taught = teach(pairs, options.steps, options, place)
    seconds = time.perf_counter() - began
    after, apart = asked("after", taught), {}
    for kind in options.export:
        artifact = place / f"{kind}-artifact"
        if lavin_rt(["export", kind, "--checkpoint", str(taught), "--device", "cpu", "-q", "-o", str(artifact)]):
            raise InputError(f"lavin-rt export {kind} failed")
        results = asked(kind, artifact)
        apart[kind] = int(max(np.abs(a.astype(int) - b).max() for a, b in zip(after, results, strict=True)))
    mean = (np.mean([target for _, target in pairs[:PAIRS]], axis=0) + 0.5).astype(np.uint8)
    found = {"before": before, "copy": queries, "mean": [mean] * len(queries)}
    scores, reached = {name: psnr(results) for name, results in found.items()}, psnr(after)
    return {
        "kind": "taught",
        "header": {**header(), "dtype": "float32"},
        "mapping": "solarized",
        "pairs": TAUGHT,
        "shown": PAIRS,
        "queries": len(queries),
        "rank": RANK,
        "steps": options.steps,
        "seconds": round(seconds, 1),
        "after": interval(reached),
        **{name: interval(score) for name, score in scores.items()},
        "better_than": {name: interval(reached - score) for name, score in scores.items()},
        "apart": apart,
    }


@program
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lavin_bench.quality.taught", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="mini", help="to begin with (default: the small model)")
    parser.add_argument("--steps", type=int, default=200, help="of the training (default: 200)")
    parser.add_argument("--queries", type=int, default=24, help="how many are asked (default: 24)")
    parser.add_argument("--size", type=int, default=64, help="of the pictures (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default: 0)")
    parser.add_argument("--export", choices=KINDS, nargs="*", default=KINDS, help="also run as (default: all)")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args(arguments)
    prepare(given)
    at_least(given, steps=1, queries=2, seed=0)
    with tempfile.TemporaryDirectory(prefix="lavin-rt-taught-") as temporary:
        record = measure(given, Path(temporary))
    print(taught_table(record))
    if given.json:
        write_record(given.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
