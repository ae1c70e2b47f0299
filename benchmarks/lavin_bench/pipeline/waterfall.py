"""The picture of a pipeline record: `python -m lavin_bench.pipeline.waterfall FILE.json [-o FILE.svg]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavin_bench import svg
from lavin_bench.programs import program, read_record
from lavin_rt.errors import InputError
from lavin_rt.files import written_whole

WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 860, 210, 190, 62, 34, 20
# Legible on white and on black alike; browsers that know the reader's scheme get more contrast.
STYLE = """
    text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #6e7781 }
    .title { font-size: 15px; font-weight: 600 }
    .value, .name { fill: #57606a }
    .theirs { fill: #9aa4af }
    .ours { fill: #3b82f6 }
    .floor { stroke: #d97706; stroke-width: 1.5; stroke-dasharray: 4 3 }
    @media (prefers-color-scheme: dark) {
      text { fill: #9da7b1 }
      .value, .name { fill: #d0d7de }
      .theirs { fill: #6e7781 }
    }
"""


def chosen_setting(record: dict[str, Any]) -> dict[str, Any]:
    """The standard run's setting where it was measured, else the last one that has times."""
    measured = [setting for setting in record["settings"] if setting["rows"]]
    if not measured:
        raise ValueError("the record has no setting with times")
    return next((s for s in measured if (s["size"], s["pairs"]) == (512, 4)), measured[-1])


def waterfall(record: dict[str, Any]) -> str:
    """An SVG: a bar per variant, its time, its gain over the authors' way, and the floor that the matmul ceiling sets.

    Raises:
        ValueError: no times in the record.
    """
    setting = chosen_setting(record)
    rows, head = setting["rows"], record["header"]
    medians = [row["seconds"]["median"] for row in rows]
    floor = setting["useful_flops"] / record["ceilings"]["matmul"]["flops_per_second"]
    scale = (WIDTH - LEFT - RIGHT) / max(medians)
    height = TOP + ROW * len(rows) + 40
    base = medians[0] if rows[0]["variant"].startswith("authors") else None
    parts = [
        svg.text(16, 24, f"One sampling, {setting['name']}, {record['steps']} knots, {head['dtype']}", "title"),
        svg.text(
            16, 44, f"{head['device']}, torch {head['torch']}, {head['date'][:10]}; encoded context to final latents"
        ),
    ]
    for index, (row, median) in enumerate(zip(rows, medians, strict=True)):
        y = TOP + ROW * index
        whose = "theirs" if row["variant"].startswith("authors") or "peer" in row else "ours"
        middle = y + BAR / 2 + 4.5
        parts += [
            svg.text(LEFT - 10, middle, row["variant"], "name", "end"),
            f'  <rect class="{whose}" x="{LEFT}" y="{y}" width="{median * scale:.1f}" height="{BAR}" rx="3"/>',
            svg.text(LEFT + median * scale + 8, middle, f"{_duration(median)}{_gain(base, median)}", "value"),
        ]
    end, x = TOP + ROW * len(rows), LEFT + floor * scale
    parts += [
        f'  <line class="floor" x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{end}"/>',
        svg.text(x, end + 18, f"{_duration(floor)}: all useful FLOPs at the measured matmul rate", anchor=_anchor(x)),
    ]
    return svg.document(WIDTH, height, STYLE, parts)


def _anchor(x: float) -> str:
    """Where a text has room: to the right of what lies left."""
    return "start" if x < WIDTH / 2 else "end"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _gain(base: float | None, median: float) -> str:
    return "" if base is None or base == median else f"  ({base / median:.2f}x)"


@program
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lavin_bench.pipeline.waterfall", description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON of lavin-rt bench pipeline")
    parser.add_argument("-o", "--output", type=Path, help="SVG to write (default: beside the record)")
    options = parser.parse_args(arguments)
    output = options.output or options.record.with_suffix(".svg")
    record = read_record(options.record)
    if record.get("kind") != "pipeline":
        raise InputError(f"{options.record}: of kind {record.get('kind')!r}; expected one of lavin-rt bench pipeline")
    drawn = waterfall(record)
    with written_whole(output) as partial:
        partial.write_text(drawn)


if __name__ == "__main__":
    sys.exit(main())
