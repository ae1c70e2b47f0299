"""`lavin-rt run`: queries in, pictures out, with progress and a record."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.header import picture_size
from lavin_rt.console import Progress, loading_options, print_json
from lavin_rt.errors import InputError
from lavin_rt.files import check_writable
from lavin_rt.find.model import BUNDLED_NAMES, Artifact, find_model, opened, template_roots
from lavin_rt.pictures import colours, images
from lavin_rt.pictures import context as contexts
from lavin_rt.pictures.encoded import EncodedContext
from lavin_rt.pipeline import Pipeline, check_posterior
from lavin_rt.process import settle_threads
from lavin_rt.sampling.speeds import speed_of
from lavin_rt.task import Result, Task, check_batch_size, check_guidance, check_seed

if TYPE_CHECKING:
    import torch

BUNDLED_NOTE = (
    "note: this is lavin-mini, the small model that comes with the package, for pictures of 64 px: depth, normals, "
    "segmentation, restoration and others (lavin-rt info lists its tasks), and turned hues, exchanged channels, "
    "inverted colours and colours of classes as your pairs show them; of other pairs it makes little; --checkpoint "
    "takes another model"
)


def run(options: argparse.Namespace) -> None:
    """Runs the command; raises `InputError` for what cannot be used, before work is lost to it."""
    with colours.huge_pictures(options.allow_huge):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    queries = find_queries(options.query, options.clip)
    outputs = output_paths(queries, options.output, options.grid)
    speed = speed_of(options.speed)
    knots = speed.knots(options.steps)
    size = None if options.size is None else images.parse_size(options.size)
    check_seed(options.seed, len(queries))
    check_guidance(options.guidance)
    if options.batch_size is not None:
        check_batch_size(options.batch_size)
    lengths, largest = [], (0, 0)
    for query, output in zip(queries, outputs, strict=True):
        # Read once to be checked and once to be answered: many large pictures need not be in memory together.
        clip = read_query(query, options.clip, options.frames)
        lengths.append(len(clip))
        own = clip.shape[-2], clip.shape[-1]
        largest = max(largest, own)
        images.check_output(output, len(clip), own if options.keep_size else size)
    if options.save_context:
        if not options.save_context.endswith(".safetensors"):
            raise InputError(f"--save-context {options.save_context}: expected a name ending in .safetensors")
        check_writable(options.save_context)
    if options.tile is not None and (options.tile < 64 or options.tile % 16):
        raise InputError(f"--tile is {options.tile}; expected a multiple of 16 from 64 on, in pixels")
    if options.chunk is not None and options.chunk < 3:
        raise InputError(f"--chunk is {options.chunk}; expected at least 3 latent frames")

    progress = Progress(quiet=options.quiet or options.json)
    began = time.perf_counter()
    with progress.bar("loading", "B") as loading:
        checkpoint = opened(find_model(options.checkpoint, options.revision, options.trust, progress=loading))
        if isinstance(checkpoint, Artifact):
            checkpoint.manifest.check_speed(speed)
        check_task(options, checkpoint, size, queries, lengths, outputs)
        if checkpoint.source == BUNDLED_NAMES[1]:
            note(options, BUNDLED_NOTE)
        pipe = Pipeline.from_pretrained(
            checkpoint,
            **loading_options(options),
            graphs=not options.no_graphs,
            tile=options.tile and options.tile // 8,
            chunk=options.chunk,
            progress=loading,
        )
    settle_threads(options.threads, pipe.network.config.hidden_size)
    loaded = time.perf_counter()
    task = pipe.task(
        options.task,
        pairs=options.pairs,
        size=size,
        seed=options.seed,
        repeats=options.repeats,
        posterior=options.posterior,
        frames=options.frames,
    )
    if options.keep_size and (largest[0] > task.size[0] or largest[1] > task.size[1]):
        computed, shown = (f"{height}x{width}" for height, width in (task.size, largest))
        note(
            options,
            f"note: answers are computed at {computed}; --keep-size enlarges them to {shown}, as soft as they are",
        )
    if options.save_context:
        task.context.save(options.save_context)
    encoded = time.perf_counter()
    together = task.batch_size(len(queries), options.batch_size, options.guidance, speed)
    # On a bar of its own, as compilation and capture may take longer than the sampling.
    with progress.bar("preparing", " batches") as preparing:
        preparing(0, 1)
        task.prepare(together, options.steps, options.guidance, speed)
        preparing(1, 1)
    prepared = time.perf_counter()
    seeds = answer(task, queries, outputs, together, options, progress)
    seconds = {
        "loading": loaded - began,
        "context": encoded - loaded,
        "preparing": prepared - encoded,
        "queries": time.perf_counter() - prepared,
    }
    report(options, pipe, task, queries, outputs, seeds, seconds, knots.tolist())


def check_task(
    options: argparse.Namespace,
    model: Checkpoint | Artifact,
    size: tuple[int, int] | None,
    queries: list[Path],
    frames: list[int],
    outputs: list[Path | str],
) -> None:
    """Finds what is wrong with the task, or with queries of so many frames beside it, before minutes go into reading
    weights and answering.
    """
    check_posterior(options.posterior)
    if options.task.endswith(".safetensors"):
        encoded = EncodedContext.load(options.task)
        size, columns, frames_per_clip = encoded.size, 1, encoded.frames_per_clip
    else:
        folder = contexts.find_task(options.task, template_roots(model))
        chosen = contexts.choose_pairs(contexts.read_template(folder), options.pairs, options.seed, options.repeats)
        # Small, as only the lengths are asked.
        some = list(dict.fromkeys(chosen))
        frames_per_clip = contexts.ContextFrames.prepare(some, (16, 16), options.frames).frames_per_clip
        size, columns = size or images.parse_size(trained_size(model)), len(chosen) + 1
    for query, count, output in zip(queries, frames, outputs, strict=True):
        check_length(query, count, frames_per_clip)
        if options.grid:
            images.check_output(grid_path(output), count, images.grid_size(2, columns, size))


def trained_size(model: Checkpoint | Artifact) -> int:
    """The size of the pictures that a model was trained on, pixels a side; reads no weights."""
    if isinstance(model, Artifact):
        return model.manifest.size
    return picture_size(model.read_header())


def read_query(query: Path, clip: bool, frames: int | None) -> torch.Tensor:
    """A query's frames, uint8 `[T, 3, H, W]`; without `clip` it is one picture, of an animation the first."""
    return images.load_clip(query, frames) if clip else images.load_picture(query)[None]


def check_length(query: Path, length: int, frames: int) -> None:
    """Checks that a query has as many frames as the task's clips, and says how to come by them."""
    if length == frames:
        return
    if frames == 1:
        raise InputError(f"{query}: {length} frames, the task's pairs are pictures; leave --clip out")
    hint = f"cut it with --frames {frames}" if length > frames else "give a longer one, or cut both with --frames"
    if length == 1:
        hint = "did you mean --clip, with a folder of frames or an animation?"
    raise InputError(f"{query}: {length} frame{'s' * (length > 1)}, the task's clips have {frames}; {hint}")


def note(options: argparse.Namespace, text: str) -> None:
    """One line on stderr, unless nothing but errors and records is wanted."""
    if not options.quiet and not options.json:
        print(f"lavin-rt: {text}", file=sys.stderr)


def answer(
    task: Task,
    queries: list[Path],
    outputs: list[Path | str],
    together: int,
    options: argparse.Namespace,
    progress: Progress,
) -> list[int | None]:
    """Answers all queries, so many together, under one bar that counts steps; what is done is written at once.

    Returns the seeds.
    """
    runs, done, seeds = -(-len(queries) // together), 0, []
    several = len(queries) > 1  # then what counts is pictures a second
    with progress.bar("sampling", " pictures" if several else " steps") as sampling:

        def callback(step: int, evaluations: int, latents: object) -> None:
            nonlocal done
            done += 1
            if several:
                sampling(round(len(queries) * done / (runs * evaluations), 1), len(queries))
            else:
                sampling(done, evaluations)

        for first in range(0, len(queries), together):
            some = slice(first, first + together)
            clips = [read_query(query, options.clip, options.frames) for query in queries[some]]
            results = task.run(
                # A clip is [T, 3, H, W]; as an array it is given as [T, H, W, 3].
                [clip.permute(0, 2, 3, 1).numpy() for clip in clips],
                steps=options.steps,
                guidance=options.guidance,
                seed=options.seed + first,
                batch_size=together,
                keep_size=options.keep_size,
                callback=callback,
                speed=options.speed,
            )
            for result, clip, output in zip(results, clips, outputs[some], strict=True):
                images.save_picture(result.frames, output)
                if options.grid:
                    images.save_picture(grid_of(task, clip, result), grid_path(output))
                seeds.append(result.seed)
    return seeds


def find_queries(given: list[str], clip: bool) -> list[Path]:
    """The query pictures: what was given, and of folders (unless they are clips) the pictures in them."""
    queries: list[Path] = []
    for name in given:
        # os.path.isdir takes names that no file can have, such as one of 300 characters, for not there.
        if os.path.isdir(name) and not clip:
            found = images.frame_files(name)
            if not found:
                raise InputError(f"{name}: no pictures in this folder; expected at least one query")
            queries += found
        else:
            queries.append(Path(name))
    return queries


def output_paths(queries: list[Path], output: str, grid: bool) -> list[Path | str]:
    """One output for every query: the file named, or files with the queries' names in the folder named."""
    one_file = bool(Path(output).suffix) and not output.endswith(os.sep) and not os.path.isdir(output)
    if one_file and len(queries) > 1:
        frames = len({query.parent for query in queries}) == 1 and not any(query.is_dir() for query in queries)
        hint = ", or --clip where they are the frames of one clip" * frames
        raise InputError(
            f"--output {output} is one file for {len(queries)} queries; give a folder such as results/{hint}"
        )
    paths: list[Path | str] = [output] if one_file else [Path(output) / f"{query.stem}.png" for query in queries]
    written = [os.path.realpath(path) for path in [*paths, *(grid_path(path) for path in paths if grid)]]
    for path in written:
        if written.count(path) > 1:
            raise InputError(f"two pictures would both be written to {path}; rename a query or run them apart")
    for query in queries:
        if os.path.realpath(query) in written:
            raise InputError(f"{query}: the output would replace the query itself; give another --output")
    return paths


def grid_path(output: Path | str) -> Path:
    """`depth.png` has its grid in `depth-grid.png`."""
    path = Path(output)
    return path.with_name(f"{path.stem}-grid{path.suffix or '.png'}")


def grid_of(task: Task, clip, result: Result):
    """Context inputs and the query above, their targets and the result below."""
    if task.frames is None:
        return images.grid([[clip], [result.frames]], size=task.size)
    return images.grid(task.frames.rows(clip, result.frames), size=task.size)


def report(
    options: argparse.Namespace,
    pipe: Pipeline,
    task: Task,
    queries: list[Path],
    outputs: list[Path | str],
    seeds: list[int | None],
    seconds: dict[str, float],
    times: list[float],
) -> None:
    """Says what was done: a record in JSON, or a line for every picture and one for the time."""
    setting = {
        "checkpoint": pipe.source,
        "task": options.task,
        "pairs": task.context.pairs,
        "size": list(task.size),
        "speed": options.speed,
        "steps": len(times),
        "times": [round(time, 6) for time in times],
        "guidance": options.guidance,
        "impl": pipe.impl,
        "compile": pipe.compile,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    if options.json:
        answers = [
            {"query": str(query), "output": str(output), "seed": seed}
            for query, output, seed in zip(queries, outputs, seeds, strict=True)
        ]
        setting["pictures_per_second"] = round(len(queries) / seconds["queries"], 4)
        rounded = {part: round(value, 4) for part, value in seconds.items()}
        print_json({**setting, "results": answers, "seconds": rounded})
    elif not options.quiet:
        for output, seed in zip(outputs, seeds, strict=True):
            print(f"{output}  seed {seed}")
        parts = ", ".join(f"{part} {value:.2f} s" for part, value in seconds.items())
        if len(queries) > 1:
            parts += f", {len(queries) / seconds['queries']:.2f} pictures/s"
        print(f"{parts}  (speed {options.speed}, impl {pipe.impl}, {setting['device']}, {setting['dtype']})")
