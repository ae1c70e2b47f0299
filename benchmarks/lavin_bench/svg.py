"""Pictures as SVG text."""

from __future__ import annotations

import html
from collections.abc import Iterable


def document(width: int, height: int, style: str, parts: Iterable[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
    return "\n".join([f'{head}role="img">', f"  <style>{style}  </style>", *parts, "</svg>"]) + "\n"


def text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    attributes = f' class="{kind}"' if kind else ""
    return f'  <text x="{x:.1f}" y="{y:.1f}"{attributes} text-anchor="{anchor}">{html.escape(text)}</text>'
