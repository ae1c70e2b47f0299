"""Many clients on one service: `python -m lavin_bench.serve_load`, loopback only, bounded in requests and time.

Asks the same requests one at a time, then by many clients at once; holds every picture against the pipeline's own, and
the process's memory after all requests against that after the first hundred.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lavin_rt.pipeline import Pipeline

TASKS = ("depth_estimation", "negative", "edge_detection", "normal_estimation")
LIMIT_SECONDS = 900
GREY_LEVELS = 2


def query(seed: int) -> bytes:
    """A picture of smooth noise as a PNG file."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((96, 72), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def requests(count: int, steps: int) -> list[dict[str, Any]]:
    """So many requests over four tasks, two speeds, one of which has a grid of its own, and many seeds."""
    rng = random.Random(0)
    hows = ({"speed": "exact", "steps": steps}, {"speed": "fast"})
    return [
        {"task": rng.choice(TASKS), "seed": rng.randrange(10**6), **rng.choice(hows), "query": i} for i in range(count)
    ]


class Load:
    """Clients of one service.

    Args:
        address: of the service, on loopback.
        process: its process, whose memory is looked at.
    """

    def __init__(self, address: str, process: int):
        import httpx

        self.client = httpx.Client(base_url=address, timeout=300, limits=httpx.Limits(max_connections=None))
        self.process = process
        self.end = time.monotonic() + LIMIT_SECONDS

    def ask(self, one: dict[str, Any]) -> tuple[int, float, bytes, int]:
        """(status, seconds, body, batch)."""
        began = time.monotonic()
        if began > self.end:
            raise RuntimeError(f"not done in {LIMIT_SECONDS} s")
        data: dict[str, str] = {name: str(one[name]) for name in ("seed", "steps", "speed") if name in one}
        answer = self.client.post(f"/v1/tasks/{one['task']}/run", files={"query": query(one["query"])}, data=data)
        return answer.status_code, time.monotonic() - began, answer.content, int(answer.headers.get("lavin-batch", 0))

    def run(self, asked: list[dict[str, Any]], clients: int) -> tuple[list, float]:
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(self.ask, asked))
        return answers, time.monotonic() - began

    def memory(self) -> int:
        """Resident bytes of the service."""
        text = Path(f"/proc/{self.process}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", text)
        assert found is not None
        return int(found[1]) * 1024


def worst(pipe: Pipeline, asked: list[dict[str, Any]], answers: list) -> int:
    """The largest difference in grey levels between answers and the pipeline's own, one by one."""
    tasks, most = {}, 0
    for one, (_, _, body, _) in zip(asked, answers, strict=True):
        if one["task"] not in tasks:
            tasks[one["task"]] = pipe.task(one["task"])
        image = Image.open(io.BytesIO(query(one["query"])))
        right = tasks[one["task"]](image, steps=one.get("steps"), seed=one["seed"], speed=one["speed"])
        given = np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)
        most = max(most, int(abs(given - np.asarray(right).astype(int)).max()))
    return most


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Starts a service, loads it, ends it; the figures."""
    command = [sys.executable, "-m", "lavin_rt.cli.main", "serve", "--port", "0", "--no-page", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            address = re.search(r"http://\S+", service.stdout.readline())
            assert address is not None, "the service said no address"
            load = Load(address[0], service.pid)
            asked = requests(options.requests, options.steps)
            load.run([asked[i] for i in range(8)], 2)  # warm
            few = asked[: options.alone]
            _, alone = load.run(few, 1)
            answers, together = load.run(asked, options.clients)
            statuses = [status for status, *_ in answers]
            seconds = sorted(second for _, second, _, _ in answers)
            figures = {
                "clients": options.clients,
                "requests": len(asked),
                "answered": statuses.count(200),
                "per_second_alone": round(len(few) / alone, 2),
                "per_second_together": round(len(asked) / together, 2),
                "times": round(len(asked) / together / (len(few) / alone), 2),
                "p50_s": round(statistics.median(seconds), 2),
                "p95_s": round(seconds[int(0.95 * len(seconds))], 2),
                "mean_batch": round(statistics.mean(batch for *_, batch in answers), 2),
            }
            if options.memory:
                quick = requests(options.memory, 4)
                load.run(quick[:100], options.clients)
                early = load.memory()
                load.run(quick[100:], options.clients)
                figures["memory_after_100_mb"] = round(early / 1e6, 1)
                figures[f"memory_after_{options.memory}_mb"] = round(load.memory() / 1e6, 1)
        finally:
            service.terminate()
            service.wait(60)
    print(json.dumps(figures), file=sys.stderr, flush=True)  # before the answers are held against the pipeline's own
    pipe = Pipeline.from_pretrained(device="cpu", dtype="float32")
    figures["worst_grey_levels"] = worst(pipe, asked[: options.check], answers[: options.check])
    return figures


def main() -> int:
    """Prints the figures as JSON; 1 where an answer is missing or wrong."""
    parser = argparse.ArgumentParser(prog="python -m lavin_bench.serve_load", description=__doc__)
    parser.add_argument("--clients", type=int, default=32, help="at once (default: 32)")
    parser.add_argument("--requests", type=int, default=200, help="in all (default: 200)")
    parser.add_argument("--alone", type=int, default=40, help="of them, also asked one at a time (default: 40)")
    parser.add_argument("--steps", type=int, default=20, help="knots of the schedule (default: 20)")
    parser.add_argument("--check", type=int, default=200, help="answers held against the pipeline's (default: 200)")
    parser.add_argument("--memory", type=int, default=1000, help="more requests, for memory; 0 none (default: 1000)")
    figures = measure(parser.parse_args())
    print(json.dumps(figures, indent=2))
    return int(figures["answered"] < figures["requests"] or figures["worst_grey_levels"] > GREY_LEVELS)


if __name__ == "__main__":
    sys.exit(main())
