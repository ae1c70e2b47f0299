"""One screen of what a GPU visit found, each figure beside its bound."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lavin_bench.pipeline.startup import HOPPER

# What the standard run (512 px, 4 pairs, guidance 1.5, 19 evaluations, bfloat16) has to take on an H100 or H200.
SECONDS_AT_MOST, SECONDS_GOAL = 2.05, 1.78
ATTENTION_AT_LEAST, ATTENTION_GOAL = 420e12, 500e12  # useful FLOP/s
ROWS_AT_LEAST = 0.85  # of the copy's bandwidth
AUTHORS_AT_LEAST = 1.3  # times as fast as the authors' way, compiled


def lines(folder: Path, outcomes: Mapping[str, str]) -> Iterator[str]:
    """The lines, from the parts' files in a folder."""
    yield "=" * 100
    for name, outcome in outcomes.items():
        record = read(folder / f"{name}.json")
        yield f"{name:16} {outcome}; " + "; ".join(_said(record))
    yield "=" * 100


def read(path: Path) -> dict[str, Any]:
    """A part's record; empty where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _said(record: Mapping[str, Any]) -> Iterator[str]:
    kind = record.get("kind")
    if kind == "tests":
        yield from record["last_line"]
    elif kind == "pipeline":
        for setting in record["settings"]:
            medians = {row["variant"]: row["seconds"]["median"] for row in setting["rows"]}
            times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in medians.items())
            held = _hopper(record) and setting["size"] == 512
            bound = f" (at most {SECONDS_AT_MOST} s, goal {SECONDS_GOAL} s)" if held else ""
            yield f"{setting['name']}: {times}{bound}"
            yield from (
                f"{gain['times']:.2f}x {gain['base']} (at least {AUTHORS_AT_LEAST})" for gain in setting["speedups"]
            )
            yield from (f"skipped {skipped['variant']}: {skipped['reason'][:120]}" for skipped in setting["skipped"])
    elif kind == "tuning":
        for kernel, found in record["kernels"].items():
            yield _tuned(kernel, found, _hopper(record))
    elif kind == "kernels":
        ours = [row for row in record["rows"] if row["variant"] == "ours"]
        for row in ours:
            bound = "" if row["flops"] else f" (at least {ROWS_AT_LEAST:.0%})"
            rate = f"{row['rate'] / 1e12:.3g} T{row['unit']}"
            yield f"{row['operator']} {row['setting']}: {rate}, {row['share_of_ceiling']:.0%}{bound}"
    elif kind == "startup":
        yield from (f"{how} {record[how]['total']:.1f} s" for how in ("cold", "warm") if how in record)
        if "warm" in record and "reserved_bytes" in record["warm"]:
            yield f"reserved {record['warm']['reserved_bytes'] / 1e9:.2f} GB"
    elif kind == "graphs" and "runs" in record:
        yield f"{record['unequal']} of {record['runs']} runs differ from eager ones"
    for failure in record.get("failures", [])[:6]:
        yield f"FAILURE {str(failure).strip().splitlines()[-1][:200]}"


def _hopper(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a GPU that the bounds in seconds and FLOP/s are meant for."""
    return record["header"].get("capability") == HOPPER


def _tuned(kernel: str, found: Mapping[str, Any], held: bool) -> str:
    median = {name: times["median"] for name, times in found["times"].items()}
    best = min(median, key=lambda name: median[name])
    text = f"{kernel}: {median[found['today']] * 1e6:.0f} -> {median[best] * 1e6:.0f} us, {best}"
    if found.get("flops"):
        rate = found["flops"] / median[best]
        text += f", {rate / 1e12:.0f} TFLOP/s" + f" (at least {ATTENTION_AT_LEAST / 1e12:.0f})" * held
    return f"{text}; {len(found['dropped'])} dropped"
