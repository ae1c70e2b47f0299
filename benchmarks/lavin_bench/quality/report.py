"""The record of `lavin-rt bench quality` for people: lines on a terminal, tables in the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lavin_bench.markdown import caption, table

UNITS = {"mean angle": ("{:.1f}", "°"), "PSNR": ("{:.1f}", " dB"), "MSE": ("{:.4f}", ""), "flow error": ("{:.2f}", "")}


def value(name: str, number: float) -> str:
    """A figure of the measure `name`, without its unit."""
    return UNITS.get(name, ("{:.3f}", ""))[0].format(number)


def measure_name(measure: dict[str, Any]) -> str:
    return measure["name"] + ("↑" if measure["higher_is_better"] else "↓")


def title(record: dict[str, Any]) -> str:
    """The task's name, with what was never trained of it."""
    if record.get("held_out"):
        return f"{record['task']} (members never trained)"
    return record["task"] if record["trained"] else f"{record['task']} (never trained)"


def clear(difference: Sequence[float]) -> bool:
    """Whether the interval of a mean difference lies above zero."""
    return difference[0] > difference[1]


def signed(name: str, difference: Sequence[float]) -> str:
    """A mean difference and the half-width of its 95 % interval."""
    mean, half = (value(name, number) for number in difference)
    return f"{'' if mean.startswith('-') else '+'}{mean} ± {half}"


def deciding(record: dict[str, Any]) -> str:
    return record["measures"][0]["name"]


def beats(record: dict[str, Any], row: dict[str, Any]) -> str:
    """Which of the simple yardsticks a task's results are clearly better than."""
    name = deciding(record)
    beaten = [kind for kind, figures in row["better_than"].items() if clear(figures[name])]
    return "both" if len(beaten) == 2 else beaten[0] if beaten else "neither"


def task_line(record: dict[str, Any]) -> str:
    """A task's deciding measure in one line."""
    name, last = deciding(record), record["pairs"][-1]
    parts = [f"{title(record):40}{measure_name(record['measures'][0]):12}"]
    parts.append(f"copy {value(name, record['copy'][name])}, mean {value(name, last['mean'][name])},")
    parts += [f"{row['pairs']} pairs {value(name, row['model'][name])}," for row in record["pairs"]]
    parts.append(f"ceiling {value(name, record['ceiling'][name])};")
    against = [f"{kind} {signed(name, figures[name])}" for kind, figures in last["better_than"].items()]
    parts.append(f"better than {', '.join(against)}: {beats(record, last)}")
    if "shuffled" in record:
        parts.append(f"; shuffled {signed(name, record['shuffled']['better_than_right'][name])}")
    if "better_than_exact" in last:
        parts.append(f"; against exact {signed(name, last['better_than_exact'][name])}")
    return " ".join(parts).replace(" ;", ";")


def context_text(record: dict[str, Any]) -> list[str]:
    """What decides, in sentences."""
    text, across = [], record["across_tasks"]
    if record["context"] is not None:
        found = record["context"]
        right = found["nearest_to_right"].items()
        shares = [f"{100 * share:.0f} ± {100 * half:.0f} % with {_pairs(count)}" for count, (share, half) in right]
        text.append(
            f"The same {found['scenes']} pictures under the contexts of {len(found['tasks'])} tasks: the result is "
            f"nearest to the right task's target ({found['distance']}) in {', '.join(shares)}; chance is "
            f"{100 * found['chance']:.0f} %, and the mean of the context's targets is in "
            f"{100 * found['means_nearest_to_right'][0]:.0f} %."
        )
    curve = [f"{m:.2f} dB with {_pairs(n)}" for n, (m, _) in across["psnr"].items()]
    text.append(f"PSNR of results to targets, the mean over {across['tasks']} tasks: {', '.join(curve)}.")
    if "more_pairs" in across:
        text[-1] = f"{text[-1][:-1]}; most against fewest pairs {_decibels(across['more_pairs'])}."
    if "shuffled_minus_right" in across:
        text.append(
            f"With every input beside another pair's target it changes by {_decibels(across['shuffled_minus_right'])}, "
            f"to {across['shuffled'][0]:.2f} dB{_worse_when_shuffled(record)}."
        )
    return text + _steps(record)


def _steps(record: dict[str, Any]) -> list[str]:
    """How much of the transformer's patches is seen in smooth results."""
    found = [task for task in record["tasks"] if all(task.get("blocks", {"": None}).values())]
    if not found:
        return []
    each = [f"{_ratio(t['blocks']['model'])} in {t['task']} (targets {_ratio(t['blocks']['target'])})" for t in found]
    return [f"The mean step across 16-pixel borders over that one pixel beside them: {', '.join(each)}."]


def _ratio(found: list[float]) -> str:
    return f"{found[0]:.2f} ± {found[1]:.2f}"


def _worse_when_shuffled(record: dict[str, Any]) -> str:
    """The tasks whose deciding measure is clearly worse with shuffled targets."""
    worse = []
    for task in record["tasks"]:
        mean, half = task.get("shuffled", {}).get("better_than_right", {}).get(deciding(task), (0.0, 0.0))
        if mean < -half:
            worse.append(f"{title(task)} ({deciding(task)} {signed(deciding(task), (mean, half))})")
    return f"; clearly worse: {', '.join(worse)}" if worse else ""


def summary(record: dict[str, Any]) -> list[str]:
    """What stands below the tasks' lines on a terminal."""
    trained = [task for task in record["tasks"] if task["trained"] and not task.get("held_out")]
    text = [
        f"{sum(task['clear'] for task in trained)} of {len(trained)} trained tasks are clearly better than copying the "
        "query and than the mean of the context's targets (deciding measure, 95 % interval of paired differences)."
    ]
    text += context_text(record)
    if record["context"] is not None:
        names = record["context"]["tasks"]
        text += [f"context {name:26}" + "".join(f"{n:5}" for n in row) for name, row in _matrix(record)]
        text.append("nearest to the target of: " + ", ".join(names))
    if "exact" in record:
        exact = record["exact"]
        text.append(f"Against {exact['checkpoint']} in {exact['dtype']} ({exact['impl']}), positive is better:")
        for task in record["tasks"]:
            for row in task["pairs"]:
                changes = [f"{name} {_fine(figures)}" for name, figures in row["better_than_exact"].items()]
                text.append(f"  {title(task):42}{_pairs(row['pairs']):9}{', '.join(changes)}")
    text += [f"Skipped: {one['task']}: {one['reason']}" for one in record["skipped"]]
    return [*text, f"{record['seconds']:.0f} s"]


def quality_table(record: dict[str, Any]) -> str:
    """A row a task, all its measures, and what the contexts decide."""
    counts = [row["pairs"] for row in record["tasks"][0]["pairs"]]
    rows = []
    for task in record["tasks"]:
        last = task["pairs"][-1]

        def cell(found: dict[str, float], task: dict[str, Any] = task) -> str:
            return " / ".join(value(m["name"], found[m["name"]]) for m in task["measures"])

        name = deciding(task)
        verdict = ", ".join(f"{kind} {signed(name, figures[name])}" for kind, figures in last["better_than"].items())
        rows.append(
            [
                title(task),
                " / ".join(measure_name(m) + UNITS.get(m["name"], ("", ""))[1] for m in task["measures"]),
                cell(task["copy"]),
                cell(last["mean"]),
                *(cell(row["model"]) for row in task["pairs"]),
                cell(task["shuffled"]["model"]) if "shuffled" in task else "",
                cell(task["ceiling"]),
                f"{'**both**' if task['clear'] else beats(task, last)} ({verdict})",
            ]
        )
    yardsticks = "copy of the query", "mean of targets"
    columns = ["task", "measure", *yardsticks, *map(_pairs, counts), "shuffled", "VAE's ceiling", "clearly better than"]
    text = [
        f"{record['checkpoint']}, {record['size']} px, {record['tasks'][0]['scenes']} held-out scenes a task, "
        f"{record['steps']} knots, guidance {record['guidance']}. {caption(record['header'])}",
        table(columns, rows).rstrip(),
        " ".join(context_text(record)),
    ]
    if record["context"] is not None:
        names = record["context"]["tasks"]
        confusion = [[name, *map(str, row)] for name, row in _matrix(record)]
        text.append(table(["context of, nearest to the target of", *names], confusion).rstrip())
    if "exact" in record:
        text.append(_exact_table(record))
    text += [f"Skipped: {one['task']}, {one['reason']}." for one in record["skipped"]]
    return "\n\n".join(text) + "\n"


def strangers_table(record: dict[str, Any]) -> str:
    """A row a mapping."""
    rows = []
    for row in record["rows"]:
        against = [f"{kind} {mean:+.1f} ± {half:.1f}" for kind, (mean, half) in row["better_than"].items()]
        both = all(clear(difference) for difference in row["better_than"].values())
        rows.append(
            [
                row["mapping"],
                row["kind"],
                *(f"{row[name]:.1f}" for name in ("copy", "mean", "model")),
                f"{'**both**' if both else 'not both'} ({', '.join(against)})",
                f"{row['own_target']:.1f}",
                f"{100 * row['own_target_nearest']:.0f} %",
            ]
        )
    columns = ["mapping", "", "copy, dB", "mean of targets, dB", "result, dB", "clearly better than"]
    columns += ["a pair's input, dB", "nearest to its own target"]
    asked = record["rows"][0]
    text = (
        f"lavin-mini, five pairs of crops of one photograph, {asked['contexts']} such contexts a mapping with "
        f"{asked['queries']} queries of another photograph, and {asked['pairs_asked']} that are pairs' own inputs; "
        f"95 % intervals over contexts. {caption(record['header'])}"
    )
    return f"{text}\n\n{table(columns, rows)}"


def taught_table(record: dict[str, Any]) -> str:
    """Before and after, beside the simple yardsticks."""
    rows = []
    for name, label in (("copy", "copy of the query"), ("mean", "mean of the targets"), ("before", "before")):
        (mean, half), (gain, around) = record[name], record["better_than"][name]
        rows.append([label, f"{mean:.1f} ± {half:.1f}", f"{gain:+.1f} ± {around:.1f}"])
    rows.append(["after", "{:.1f} ± {:.1f}".format(*record["after"]), ""])
    text = (
        f"lavin-mini, {record['mapping']}: {record['pairs']} pairs, {record['steps']} steps of rank {record['rank']} "
        f"in {record['seconds'] / 60:.0f} minutes, {record['queries']} queries with {record['shown']} of the pairs. "
        f"{caption(record['header'])}"
    )
    apart = [f"{kind} {levels}" for kind, levels in record["apart"].items()]
    differ = (
        f"\nGrey levels that the exported model's answers differ by, at most: {', '.join(apart)}.\n" if apart else ""
    )
    return f"{text}\n\n{table(['', 'PSNR, dB', 'after is better by, dB'], rows)}{differ}"


def _exact_table(record: dict[str, Any]) -> str:
    """The differences to the exact pipeline, of the most pairs; positive is better."""
    rows = []
    for task in record["tasks"]:
        changes = task["pairs"][-1]["better_than_exact"]
        rows.append([title(task), " / ".join(changes), " / ".join(map(_fine, changes.values()))])
    exact = record["exact"]
    head = f"{record['header']['dtype']} ({record['impl']}) against {exact['dtype']} ({exact['impl']})"
    if exact["checkpoint"] != record["checkpoint"]:
        head += f" of {exact['checkpoint']}"
    return table(["task", "measure", f"{head}, positive is better"], rows).rstrip()


def _matrix(record: dict[str, Any]) -> list[tuple[str, list[int]]]:
    return list(zip(record["context"]["tasks"], record["context"]["matrix"], strict=True))


def _pairs(count: int | str) -> str:
    return f"{count} pair{'s' * (int(count) != 1)}"


def _decibels(difference: Sequence[float]) -> str:
    return f"{difference[0]:+.2f} ± {difference[1]:.2f} dB"


def _fine(difference: Sequence[float]) -> str:
    """As small as rounding can be."""
    return f"{difference[0]:+.2g} ± {difference[1]:.1g}"
