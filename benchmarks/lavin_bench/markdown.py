"""Tables and captions in Markdown."""

from __future__ import annotations

from typing import Any


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; rows as long as the columns."""
    assert all(len(row) == len(columns) for row in rows), columns
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def milliseconds(seconds: dict[str, Any]) -> str:
    """Median and spread."""
    median, low, high = (f"{1e3 * seconds[key]:.0f}" for key in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def caption(header: dict[str, Any]) -> str:
    """Where, with what and when."""
    parts = [header["device"], f"torch {header['torch']}", header["date"][:10]]
    if header.get("dtype"):
        parts.insert(1, header["dtype"])
    if header.get("commit"):
        # The "+" of a changed checkout stays.
        parts.append(f"commit {header['commit'][:10]}{'+' if header['commit'].endswith('+') else ''}")
    return ", ".join(parts) + "."
