"""Makes the tables of this folder's README from result files: `python -m lavin_bench.report [--write README.md]`.

A table stands between `<!-- results: FILE -->` and `<!-- end -->`; FILE is one of `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from lavin_bench.markdown import caption, milliseconds, table
from lavin_bench.programs import program, read_record
from lavin_bench.quality.report import quality_table, strangers_table, taught_table
from lavin_bench.quality.speeds_report import own_pairs_table, speeds_table
from lavin_rt.errors import InputError, one_line

RESULTS = Path(__file__).parents[1] / "results"
PLACE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def kernels_table(record: dict[str, Any]) -> str:
    """Median, rate, share of the ceiling and error of every variant."""
    rows = []
    for figures in record["rows"]:
        seconds = figures["seconds"]
        scale, prefix = (1e12, "T") if figures["unit"] == "FLOP/s" and figures["rate"] >= 1e12 else (1e9, "G")
        rows.append(
            [
                f"`{figures['operator']}`, {figures['setting']}",
                figures["variant"],
                f"{seconds['median'] * 1e6:.0f} µs ({seconds['low'] * 1e6:.0f}–{seconds['high'] * 1e6:.0f})",
                f"{figures['rate'] / scale:.0f} {prefix}{figures['unit']}",
                f"{figures['share_of_ceiling']:.0%}",
                f"{figures['relative_error']:.1e}",
            ]
        )
    columns = ["operator", "variant", "median (spread)", "rate", "of ceiling", "error"]
    return f"{caption(record['header'])}\n\n{table(columns, rows)}"


def tuning_table(record: dict[str, Any]) -> str:
    """Of every kernel its candidates, the fastest first, and today's configuration named."""
    rows = []
    for kernel, found in record["kernels"].items():
        for name, seconds in sorted(found["times"].items(), key=lambda item: item[1]["median"]):
            rate = f"{found['flops'] / seconds['median'] / 1e12:.0f} TFLOP/s" if found.get("flops") else ""
            before = " (default then)" if name == found["today"] else ""
            rows.append([f"`{kernel}`", name + before, f"{seconds['median'] * 1e6:.0f} µs", rate])
    return f"{caption(record['header'])}\n\n{table(['kernel', 'launch', 'median', 'useful'], rows)}"


def forms_table(record: dict[str, Any]) -> str:
    """Median, peak memory and error of the forms of one computation, on a CPU."""
    rows = []
    for figures in record["rows"]:
        seconds = figures["seconds"]
        name = ", ".join(figures[key] for key in ("direction", "form") if key in figures)
        rows.append(
            [
                name,
                f"{seconds['median']:.2f} s ({seconds['low']:.2f}–{seconds['high']:.2f})",
                f"{figures['peak_bytes'] / 2**20:.0f} MiB",
                f"{figures['relative_error']:.1e}",
            ]
        )
    return f"{caption(record['header'])}\n\n{table(['form', 'median (spread)', 'peak memory', 'error'], rows)}"


def pipeline_table(record: dict[str, Any]) -> str:
    """Samplings and whole calls of every setting, by variant."""
    head = record["header"]
    text = [f"{record['steps']} knots, medians of {head['repeats']}, errors against float32. {caption(head)}"]
    for setting in record["settings"]:
        rows = [
            [
                row["variant"],
                milliseconds(row["seconds"]),
                f"{row['useful_flops_per_second'] / 1e12:.3g} TFLOP/s",
                f"{row['share_of_ceiling']:.0%}" if "share_of_ceiling" in row else "",
                f"{row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else "",
                f"{row['relative_error']:.1e}",
                f"{row['first_seconds']:.1f} s",
            ]
            for row in setting["rows"]
        ]
        columns = ["sampling", "ms per picture (spread)", "useful rate", "of matmul ceiling", "peak memory", "error"]
        text.append(f"{setting['name']}:\n\n{table([*columns, 'first picture after'], rows)}".rstrip())
        rows = [
            [row["variant"], milliseconds(row["seconds"]), f"{row['relative_error']:.1e}"]
            for row in setting.get("calls", [])
        ]
        if rows:
            text.append(table(["whole call, second query of a task", "ms (spread)", "error"], rows).rstrip())
        gains = [
            f"{one['what']}: {one['fast']} {one['times']:.2f}x{_spread(one)} as fast as {one['base']}"
            for one in setting["speedups"]
        ]
        text += [f"{'; '.join(gains)}."] if gains else []
        text += [f"Skipped: {one['what']}, {one['variant']}: {one['reason']}." for one in setting["skipped"]]
    return "\n\n".join(text) + "\n"


def _spread(gain: dict[str, Any]) -> str:
    return f" ({gain['low']:.2f}–{gain['high']:.2f})" if "low" in gain else ""


def named_speeds_table(record: dict[str, Any]) -> str:
    """Calls at the named speeds, and how many times as fast as `exact`: medians of the ratios within a round."""

    def times(row: dict[str, Any], key: str) -> str:
        if exact is None or row is exact:
            return ""
        pairs = zip(exact[key]["samples"], row[key]["samples"], strict=True)
        ratios = [first / second for first, second in pairs]
        spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else ""
        return f"{statistics.median(ratios):.2f}x{spread}"

    exact = next((row for row in record["rows"] if row["speed"] == "exact"), None)
    rows = []
    for row in sorted(record["rows"], key=lambda row: row is not exact):
        cells = [row["speed"], str(row["evaluations"]), f"{row['flops'] / 1e12:.3g}"]
        cells += [f"{row[key]['median']:.1f} s" for key in ("sampling", "call")]
        cells += [f"{exact['flops'] / row['flops']:.2f}", times(row, "sampling"), times(row, "call")] if exact else []
        rows.append(cells)
    columns = ["speed", "evaluations", "TFLOP", "sampling", "whole call"]
    columns += ["exact's FLOPs over its", "sampling (spread)", "whole call (spread)"] if exact else []
    rate = max(row["flops"] / row["sampling"]["median"] for row in record["rows"])
    return (
        f"{record['setting']}. {caption(record['header'])}\n\n{table(columns, rows)}\n"
        f"At best {rate / 1e12:.2g} useful TFLOP/s, beside {record['matmul_flops_per_second'] / 1e12:.2g} of a matrix "
        f"product; the process takes at most {record['peak_bytes'] / 1e9:.1f} GB.\n"
    )


def startup_table(record: dict[str, Any]) -> str:
    """Seconds of every part of a start, cold and warm."""
    starts = [record["cold"], record["warm"]]
    rows = [[part, *(f"{start['parts'][part]:.2f} s" for start in starts)] for part in starts[0]["parts"]]
    rows.append(["all", *(f"{start['total']:.2f} s" for start in starts)])
    if starts[0]["reserved_bytes"] is not None:
        rows.append(["memory reserved", *(f"{start['reserved_bytes'] / 1e9:.2f} GB" for start in starts)])
    text = f"{record['model']}, {record['setting']}, impl {record['impl']}. {caption(record['header'])}"
    return f"{text}\n\n{table(['from the start of a process', 'cold', 'warm'], rows)}"


def engines_table(record: dict[str, Any]) -> str:
    """One model by every engine of a CPU."""
    rows = [
        [
            row["engine"],
            "" if row["export_seconds"] is None else f"{row['export_seconds']:.0f} s",
            f"{row['bytes'] / 1e6:.0f} MB",
            f"{row['first_seconds']:.1f} s",
            f"{row['again_seconds']['median']:.1f} s",
            f"{1e3 * row['p50']:.0f}, {1e3 * row['p95']:.0f}",
            f"{row['relative_error']:.1e}",
        ]
        for row in record["rows"]
    ]
    columns = ["engine", "export", "on disk", "from nothing to a picture", "the next time", "a call: p50, p95, ms"]
    text = f"{record['setting']}. {caption(record['header'])}\n\n{table([*columns, 'error'], rows)}"
    left_out = [f"{name} ({reason})" for name, reason in record["skipped"].items()]
    return f"{text}\nLeft out: {'; '.join(left_out)}.\n" if left_out else text


def serve_table(record: dict[str, Any]) -> str:
    """A service under one client and under many, right answers and memory."""
    phases = [*record["one_client"], record["many_clients"]]
    columns = ["requests", "clients", "a second", "CPU seconds each", "p50, p95", "mean batch", "load average"]
    rows = [
        [
            f"{phase['answered']} of {phase['requests']}",
            str(phase["clients"]),
            f"{phase['per_second']:.2f}",
            f"{phase['cpu_seconds_each']:.2f}",
            f"{phase['p50_s']:.1f} s, {phase['p95_s']:.1f} s",
            f"{phase['mean_batch']:.1f}",
            " to ".join(f"{load:.0f}" for load in phase["load_average"]),
        ]
        for phase in phases
    ]
    head = " ".join([f"{record['setting']}.", caption(record["header"]), *record["openmp"]])
    text = (
        f"{head}\n\n{table(columns, rows)}\n"
        f"Many clients get {record['times_per_second']:.2f} times as much as one, for "
        f"{1 / record['times_cpu_seconds_each']:.2f} of the CPU time a request. {record['held_against_the_pipeline']} "
        f"answers held against the pipeline's own differ by {record['worst_grey_levels']} grey levels at most."
    )
    if "memory" in record:
        memory = record["memory"]
        text += (
            f" The process takes {memory['mb_after_100']:.0f} MB after 100 requests at speed fastest and "
            f"{memory['mb_after_all']:.0f} MB after {memory['requests']} more."
        )
    return f"{text}\n"


def render(record: dict[str, Any]) -> str:
    """The table of a record, by its kind.

    Raises:
        InputError: a kind of record that has no table, or a record without what belongs to its kind.
    """
    tables = {
        "kernels": kernels_table,
        "pipeline": pipeline_table,
        "startup": startup_table,
        "tuning": tuning_table,
        "forms": forms_table,
        "quality": quality_table,
        "quality_speeds": speeds_table,
        "own_pairs": own_pairs_table,
        "speeds": named_speeds_table,
        "engines": engines_table,
        "crowded": crowded_table,
        "serve": serve_table,
        "strangers": strangers_table,
        "taught": taught_table,
    }
    kind = record.get("kind", "forms")
    if kind not in tables:
        raise InputError(f"a record of kind {kind!r} has no table; expected one of {', '.join(tables)}")
    try:
        return tables[kind](record)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f"a record of kind {kind!r} lacks what its table shows ({one_line(error)}); measure again"
        ) from error


def crowded_table(record: dict[str, Any]) -> str:
    """The seconds of a query by every choice of threads and waiting, beside so many other programs."""
    choices = list(record["rows"][0]["seconds"])
    rows = [
        [
            str(row["programs"]),
            *(
                f"{timing['median']:.2f} ({timing['low']:.2f}–{timing['high']:.2f})"
                for timing in row["seconds"].values()
            ),
            f"{row['auto_over_best']:.2f}",
        ]
        for row in record["rows"]
    ]
    time = f"{record['processor_time']:g} processors' time allowed"
    columns = ["other programs", *(f"{choice}, s" for choice in choices), "auto over the best"]
    return f"{record['task']}, {time}. {caption(record['header'])}\n\n{table(columns, rows)}"


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with every table made anew from its file."""

    def replaced(match: re.Match) -> str:
        return f"{match[1]}{render(read_record(results / match[2]))}{match[3]}"

    return PLACE.sub(replaced, text)


@program
def main() -> int:
    parser = argparse.ArgumentParser(prog="lavin_bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="result files to print; all committed ones by default")
    parser.add_argument("--write", type=Path, metavar="README.md", help="fill this file's tables instead")
    options = parser.parse_args()
    if options.write:
        options.write.write_text(fill(options.write.read_text()))
        return 0
    for path in options.files or sorted(RESULTS.glob("*.json")):
        print(f"{path.name}\n\n{render(read_record(path))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
