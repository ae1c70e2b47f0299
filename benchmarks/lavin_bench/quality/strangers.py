"""A stranger's own pairs, through `lavin-rt run --task FOLDER`: `python -m lavin_bench.quality.strangers`.

Five pairs made from crops of a photograph that training never sees, by mappings of the trained families, members that
are never trained among them, and by compositions of two. Crops of another such photograph are the queries; then the
pairs' own inputs are, which should be answered with the pairs' own targets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from lavin_bench.programs import at_least, multiple_of, program
from lavin_bench.quality.figures import fidelity, interval
from lavin_bench.quality.report import strangers_table
from lavin_bench.record import write_record
from lavin_bench.timing import header, use_threads
from lavin_rt.cli.main import main as lavin_rt
from lavin_rt.errors import InputError
from lavin_rt.mini.world.encodings import as_picture, grey
from lavin_rt.mini.world.families import oriented, turned_hue
from lavin_rt.mini.world.sources import photograph, square_crop
from lavin_rt.pictures.images import check_writable

PAIRS = 5
# The evaluation's, but for a grey one, which does not tell a hue. A context is of one and its queries are of the other,
# in turns, so that no query is seen in its context.
PHOTOGRAPHS = ("chelsea", "sklearn:china.jpg")
Mapping = Callable[[np.ndarray], np.ndarray]


def inverted(colour: np.ndarray) -> np.ndarray:
    return 255 - colour


def green_inverted(colour: np.ndarray) -> np.ndarray:
    return colour ^ np.array([0, 255, 0], np.uint8)


def as_grey(colour: np.ndarray) -> np.ndarray:
    return as_picture(grey(colour))


def upside_down(colour: np.ndarray) -> np.ndarray:
    return oriented(colour, 2, False)


def along_the_diagonal(colour: np.ndarray) -> np.ndarray:
    return oriented(colour, 1, True)


def hue_turned(colour: np.ndarray) -> np.ndarray:
    return turned_hue(colour, 180)


def hue_between(colour: np.ndarray) -> np.ndarray:
    return turned_hue(colour, 97.5)


def channels_reversed(colour: np.ndarray) -> np.ndarray:
    return colour[..., ::-1]


def green_and_blue_exchanged(colour: np.ndarray) -> np.ndarray:
    return colour[..., [0, 2, 1]]


# What it is, whether training knows it, and the steps it is made of.
TRAINED, HELD_OUT, COMPOSED = "trained", "member never trained", "composition, never trained"
MAPPINGS: tuple[tuple[str, str, tuple[Mapping, ...]], ...] = (
    ("inverted", TRAINED, (inverted,)),
    ("green inverted", HELD_OUT, (green_inverted,)),
    ("hue turned by 180 degrees", TRAINED, (hue_turned,)),
    ("hue turned by 97.5 degrees", HELD_OUT, (hue_between,)),
    ("red and blue exchanged", TRAINED, (channels_reversed,)),
    ("green and blue exchanged", HELD_OUT, (green_and_blue_exchanged,)),
    ("upside down", TRAINED, (upside_down,)),
    ("mirrored at a diagonal", HELD_OUT, (along_the_diagonal,)),
    ("grey, then inverted", COMPOSED, (as_grey, inverted)),
    ("upside down, then inverted", COMPOSED, (upside_down, inverted)),
    ("hue turned by 97.5 degrees, then inverted", COMPOSED, (hue_between, inverted)),
)


def mapped(mapping: Sequence[Mapping], colour: np.ndarray) -> np.ndarray:
    for step in mapping:
        colour = step(colour)
    return np.ascontiguousarray(colour)


def save_pairs(folder: Path, pairs: Sequence[Sequence[np.ndarray]]) -> None:
    """Inputs and targets, uint8 `[S, S, 3]`, as a template folder, which is made."""
    folder.mkdir(parents=True)
    for number, pair in enumerate(pairs):
        for role, picture in zip(("input", "target"), pair, strict=True):
            Image.fromarray(picture).save(folder / f"{number}_{role}.png")


def prepare(given: argparse.Namespace) -> None:
    """Sets `--threads`, and refuses a `--size` or `--json` before anything is computed.

    Raises:
        InputError: no multiple of 16, or a file that cannot be written.
    """
    multiple_of(given, 16)
    if given.json:
        check_writable(given.json)
    use_threads(given.threads)


def answers(
    folder: Path, pairs: Sequence[Sequence[np.ndarray]], queries: Sequence[np.ndarray], options: Sequence[str] = ()
) -> list[np.ndarray]:
    """What `lavin-rt run` makes of queries with a folder of pairs, uint8 `[S, S, 3]` each.

    Raises:
        InputError: the command fails.
    """
    save_pairs(folder / "task", pairs)
    (folder / "queries").mkdir()
    files = [folder / "queries" / f"{number}.png" for number in range(len(queries))]
    for file, query in zip(files, queries, strict=True):
        Image.fromarray(query).save(file)
    out, size = folder / "results", len(queries[0])
    command = ["run", "--task", folder / "task", "--pairs", len(pairs), "--size", size, "-q", "-o", f"{out}/"]
    command += ["--query", *files]
    if lavin_rt([str(part) for part in [*command, *options]]):
        raise InputError("lavin-rt run failed")
    return [np.asarray(Image.open(out / file.name).convert("RGB")) for file in files]


def ask(
    mapping: Sequence[Mapping],
    folders: int,
    queries: int,
    size: int,
    seed: int,
    place: Path,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """A mapping's figures: PSNR in dB of results, of copies and of the mean target, and what pairs' inputs give.

    Queries of one context share what it shows, so the intervals are over contexts, of the means of their queries.
    """
    rows, own, nearest = [], [], []
    for number in range(folders):
        rng = np.random.default_rng([seed, number])
        of_pairs, of_queries = (photograph(PHOTOGRAPHS[(number + other) % 2]) for other in (0, 1))
        inputs = [square_crop(of_pairs, rng, size) for _ in range(PAIRS)]
        shown = [(crop, mapped(mapping, crop)) for crop in inputs]
        asked = [square_crop(of_queries, rng, size) for _ in range(queries)]
        results = answers(place / str(number), shown, [*asked, *(pair[0] for pair in shown)], options)
        mean = (np.mean([target for _, target in shown], axis=0) + 0.5).astype(np.uint8)
        of_context = []
        for query, result in zip(asked, results, strict=False):
            target = mapped(mapping, query)
            of_context.append([fidelity(picture, target) for picture in (result, query, mean)])
        rows.append(np.mean(of_context, axis=0))
        for index, result in enumerate(results[queries:]):
            found = [fidelity(result, target) for _, target in shown]
            own.append(found[index])
            nearest.append(int(np.argmax(found)) == index)
    result, copied, mean = np.array(rows).T
    return {
        "contexts": folders,
        "queries": folders * queries,
        "model": round(float(result.mean()), 3),
        "copy": round(float(copied.mean()), 3),
        "mean": round(float(mean.mean()), 3),
        "better_than": {"copy": interval(result - copied), "mean": interval(result - mean)},
        "pairs_asked": len(own),
        "own_target": round(float(np.mean(own)), 3),
        "own_target_nearest": round(float(np.mean(nearest)), 3),
    }


@program
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lavin_bench.quality.strangers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--checkpoint", help="of `lavin-rt run` (default: the small model that comes with the package)")
    parser.add_argument("--folders", type=int, default=12, help="contexts a mapping (default: 12)")
    parser.add_argument("--queries", type=int, default=4, help="a context (default: 4)")
    parser.add_argument("--size", type=int, default=64, help="of the pictures (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default: 0)")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args(arguments)
    rows, options = [], ["--checkpoint", given.checkpoint] if given.checkpoint else []
    prepare(given)
    at_least(given, folders=2, queries=1, seed=0)
    with tempfile.TemporaryDirectory(prefix="lavin-rt-strangers-") as temporary:
        for number, (name, kind, mapping) in enumerate(tqdm(MAPPINGS, "mappings", disable=None)):
            place = Path(temporary) / str(number)
            row = ask(mapping, given.folders, given.queries, given.size, given.seed, place, options)
            rows.append({"mapping": name, "kind": kind, **row})
    record = {"kind": "strangers", "header": {**header(), "dtype": "float32"}, "rows": rows}
    print(strangers_table(record))
    if given.json:
        write_record(given.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
