"""Many calls in one process: mixed tasks, sizes, speeds and threads with the bundled model.

`python -m lavin_bench.soak` makes a thousand and fails where memory has grown by more than 3 % since the hundredth, a
descriptor is left open, or an answer is another than a fresh process gives.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavin_bench.programs import at_least, program
from lavin_bench.timing import resident_bytes
from lavin_rt.sampling.speeds import SPEEDS

TASKS = ("depth", "negative", "edge_detection", "denoising", "inpainting", "normal_estimation")
SIZES = (32, 48, 64)
GROWTH = 0.03
KINDS = 8  # that a fresh process answers too


def plan(calls: int, seed: int = 0) -> list[dict[str, Any]]:
    """What to call: every call by its task, size, speed, queries, guidance and seed."""
    draw = random.Random(seed)
    return [
        {
            "task": draw.choice(TASKS),
            "size": draw.choice(SIZES),
            "speed": draw.choice(tuple(SPEEDS)),
            "queries": draw.choice((1, 1, 2)),
            "guidance": draw.choice((1.0, 1.5)),
            "seed": draw.randrange(3),
            "thread": draw.random() < 0.25,
        }
        for _ in range(calls)
    ]


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def answer(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """The pictures of a call, `[queries, H, W, 3]` uint8."""
    task = pipe.task(call["task"], pairs=1, size=call["size"])
    queries = [picture(call["seed"] + i) for i in range(call["queries"])]
    steps = 4 if call["speed"] == "exact" else None
    found = task.batch(queries, steps=steps, speed=call["speed"], guidance=call["guidance"], seed=call["seed"])
    return np.stack([np.asarray(one) for one in found])


def in_thread(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """A call in a thread of its own, which ends with it."""
    found: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: found.append(answer(pipe, call)))
    thread.start()
    thread.join()
    return found[0]


def digest(pictures: np.ndarray) -> bytes:
    return hashlib.sha256(repr(pictures.shape).encode() + pictures.tobytes()).digest()


def resident() -> int:
    """Bytes of the process that are in memory."""
    gc.collect()
    return resident_bytes("VmRSS")


def fresh(call: dict[str, Any]) -> np.ndarray:
    """A call's pictures from a process that does nothing else."""
    code = (
        "import json, sys, lavin_rt; from lavin_bench.soak import answer\n"
        "pictures = answer(lavin_rt.Pipeline.from_pretrained(), json.loads(sys.argv[1]))\n"
        "sys.stdout.write(json.dumps(pictures.tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(call)], capture_output=True, text=True, check=True)
    return np.array(json.loads(done.stdout), dtype=np.uint8)


def soak(calls: int, settled: int, kinds: int = KINDS) -> dict[str, Any]:
    """Makes the calls.

    Args:
        calls: how many.
        settled: after how many memory is taken as settled.
        kinds: of calls that a fresh process answers too.

    Returns:
        `resident` bytes after `settled` and after all calls, `growth`, `descriptors` that are left open, `different`,
        those of the `compared` calls that a fresh process answers with other bits, and `repeats`, calls that were made
        before and gave the same.
    """
    import lavin_rt

    pipe, repeats = lavin_rt.Pipeline.from_pretrained(), 0
    seen: dict[str, Any] = {}
    planned = plan(calls)
    for done, call in enumerate(planned, 1):
        found = (in_thread if call["thread"] else answer)(pipe, call)
        key = json.dumps({**call, "thread": False})
        if key in seen:
            assert seen[key] == digest(found), f"call {done} gave another answer than before: {key}"
            repeats += 1
        seen[key] = digest(found)  # the pictures themselves would be the memory that grows
        if done == settled:
            memory, descriptors = resident(), len(os.listdir("/proc/self/fd"))
    after = resident(), len(os.listdir("/proc/self/fd"))
    chosen = list(seen)[:: max(1, len(seen) // kinds)][:kinds]
    different = [key for key in chosen if seen[key] != digest(fresh(json.loads(key)))]
    return {
        "calls": calls,
        "resident": [memory, after[0]],
        "growth": after[0] / memory - 1,
        "descriptors": after[1] - descriptors,
        "different": different,
        "compared": len(chosen),
        "repeats": repeats,
    }


@program
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lavin_bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--settled", type=int, default=100, help="after which memory is settled (default: 100)")
    options = parser.parse_args(arguments)
    at_least(options, settled=1, calls=options.settled + 1)
    record = soak(options.calls, options.settled)
    print(json.dumps(record, indent=1))
    return int(record["growth"] > GROWTH or record["descriptors"] > 0 or bool(record["different"]))


if __name__ == "__main__":
    sys.exit(main())
