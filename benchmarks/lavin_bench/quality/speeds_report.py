"""The record of `lavin-rt bench quality --speed` for people: tables, and the picture of cost against loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lavin_bench import svg
from lavin_bench.markdown import caption, table
from lavin_bench.quality.report import signed, value

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 460, 70, 190, 56, 52
LINE = 17  # of the legend
LEAST_LOSS, MOST_LOSS = 0.001, 1.0  # of the picture's axis, which is logarithmic
COLOURS = ("#3b82f6", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777", "#65a30d", "#6e7781")
# How much worse than exact a task's deciding measure may be, relative to it, at the bad end of the interval.
BOUNDS = {"near": 0.01, "fast": 0.02, "fastest": 0.05}
LEAST_PSNR = {"near": 40.0}  # dB, the median to the exact answer
DOES = "Tasks that exact does clearly better than a copy of the query and the mean of the targets"
DOES_NOT = "Tasks that exact does not do clearly better than both"
STYLE = """
    text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #6e7781 }
    .title { font-size: 15px; font-weight: 600 }
    .axis { stroke: #9aa4af; stroke-width: 1 }
    @media (prefers-color-scheme: dark) { text { fill: #9da7b1 } }
"""


def speeds_table(record: dict[str, Any]) -> str:
    """A row a task and speed: tasks that the model does, those that it does not, one-to-many tasks; and the verdict."""
    of = f"{record['pairs']} pairs, {record['size']} px, guidance {record['guidance']}"
    text = [f"{record['checkpoint']}, {of}, at least {_queries(record)} queries a task. {caption(record['header'])}"]
    grids = [f"{row['speed']}: {row['evaluations']} evaluations" for row in record["speeds"]]
    text.append(f"{'; '.join(grids)}.")
    columns = ["task", "speed", "measure", "to exact ± 95 %", "at worst", "dB to exact", "TFLOP", "s a query"]
    for title, tasks in _groups(record):
        rows = [_row(task, row) for task in tasks for row in task["rows"]]
        if rows:
            text.append(f"{title}\n\n{table(columns, rows).rstrip()}")
    text += verdict(record)
    text += [f"Skipped: {one['task']}, {one['reason']}." for one in record["skipped"]]
    return "\n\n".join(text) + "\n"


def own_pairs_table(record: dict[str, Any]) -> str:
    """A row a speed: PSNR to the targets of a folder's pairs, each answered from others, and to exact's answers."""
    height, width = record["size"]
    of = f"{record['task']}: {record['queries']} queries, {record['pairs']} pairs, {width}x{height} px"
    text = f"{record['checkpoint']}, {of}, guidance {record['guidance']}. {caption(record['header'])}"
    rows = []
    for row in record["rows"]:
        mean, half = row.get("better_than_exact", (None, None))
        apart = ["", ""] if mean is None else [f"{mean:+.2f} ± {half:.2f}", f"{row['psnr_to_exact']:.1f}"]
        rows.append([row["speed"], f"{row['psnr']:.2f}", *apart, f"{row['seconds']:.3f}"])
    columns = ["speed", "dB to the targets", "to exact ± 95 %", "dB to exact's answers", "s a query"]
    return f"{text}\n\n{table(columns, rows)}"


def _groups(record: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Tasks in three groups, each with what is to be said of it."""
    asked = [task for task in record["tasks"] if not task["one_to_many"]]
    return [
        (f"{DOES}:", [task for task in asked if task["clear"]]),
        (f"{DOES_NOT}:", [task for task in asked if not task["clear"]]),
        (
            "One query, many right answers (no bound is asked of these):",
            [task for task in record["tasks"] if task["one_to_many"]],
        ),
    ]


def verdict(record: dict[str, Any]) -> list[str]:
    """Which tasks are outside of which speed's bound."""
    lines = []
    for title, tasks in _groups(record):
        rows = [(task["task"], row) for task in tasks for row in task["rows"] if "within" in row]
        outside = [
            f"{row['speed']} in {task} ({row['worst_loss']:.1%}, {row['psnr_to_exact']:.1f} dB)"
            for task, row in rows
            if not row["within"]
        ]
        if rows:
            of_those = f"; outside: {', '.join(outside)}" if outside else ""
            lines.append(f"{title} {len(rows) - len(outside)} of {len(rows)} within their bounds{of_those}.")
    return lines or ["No bound is asked of these speeds and tasks."]


def front(record: dict[str, Any]) -> str:
    """An SVG: loss at the bad end of the interval over the share of exact's FLOPs, one line a task that the model does,
    dashed those of many right answers.
    """
    done = [task for task in record["tasks"] if task["clear"]]
    height = max(HEIGHT, TOP + LINE * (len(done) + 1))
    parts = [
        svg.text(16, 24, f"Loss against work, {record['checkpoint']}, {_queries(record)} queries a task", "title"),
        svg.text(
            16,
            42,
            "relative loss of the deciding measure at the bad end of its 95 % interval; dashed *: many right answers",
        ),
    ]
    shares = [row["flops"] / task["rows"][0]["flops"] for task in done for row in task["rows"][1:]]
    least = min(shares, default=0.05) / 1.2
    for loss in (0.001, 0.01, 0.1, 1.0):
        y = _y(loss)
        parts.append(f'  <line class="axis" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(svg.text(LEFT - 8, y + 4, f"{'≤ ' if loss == LEAST_LOSS else ''}{loss:.1%}", anchor="end"))
    for share in (0.05, 0.1, 0.2, 0.5, 1.0):
        if share >= least:
            parts.append(svg.text(_x(share, least), HEIGHT - BOTTOM + 20, f"1/{1 / share:g}", anchor="middle"))
    parts.append(svg.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "FLOPs, of exact's", anchor="middle"))
    for index, task in enumerate(done):
        colour = COLOURS[index % len(COLOURS)]
        points = [
            (_x(row["flops"] / task["rows"][0]["flops"], least), _y(row["worst_loss"]), row["speed"])
            for row in task["rows"][1:]
        ]
        dash = ' stroke-dasharray="4 3"' if task["one_to_many"] else ""
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        parts.append(f'  <polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        parts += [f'  <circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y, _ in points]
        y = TOP + 8 + LINE * index
        parts.append(f'  <rect x="{WIDTH - RIGHT + 16}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(svg.text(WIDTH - RIGHT + 32, y, task["task"] + (" *" if task["one_to_many"] else "")))
    return svg.document(WIDTH, height, STYLE, parts)


def _row(task: dict[str, Any], row: dict[str, Any]) -> list[str]:
    name, exact = task["deciding"], task["rows"][0]
    cells = [task["task"], row["speed"], f"{name} {value(name, row['measures'][name])}"]
    if row is exact:
        cells += ["", "", ""]
    else:
        bound, least = BOUNDS.get(row["speed"], math.inf), LEAST_PSNR.get(row["speed"], -math.inf)
        missed = row.get("within") is False  # one-to-many tasks have no bound
        cells.append(signed(name, row["better_than_exact"][name]))
        cells.append(_bold(f"{row['worst_loss']:.1%}", missed and row["worst_loss"] > bound))
        cells.append(_bold(f"{row['psnr_to_exact']:.1f}", missed and row["psnr_to_exact"] < least))
    return [*cells, f"{row['flops'] / 1e12:.3g} (1/{exact['flops'] / row['flops']:.1f})", f"{row['seconds']:.3f}"]


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _queries(record: dict[str, Any]) -> int:
    return min(task["queries"] for task in record["tasks"])


def _x(share: float, least: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * math.log(share / least) / math.log(1 / least)


def _y(loss: float) -> float:
    span = math.log(MOST_LOSS / LEAST_LOSS)
    at = math.log(min(max(loss, LEAST_LOSS), MOST_LOSS) / LEAST_LOSS) / span
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * at


def summary(record: dict[str, Any]) -> Sequence[str]:
    """What stands below the tasks' lines on a terminal."""
    return [*verdict(record), *(f"Skipped: {one['task']}: {one['reason']}" for one in record["skipped"])]
