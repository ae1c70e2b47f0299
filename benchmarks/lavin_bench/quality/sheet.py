"""Sheets of pictures to look at: what the figures of `lavin-rt bench quality` were taken from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lavin_bench.quality.queries import alike

if TYPE_CHECKING:
    from lavin_bench.quality.answers import Answered

CELL = (96, 192)  # pixels a side, least and most
MARGIN, HEAD, LABEL = 4, 16, 150  # pixels: between cells, the row of titles, the column of names
COLUMNS = ("example: input", "example: target", "query", "result", "target", "mean of targets", "VAE's ceiling")


def tasks_sheet(answered: Sequence[Answered], item: int = 0) -> Image.Image:
    """A row per task: one pair of the context, the query, the result, its target and the yardsticks; of clips the last
    frame. Copying the query is the query itself.

    Args:
        item: which query of each task; always the same, not the best.
    """
    rows = []
    for one in answered:
        asked, most = one.asked, max(one.results)
        example = asked.pool[asked.picks[item, 0]]
        cells = [example[0], example[1], asked.queries[item], one.results[most][item], asked.targets[item]]
        cells += [asked.context_means(most)[item], one.ceilings[item]]
        name = asked.task.name
        name += "\n(members never trained)" if asked.held_out else "" if asked.task.trained else "\n(never trained)"
        rows.append((name, [cell[-1] for cell in cells]))
    return _sheet(COLUMNS, rows)


def context_sheet(answered: Sequence[Answered], most_scenes: int = 6) -> Image.Image | None:
    """The same queries under the contexts of all tasks that share them: a row of results and a row of targets a query.

    None with fewer than two such tasks.
    """
    group = {one.task.name for one in alike([one.asked for one in answered])}
    members = [one for one in answered if one.asked.task.name in group]
    if len(members) < 2:
        return None
    rows = []
    for item in range(min(most_scenes, members[0].asked.scenes)):
        results = [one.results[max(one.results)][item, -1] for one in members]
        rows.append((f"scene {item}: results", [members[0].asked.queries[item, -1], *results]))
        rows.append(("targets", [None, *(one.asked.targets[item, -1] for one in members)]))
    return _sheet(["query", *(one.asked.task.name.split("_")[0] for one in members)], rows)


def _sheet(titles: Sequence[str], rows: Sequence[tuple[str, list[np.ndarray | None]]]) -> Image.Image:
    """Cells uint8 `[S, S, 3]` in a grid on white, with a title over every column and a name before every row."""
    size = next(cell for _, cells in rows for cell in cells if cell is not None).shape[0]
    side = min(max(size, CELL[0]), CELL[1])
    sheet = Image.new("RGB", (LABEL + len(titles) * (side + MARGIN), HEAD + len(rows) * (side + MARGIN)), color="white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column, title in enumerate(titles):
        pen.text((LABEL + column * (side + MARGIN), 2), title, "black", font)
    for row, (name, cells) in enumerate(rows):
        top = HEAD + row * (side + MARGIN)
        pen.text((MARGIN, top + side // 2 - 8), name, "black", font)
        for column, cell in enumerate(cells):
            if cell is not None:
                picture = Image.fromarray(cell).resize((side, side), Image.Resampling.BICUBIC)
                sheet.paste(picture, (LABEL + column * (side + MARGIN), top))
    return sheet
