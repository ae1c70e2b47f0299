"""The command line of `serve`, `map` and `task`; imports nothing that takes time."""

from __future__ import annotations

from lavin_rt.cli.options import (
    SPEEDS,
    Parser,
    add_checkpoint,
    add_checkpoint_options,
    add_record_options,
    add_sampling_options,
    add_size,
)


def add_serve(commands) -> None:
    serve = commands.add_parser(
        "serve",
        help="answer requests of many clients, with a page to try it",
        description="Serves a page and an HTTP interface; needs pip install 'lavin-rt[serve]'.",
        epilog="example: lavin-rt serve --checkpoint weights/ --port 8000",
    )
    add_checkpoint(serve)
    serve.add_argument(
        "--tasks", nargs="+", default=[], metavar="PACK|DIR", help="more tasks: packs or template folders"
    )
    where = serve.add_argument_group("where and for whom")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    where.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    where.add_argument("--token-file", metavar="FILE", help="demand the token in this file, of the page too")
    where.add_argument("--no-token", action="store_true", help="demand none, even of clients on other machines")
    where.add_argument("--no-page", action="store_true", help="the HTTP interface alone")
    bounds = serve.add_argument_group("bounds")
    bounds.add_argument("--queue", type=int, default=64, help="requests that may wait (default: 64)")
    bounds.add_argument("--batch-size", type=int, default=8, help="requests that run together at most (default: 8)")
    bounds.add_argument("--grace", type=float, default=30.0, help="seconds for what runs, on TERM (default: 30)")
    bounds.add_argument("--max-upload", type=int, default=64, help="MiB of a request's body (default: 64)")
    bounds.add_argument("--max-pixels", type=int, default=32_000_000, help="of a picture or clip (default: 32000000)")
    bounds.add_argument("--max-pairs", type=int, default=16, help="of a task (default: 16)")
    bounds.add_argument(
        "--max-size", type=int, default=1024, help="pixels a side that the model works on (default: 1024)"
    )
    bounds.add_argument("--max-tasks", type=int, default=64, help="that clients may make (default: 64)")
    bounds.add_argument("--task-age", type=float, default=3600.0, help="seconds they are kept unused (default: 3600)")
    serve.add_argument("--speed", default="exact", choices=SPEEDS, help="of requests that name none (default: exact)")
    serve.add_argument("--compile", action="store_true", help="run the network through torch.compile, at a wait first")
    add_checkpoint_options(serve)
    serve.set_defaults(run="lavin_rt.serve.command:serve", lasting=True)  # outlives what else runs


def add_map(commands) -> None:
    fleet = commands.add_parser(
        "map",
        help="answer a folder of queries with many workers, on Ray",
        description="Answers every query with one task, on Ray Data; a second call does what is missing. "
        "Needs pip install 'lavin-rt[ray]'.",
        epilog="example: lavin-rt map --task depth --queries photos/ -o depth/ --workers 8 --gpus-per-worker 1",
    )
    fleet.add_argument("--task", required=True, metavar="DIR|NAME|FILE", help="as lavin-rt run takes it")
    fleet.add_argument(
        "--queries", required=True, metavar="FOLDER|GLOB|PARQUET", help="pictures, here or at an address fsspec knows"
    )
    fleet.add_argument("-o", "--output", required=True, metavar="FOLDER", help="for pictures and manifest.parquet")
    add_checkpoint(fleet)
    how = fleet.add_argument_group("how to do it")
    add_sampling_options(how)
    how.add_argument("--format", default="png", choices=("png", "webp", "jpg"), help="of the pictures (default: png)")
    machines = fleet.add_argument_group("workers")
    machines.add_argument("--workers", type=int, default=1, help="pipelines at work (default: 1)")
    machines.add_argument("--gpus-per-worker", type=float, default=0.0, help="GPUs of each (default: 0)")
    machines.add_argument("--cpus-per-worker", type=float, default=1.0, help="CPU cores of each (default: 1)")
    machines.add_argument("--batch-size", type=int, default=4, help="queries a worker runs together (default: 4)")
    machines.add_argument("--address", help="of a Ray cluster, auto for the one at hand (default: this machine alone)")
    add_record_options(fleet)
    add_checkpoint_options(fleet)
    fleet.set_defaults(run="lavin_rt.serve.fleet:run_map")


def add_task(commands) -> None:
    task = commands.add_parser(
        "task", help="keep a task in one file, or look into one", description="Task packs: a task in one file."
    )
    kinds = task.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    add = kinds.add_parser(
        "add",
        help="encode pairs into a task pack",
        description="Encodes a task's pairs into one file, which run, serve and map take.",
        epilog="example: lavin-rt task add mypairs/ -o mytask.safetensors --words 'finds cracks'",
    )
    add.add_argument(
        "pairs_from",
        nargs="+",
        metavar="DIR|NAME|PICTURE",
        help="a folder of *_input and *_target pictures, a task's name, or pictures: input target input target ...",
    )
    add.add_argument("-o", "--output", required=True, metavar="FILE", help="ending in .safetensors")
    add.add_argument("--name", help="of the task (default: the file's)")
    add.add_argument("--words", default="", help="what it does, for people")
    add.add_argument("--pairs", type=int, help="chosen from a folder (default: up to 8 of those there are)")
    add_size(add)
    add.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    add.add_argument(
        "--keep-keys", action="store_true", help="also keep the pairs' keys and values, for --speed fastest"
    )
    add_checkpoint(add)
    add_checkpoint_options(add)
    add.set_defaults(run="lavin_rt.cli.task:add")
    show = kinds.add_parser("show", help="what is in a task pack", description="Says what is in a task pack.")
    show.add_argument("pack", metavar="FILE", help="a task pack or an encoded context")
    show.add_argument("-o", "--output", metavar="PICTURE", help="also write its pairs as a sheet")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run="lavin_rt.cli.task:show")
