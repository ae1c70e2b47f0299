"""`lavin-rt map`: every picture of a folder answered by many pipelines, on Ray Data."""

from __future__ import annotations

import argparse
import contextlib
import io
import posixpath
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lavin_rt.artifact.manifest import Manifest, artifact_values
from lavin_rt.console import loading_options, print_json
from lavin_rt.errors import InputError, missing_extra, one_line
from lavin_rt.find.model import Artifact, find_model, opened, template_roots
from lavin_rt.pictures import context as contexts
from lavin_rt.pictures import images
from lavin_rt.pictures.encoded import EncodedContext
from lavin_rt.process import settle_threads
from lavin_rt.sampling.speeds import SPEEDS
from lavin_rt.task import check_guidance, check_seed

MANIFEST = "manifest.parquet"
COLUMNS = ("query", "output", "seed", "status", "error", "seconds", "batch")
KINDS = {"png": "png", "webp": "webp", "jpg": "jpeg"}
REPORT_SECONDS = 1.0


def run_map(options: argparse.Namespace) -> None:
    """Runs the command; a query whose picture is there already is passed over.

    Raises:
        InputError: a bad option, no queries, no place to write, a package that is missing.
    """
    for package in ("ray", "pyarrow", "fsspec"):
        if find_spec(package) is None:
            raise missing_extra(package, "ray", "lavin-rt map")
    if options.speed not in SPEEDS:
        raise InputError(f"--speed is {options.speed!r}; expected one of {', '.join(SPEEDS)}")
    SPEEDS[options.speed].knots(options.steps)
    if options.checkpoint and (values := artifact_values(options.checkpoint)) is not None:
        Manifest.of(Path(options.checkpoint), values).check_speed(SPEEDS[options.speed])
    if options.size is not None:
        images.parse_size(options.size)
    check_guidance(options.guidance)
    for name in ("workers", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected 1 or more")
    if options.gpus_per_worker < 0 or options.cpus_per_worker < 0:
        raise InputError("--gpus-per-worker and --cpus-per-worker: expected 0 or more")
    if options.address is None:  # else the files are the workers', who may be elsewhere
        check_task(options)
    queries = find_queries(options.queries)
    check_seed(options.seed, len(queries))
    outputs = output_names(queries, options.format)
    folder = place(options.output)
    files = _filesystem(folder)
    try:
        files.makedirs(_path(folder), exist_ok=True)
        there = {posixpath.basename(path) for path in files.ls(_path(folder), detail=False)}
    except OSError as error:
        raise InputError(f"{options.output}: cannot be written ({error.strerror or error})") from None
    known = {row["output"]: row for row in read_manifest(folder, there)}
    rows, missing = {}, []
    for i, (query, output) in enumerate(zip(queries, outputs, strict=True)):
        seed = known.get(output, {}).get("seed", options.seed + i)
        if output in there:
            done = {"query": query, "output": output, "seed": seed, "status": "done", "error": ""}
            rows[output] = known.get(output) or {**done, "seconds": 0.0, "batch": 0}
            rows[output]["status"], rows[output]["error"] = "done", ""
        else:
            missing.append({"query": query, "output": output, "seed": seed})
    began, passed = time.monotonic(), len(rows)
    if missing:
        with contextlib.redirect_stdout(sys.stderr):  # where what Ray says belongs
            for row in answered(missing, folder, options):
                rows[row["output"]] = row
                if time.monotonic() - began > REPORT_SECONDS and not (options.quiet or options.json):
                    began = time.monotonic()
                    print(f"{len(rows)} of {len(queries)}", flush=True)
        write_manifest(folder, [rows[output] for output in outputs if output in rows])
    failed = [row for row in rows.values() if row["status"] != "done"]
    lost = len(queries) - len(rows)
    if options.json:
        print_json(
            {"queries": len(queries), "done": len(rows) - len(failed), "there": passed, "failed": len(failed) + lost}
        )
    elif not options.quiet:
        for row in failed:
            print(f"{row['query']}: {row['error']}")
        print(f"{len(rows) - len(failed)} of {len(queries)} done, {passed} of them before; see {MANIFEST}")
    if lost:
        raise RuntimeError(f"{lost} queries came back from no worker; call again for them")


def check_task(options: argparse.Namespace) -> None:
    """Finds what is wrong with the checkpoint or the task before processes are started for them.

    Raises:
        InputError: what that is.
    """
    model = opened(find_model(options.checkpoint, options.revision, options.trust))
    if not isinstance(model, Artifact):
        model.read_header()
    if options.task.endswith(".safetensors"):
        EncodedContext.load(options.task)
    else:
        folder = contexts.find_task(options.task, template_roots(model))
        contexts.choose_pairs(contexts.read_template(folder), options.pairs, options.seed)


def find_queries(given: str) -> list[str]:
    """Addresses of pictures: of a folder, of a glob, or of a Parquet file's column `query`, `path` or its first.

    Raises:
        InputError: nothing there.
    """
    address = place(given)
    files, path = _filesystem(address), _path(address)
    try:
        if path.endswith(".parquet"):
            with files.open(path) as file:
                table = _read_table(file, given, "write it again")
            if not table.column_names:
                raise InputError(f"{given}: has no columns; expected one of addresses, named query or path")
            column = next((name for name in ("query", "path") if name in table.column_names), table.column_names[0])
            found = [str(value) for value in table[column].to_pylist()]
            base = posixpath.dirname(path)
            found = [name if "://" in name or name.startswith("/") else posixpath.join(base, name) for name in found]
            found = [name if "://" in name else files.unstrip_protocol(name) for name in found]
        elif any(sign in path for sign in "*?["):
            found = [files.unstrip_protocol(name) for name in files.glob(path) if files.isfile(name)]
        elif files.isdir(path):
            names = files.ls(path, detail=False)
            pictures = [name for name in names if Path(name).suffix.lower() in images.PICTURE_SUFFIXES]
            found = [files.unstrip_protocol(name) for name in pictures if posixpath.basename(name)[0] != "."]
        else:
            raise InputError(f"{given}: no such folder; expected one, a glob or a .parquet file of addresses")
    except (OSError, ImportError) as error:
        raise InputError(f"{given}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not found:
        raise InputError(f"{given}: no pictures there; expected at least one query")
    if path.endswith(".parquet"):
        return found
    return sorted(found, key=lambda name: images.natural_key(posixpath.basename(name)))


def output_names(queries: list[str], suffix: str) -> list[str]:
    """A file's name for every query.

    Raises:
        InputError: two that would be one.
    """
    names = [f"{posixpath.splitext(posixpath.basename(query))[0]}.{suffix}" for query in queries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two pictures would both be written to {twice}; rename a query or map them apart")
    return names


def answered(missing: list[dict[str, Any]], folder: str, options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Rows of the manifest as workers give them."""
    import ray

    if not ray.is_initialized():
        local = {} if options.address else {"num_cpus": max(2, round(options.workers * options.cpus_per_worker) + 1)}
        try:
            ray.init(address=options.address, include_dashboard=False, log_to_driver=False, logging_level=40, **local)
        except ConnectionError as error:
            raise InputError(f"--address {options.address}: no cluster there ({error})") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Small blocks, so that work is spread evenly and little is done again where a worker is lost.
    blocks = min(len(missing), max(options.workers * 4, -(-len(missing) // (4 * options.batch_size))))
    answers = ray.data.from_items(missing, override_num_blocks=blocks).map_batches(
        Worker,
        fn_constructor_args=(vars(options), folder),
        batch_size=options.batch_size,
        num_gpus=options.gpus_per_worker,
        num_cpus=options.cpus_per_worker,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
    )
    yield from answers.iter_rows()


class Worker:
    """A pipeline of a worker's own, which answers batches of rows and writes their pictures.

    Args:
        options: of the command line.
        folder: where pictures are written.
    """

    def __init__(self, options: dict[str, Any], folder: str):
        from lavin_rt.pipeline import Pipeline

        self.options, self.folder = argparse.Namespace(**options), folder
        pipeline = Pipeline.from_pretrained(self.options.checkpoint, **loading_options(self.options))
        settle_threads(self.options.threads, pipeline.network.config.hidden_size)
        size = None if self.options.size is None else images.parse_size(self.options.size)
        self.task = pipeline.task(self.options.task, pairs=self.options.pairs, size=size, seed=self.options.seed)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        done = self.answer([{key: _plain(value) for key, value in row.items()} for row in rows])
        return {column: [row[column] for row in done] for column in COLUMNS}

    def answer(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers what can be read together; what cannot says why."""
        from PIL import Image, UnidentifiedImageError

        files, began = _filesystem(self.folder), time.monotonic()
        clips, good = [], []
        for row in rows:
            row.update(status="done", error="", seconds=0.0, batch=0)
            if files.exists(self._output(row)):
                continue  # a lost worker had written it
            try:
                with Image.open(io.BytesIO(_filesystem(row["query"]).cat_file(_path(row["query"])))) as image:
                    clips.append(images.load_clip(image))
                good.append(row)
            except UnidentifiedImageError:
                row.update(status="failed", error="not a picture that can be read; expected PNG, JPEG, WebP, ...")
            except Exception as error:  # whatever a file system or a decoder raises is this one row's
                row.update(status="failed", error=one_line(error, 400))
        try:
            self._run(good, clips, files)
        except Exception:  # which row it was is found by running each alone; its error is written down there
            for row, clip in zip(good, clips, strict=True):
                try:
                    self._run([row], [clip], files)
                except Exception as error:
                    row.update(status="failed", error=one_line(error, 400))
        seconds = (time.monotonic() - began) / max(1, len(good))
        for row in good:
            row.update(seconds=round(seconds, 4), batch=len(good))
        return rows

    def _run(self, rows: list[dict[str, Any]], clips: list, files) -> None:
        from lavin_rt.serve.pictures import encode
        from lavin_rt.task import draw_noise

        if not rows:
            return
        options: dict[str, Any] = {"speed": self.options.speed}
        frames = images.latent_frames(self.task.context.frames_per_clip)
        if self.task.context.posterior == "sample" and len(rows) > 1:
            raise InputError("a context of the posterior's sample runs one by one")
        if self.task.context.posterior == "sample":
            options["seed"] = rows[0]["seed"]
        else:
            options["noise"] = draw_noise([row["seed"] for row in rows], frames, self.task.size)
        results = self.task.run(
            [clip.permute(0, 2, 3, 1).numpy() for clip in clips],
            steps=self.options.steps,
            guidance=self.options.guidance,
            keep_size=self.options.keep_size,
            **options,
        )
        for row, result in zip(rows, results, strict=True):
            _write_whole(files, self._output(row), encode(result.frames, KINDS[self.options.format]))

    def _output(self, row: dict[str, Any]) -> str:
        return posixpath.join(_path(self.folder), row["output"])


def read_manifest(folder: str, there: set[str]) -> list[dict[str, Any]]:
    """The rows of an earlier call, none where there is no manifest."""
    if MANIFEST not in there:
        return []
    where = f"{MANIFEST} in the output folder"
    try:
        with _filesystem(folder).open(posixpath.join(_path(folder), MANIFEST)) as file:
            table = _read_table(file, where, "move it away")
    except OSError as error:
        raise InputError(f"{where} cannot be read ({one_line(error)}); move it away") from None
    if not set(COLUMNS) <= set(table.column_names):
        raise InputError(f"{MANIFEST} in the output folder is of something else; give another folder")
    return table.select(list(COLUMNS)).to_pylist()


def _read_table(file: Any, name: str, remedy: str):
    """A Parquet file's table.

    Raises:
        InputError: it is none, or damaged; says the remedy.
    """
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file)
    # Its own kinds of errors, and plain ones for strings that are no text.
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{name}: is no sound Parquet file ({one_line(error, 200)}); {remedy}") from None


def write_manifest(folder: str, rows: list[dict[str, Any]]) -> None:
    """Writes one row for every query, whole."""
    import pyarrow
    import pyarrow.parquet

    kinds = (
        (pyarrow.string(),) * 2 + (pyarrow.int64(),) + (pyarrow.string(),) * 2 + (pyarrow.float64(), pyarrow.int64())
    )
    columns = [[_plain(row[column]) for row in rows] for column in COLUMNS]
    arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(COLUMNS, arrays, strict=True))), file)
    _write_whole(_filesystem(folder), posixpath.join(_path(folder), MANIFEST), file.getvalue())


def place(given: str) -> str:
    """An address: with a protocol as given, else of this machine, in full."""
    return given if "://" in given else f"file://{Path(given).absolute()}"


def _filesystem(address: str):
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)[0]
    except (ImportError, ValueError) as error:
        raise InputError(f"{address}: {one_line(error, 400)}") from None


def _path(address: str) -> str:
    import fsspec

    return fsspec.core.url_to_fs(address)[1]


def _write_whole(files, path: str, content: bytes) -> None:
    """Writes a file that appears complete or not at all; object stores do so by themselves."""
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(files, LocalFileSystem):
        from lavin_rt.files import written_whole

        with written_whole(path) as partial:
            partial.write_bytes(content)
    else:
        files.pipe_file(path, content)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
