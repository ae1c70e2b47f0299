"""`lavin-rt bench serve`: many clients on one service, loopback only, bounded in requests and time.

Asks by one client, then by many at once, then by one again, as whatever else the machine does changes meanwhile; holds
every picture against the pipeline's own, and the process's memory after all requests against that after a hundred.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lavin_bench.record import write_record
from lavin_bench.timing import header, resident_bytes
from lavin_rt.errors import InputError, missing_extra
from lavin_rt.pictures.images import check_writable
from lavin_rt.pipeline import Pipeline

TASKS = ("depth_estimation", "negative", "edge_detection", "normal_estimation")
LIMIT_SECONDS = 1800
GREY_LEVELS = 2
TIMES, MEMORY_GROWTH = 1.3, 1.03
"""What many clients have to be faster by, and what memory may grow by."""


def query(seed: int) -> bytes:
    """A picture of smooth noise as a PNG file."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((96, 72), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def requests(count: int, steps: int) -> list[dict[str, Any]]:
    """So many requests over four tasks, two speeds in turn, so that any part has as much work a request as all, one of
    which has a grid of its own, and many seeds.
    """
    rng = random.Random(0)
    hows = ({"speed": "exact", "steps": steps}, {"speed": "fast"})
    return [{"task": rng.choice(TASKS), "seed": rng.randrange(10**6), **hows[i % 2], "query": i} for i in range(count)]


class Load:
    """Clients of one service.

    Args:
        address: of the service, on loopback.
        process: its process, whose time and memory are looked at.
    """

    def __init__(self, address: str, process: int):
        import httpx

        self.client = httpx.Client(base_url=address, timeout=600, limits=httpx.Limits(max_connections=None))
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

    def run(self, asked: list[dict[str, Any]], clients: int) -> tuple[list, dict[str, Any]]:
        """The answers, and what they took."""
        load, cpu, began = os.getloadavg()[0], self.cpu_seconds(), time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(self.ask, asked))
        seconds, cpu = time.monotonic() - began, self.cpu_seconds() - cpu
        waits = sorted(second for _, second, _, _ in answers)
        return answers, {
            "clients": clients,
            "requests": len(asked),
            "answered": sum(status == 200 for status, *_ in answers),
            "per_second": round(len(asked) / seconds, 3),
            "cpu_seconds_each": round(cpu / len(asked), 3),
            "p50_s": round(statistics.median(waits), 3),
            "p95_s": round(waits[int(0.95 * len(waits))], 3),
            "mean_batch": round(statistics.mean(batch for *_, batch in answers), 2),
            "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        }

    def cpu_seconds(self) -> float:
        """What the service has used of all cores, its own kernel's part included."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Resident bytes of the service."""
        return resident_bytes("VmRSS", self.process)

    def counted(self) -> int:
        """Answers by the service's own count."""
        return round(
            sum(map(float, re.findall(r"lavin_rt_answers_total{\S+} (\S+)", self.client.get("/metrics").text)))
        )

    def openmp(self) -> list[str]:
        """Settings of OpenMP that the service was started with."""
        given = Path(f"/proc/{self.process}/environ").read_bytes().decode(errors="replace").split("\0")
        return sorted(setting for setting in given if setting.startswith(("OMP_", "GOMP_")))


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
    figures: dict[str, Any] = {"kind": "serve", "header": header(), "setting": f"bundled model, {', '.join(TASKS)}"}
    answers: list[Any] = []
    asked = requests(options.requests, options.steps)
    with subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            address = re.search(r"http://\S+", service.stdout.readline())
            assert address is not None, "the service said no address"
            load = Load(address[0], service.pid)
            figures["openmp"] = load.openmp()
            load.run(requests(8, options.steps), 2)  # warm
            if asked:
                half, before = options.alone // 2, load.counted()
                phases = [(asked[:half], 1), (asked, options.clients), (asked[half : options.alone], 1)]
                one, many, again = (load.run(*phase) for phase in phases)
                answers, figures["many_clients"] = many
                figures["one_client"] = [one[1], again[1]]
                figures["counted"] = load.counted() - before
                for name, better in (("per_second", 1), ("cpu_seconds_each", -1)):
                    alone = statistics.mean(phase[name] for phase in figures["one_client"])
                    figures[f"times_{name}"] = round((many[1][name] / alone) ** better, 2)
                print(json.dumps(figures), file=sys.stderr, flush=True)
            if options.memory:
                quick = [{**one, "speed": "fastest", "steps": None} for one in requests(options.memory, options.steps)]
                quick = [{name: value for name, value in one.items() if value is not None} for one in quick]
                load.run(quick[:100], options.clients)
                early = load.memory()
                figures["memory"] = load.run(quick[100:], options.clients)[1]
                late = load.memory()
                figures["memory"] |= {"mb_after_100": early / 1e6, "mb_after_all": late / 1e6, "growth": late / early}
        finally:
            service.terminate()
            service.wait(60)
    if answers:
        pipe = Pipeline.from_pretrained(device="cpu", dtype="float32")
        figures["held_against_the_pipeline"] = min(options.check, len(asked))
        figures["worst_grey_levels"] = worst(pipe, asked[: options.check], answers[: options.check])
    return figures


def faults(figures: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """What of it must not be."""
    found = []
    if "many_clients" in figures:
        asked = options.requests + options.alone
        phases = [figures["many_clients"], *figures["one_client"]]
        answered = sum(phase["answered"] for phase in phases)
        if not answered == figures["counted"] == asked:
            found.append(f"{asked} requests, {answered} answered, {figures['counted']} by the service's count")
        if figures["worst_grey_levels"] > GREY_LEVELS:
            found.append(f"an answer is off by {figures['worst_grey_levels']} grey levels")
        if figures["times_per_second"] < TIMES:
            found.append(f"many clients get {figures['times_per_second']} times as much as one; expected {TIMES}")
    if "memory" in figures and figures["memory"]["growth"] > MEMORY_GROWTH:
        found.append(f"memory grew to {figures['memory']['growth']:.3f} of what it was; expected {MEMORY_GROWTH}")
    return found


def bench_serve(options: argparse.Namespace) -> None:
    """Measures, prints the figures as JSON and writes them where that is asked for.

    Raises:
        InputError: bad numbers, or a package that is missing.
        RuntimeError: an answer is missing or wrong, too little is gained, or memory grows.
    """
    if find_spec("httpx") is None:
        raise missing_extra("httpx", "test", "lavin-rt bench serve")
    for name, least in (("clients", 1), ("requests", 0), ("alone", 2), ("memory", 0), ("check", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} is {getattr(options, name)}; expected {least} or more")
    if options.alone > options.requests > 0 or 0 < options.memory <= 100:
        raise InputError("--alone: expected --requests at most; --memory: expected 0, or more than 100")
    if options.output:
        check_writable(options.output)
    figures = measure(options)
    figures["faults"] = faults(figures, options)
    print(json.dumps(figures, indent=1))
    if options.output:
        write_record(options.output, figures)
    if figures["faults"]:
        raise RuntimeError("; ".join(figures["faults"]))
