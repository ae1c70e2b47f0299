"""`make demo`: six tasks done by the small model that comes with the package, in one picture, on any machine."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from lavin_rt.cli.main import main as lavin_rt
from lavin_rt.find.model import BUNDLED
from lavin_rt.pictures import images
from lavin_rt.pictures.context import Pair, choose_pairs, read_template
from lavin_rt.pipeline import Pipeline

TASKS = (
    "depth_estimation",
    "normal_estimation",
    "foreground_segmentation",
    "object_detection",
    "edge_detection",
    "negative",
)
PAIRS, CELL = 4, 128
COLUMNS = ("pair: input", "target", "pair: input", "target", "query", "result", "truth")


def choose(task: str, seed: int = 0) -> tuple[list[Pair], Pair]:
    """Context pairs of a bundled task, and one more whose input is the query; training has seen none of them."""
    *context, query = choose_pairs(read_template(BUNDLED / "template" / task), PAIRS + 1, seed)
    return context, query


def row(pipe: Pipeline, task: str) -> list[torch.Tensor]:
    """A task's cells, uint8 `[1, 3, h, w]`: two of its pairs, the query, the result, and what would be right."""
    context, asked = choose(task)
    session = pipe.task(context)
    [result] = session.run([asked.input])
    query, truth = (images.resize(images.load_clip(picture), session.size) for picture in (asked.input, asked.target))
    assert session.frames is not None  # a context of pictures
    return [*session.frames.frames[:4], query, result.frames, truth]


def sheet(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    """All rows under a line of headings, uint8 `[3, H, W]`."""
    from PIL import Image, ImageDraw

    # Pictures of 64 pixels are shown at twice that, pixel by pixel.
    enlarged = [
        [torch.nn.functional.interpolate(cell, size=(CELL, CELL), mode="nearest") for cell in cells] for cells in rows
    ]
    grid = images.grid(enlarged)[0]
    heading = Image.new("RGB", (grid.shape[2], 18), "white")
    draw = ImageDraw.Draw(heading)
    for column, text in enumerate(COLUMNS):
        draw.text((4 + column * (CELL + 4), 4), text, fill="black")
    return torch.cat([images.load_clip(heading)[0], grid], dim=1)


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lavin_rt.cli.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    _, asked = choose(TASKS[0])
    command = ["run", "--task", "depth", "--query", str(asked.input), "-o", str(folder / "depth.png"), "--grid"]
    print("$ lavin-rt " + shlex.join(command))
    code = lavin_rt(command)
    if code:
        return code
    pipe = Pipeline.from_pretrained()
    rows = []
    for task in TASKS:
        print(f"{task} ...", flush=True)
        rows.append(row(pipe, task))
    picture = folder / "tasks.png"
    images.save_picture(sheet(rows)[None], picture)
    print(f"Look at {picture}: {', '.join(TASKS)}, one a row.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
