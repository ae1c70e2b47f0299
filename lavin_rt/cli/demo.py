"""`make demo`: eight tasks done by the small model that comes with the package, in one picture, on any machine."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lavin_rt.cli.main import main as lavin_rt
from lavin_rt.errors import InputError
from lavin_rt.files import check_writable, written_whole
from lavin_rt.find.model import BUNDLED
from lavin_rt.mini.world.families import turned_hue
from lavin_rt.pictures.context import Pair, read_template
from lavin_rt.pipeline import Pipeline
from lavin_rt.process import settle_threads

PAIRS, CELL, GAP, STRIP = 4, 128, 4, 20
COLUMNS = ("pair: input", "pair: target", "query: a scene", "result", "truth", "query: a photograph", "result", "truth")
CUP = ("edge_detection", 3)  # a photograph in the templates, as it is


@dataclasses.dataclass(frozen=True)
class DemoRow:
    """A task, and which of its template's pairs are asked; training has seen none of them.

    Attributes:
        task: whose template is taken.
        scene: the pair whose input is a rendered query.
        photograph: the pair whose input is a photographed one; None asks about the cup, whose truth nobody knows.
        degrees: by which targets are the inputs turned in hue, in the place of the template's.
    """

    task: str
    scene: int
    photograph: int | None = None
    degrees: float | None = None

    @property
    def title(self) -> str:
        if self.degrees is None:
            return self.task
        return f"{self.task}, other pairs: the same inputs with targets turned by {self.degrees:g} degrees"

    def asked(self) -> tuple[list[tuple[np.ndarray, ...]], list[tuple[np.ndarray, ...]]]:
        """The context's pairs, and both queries with what would be right, where that is known; uint8 `[h, w, 3]`."""
        pairs = read_template(BUNDLED / "template" / self.task)
        queries = [self._pictures(pairs[self.scene])]
        if self.photograph is None:
            queries.append((_picture(read_template(BUNDLED / "template" / CUP[0])[CUP[1]].input),))
        else:
            queries.append(self._pictures(pairs[self.photograph]))
        others = [pair for number, pair in enumerate(pairs) if number not in (self.scene, self.photograph)]
        return [self._pictures(pair) for pair in others[:PAIRS]], queries

    def _pictures(self, pair: Pair) -> tuple[np.ndarray, ...]:
        shown = _picture(pair.input)
        return shown, _picture(pair.target) if self.degrees is None else turned_hue(shown, self.degrees)

    def cells(self, pipe: Pipeline) -> list[np.ndarray | None]:
        """The row's pictures, in the order of `COLUMNS`."""
        context, queries = self.asked()
        task, found = pipe.task(context), list[np.ndarray | None](context[0])
        for query, *truth in queries:
            found += [query, np.asarray(task(query)), truth[0] if truth else None]
        return found


# The last two rows ask the same queries with other pairs: it is the pairs that say what to do.
ROWS = (
    DemoRow("depth_estimation", 0),
    DemoRow("normal_estimation", 1),
    DemoRow("panoptic_segmentation", 2),
    DemoRow("instance_contours", 3),
    DemoRow("edge_detection", 2, 3),
    DemoRow("deblurring", 2, 4),
    DemoRow("colorization", 7, 5),
    DemoRow("hue", 4, 5),
    DemoRow("hue", 4, 5, 90),
)


def _picture(path: object) -> np.ndarray:
    assert isinstance(path, Path)  # a template's
    return np.asarray(Image.open(path).convert("RGB"))


def sheet(rows: list[tuple[str, list[np.ndarray | None]]]) -> Image.Image:
    """Titled rows of pictures under a line of headings."""
    height, width = STRIP + CELL + GAP, CELL + GAP
    drawn = Image.new("RGB", (len(COLUMNS) * width + GAP, STRIP + len(rows) * height), "white")
    draw = ImageDraw.Draw(drawn)
    for column, text in enumerate(COLUMNS):
        draw.text((GAP + column * width, 5), text, fill="dimgrey")
    for number, (title, cells) in enumerate(rows):
        top = STRIP + number * height
        draw.text((GAP, top + 5), title, fill="black")
        for column, cell in enumerate(cells):
            if cell is not None:  # 64 pixels are shown at twice that, pixel by pixel
                enlarged = Image.fromarray(cell).resize((CELL, CELL), Image.Resampling.NEAREST)
                drawn.paste(enlarged, (GAP + column * width, top + STRIP))
    return drawn


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lavin_rt.cli.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    folder = parser.parse_args().output
    picture = folder / "tasks.png"
    try:
        check_writable(picture)
    except InputError as error:
        print(f"lavin-rt: error: {error}", file=sys.stderr)
        return 2
    query = read_template(BUNDLED / "template" / "depth_estimation")[ROWS[0].scene].input
    command = ["run", "--task", "depth", "--query", str(query), "-o", str(folder / "depth.png"), "--grid"]
    print("$ lavin-rt " + shlex.join(command))
    code = lavin_rt(command)
    if code:
        return code
    pipe, rows = Pipeline.from_pretrained(), []
    settle_threads(hidden_size=pipe.network.config.hidden_size)
    for row in ROWS:
        print(f"{row.title} ...", flush=True)
        rows.append((row.title, row.cells(pipe)))
    with written_whole(picture) as partial:
        sheet(rows).save(partial, "PNG")
    print(f"Look at {picture}: eight tasks on a scene and on a photograph, the last one twice, by other pairs.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
