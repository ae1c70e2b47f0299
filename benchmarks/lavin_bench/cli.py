"""`lavin-rt bench`: its options, and the way to the modules that measure, which are imported when one is asked for."""

from __future__ import annotations

from lavin_rt.cli.options import COMPILE_HELP, IMPLS, SPEEDS, Parser, add_checkpoint, add_checkpoint_options, add_device


def add_bench(commands) -> None:
    """Adds `bench` to the command line's sub-commands; imports nothing heavy."""
    bench = commands.add_parser("bench", help="measure this machine", description="Measures this machine.")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    kernels = kinds.add_parser(
        "kernels",
        help="every operator at the model's shapes, against the best that PyTorch has",
        description="Checks every operator's result, then times it at the model's shapes, beside PyTorch's own.",
    )
    kernels.add_argument("--operator", default="", help="only operators whose name contains this")
    kernels.add_argument(
        "--full",
        action="store_true",
        help="all sizes and pairs, with and without the null branch; on a CPU the released widths at 256 px",
    )
    add_device(kernels)
    kernels.add_argument("--repeats", type=int, default=15, help="samples per variant (default: 15)")
    kernels.add_argument("--json", metavar="FILE", help="write the figures to this file")
    kernels.add_argument(
        "--static", action="store_true", help="no timing: compile for all targets without a GPU, and check the results"
    )
    kernels.set_defaults(run="lavin_bench.kernels.bench:bench_kernels")
    tune = kinds.add_parser(
        "tune",
        help="find the best kernel launches of the GPU at hand",
        description="Times every kernel's launch candidates on the GPU at hand and writes the device's file.",
    )
    tune.add_argument("--operator", default="", help="only operators whose name contains this")
    tune.add_argument("--device", default="auto", help="auto, cuda, cuda:1, ... (default: auto)")
    tune.add_argument("--repeats", type=int, default=15, help="samples per candidate (default: 15)")
    tune.add_argument(
        "-o", "--output", metavar="FILE", help="file to write (default: the installed package's, per device)"
    )
    tune.add_argument("--json", metavar="FILE", help="write all times to this file")
    tune.set_defaults(run="lavin_bench.kernels.tune:bench_tune")
    pipeline = kinds.add_parser(
        "pipeline",
        help="whole samplings and whole calls, beside the way the authors run the model",
        description="Measures samplings from the authors' way to the fastest one, every variant one switch more.",
    )
    pipeline.add_argument("--size", type=int, nargs="+", default=[], help="pixels (default: 256 512; on a CPU 128)")
    pipeline.add_argument("--pairs", type=int, nargs="+", default=[], help="pairs (default: 1 4 8; on a CPU 4)")
    add_device(pipeline)
    pipeline.add_argument("--repeats", type=int, help="samples per variant (default: 7)")
    pipeline.add_argument(
        "--error-steps", type=int, default=20, help="knots of the samplings that errors are taken of (default: 20)"
    )
    pipeline.add_argument(
        "--full", action="store_true", help="on a CPU the released widths, two blocks, 256 px: samplings of three steps"
    )
    pipeline.add_argument(
        "--quick", action="store_true", help="a tiny model and picture, once: shows that it works, not how fast"
    )
    pipeline.add_argument(
        "-o", "--output", metavar="FILE", help="write the figures to this JSON file and the waterfall beside it as SVG"
    )
    pipeline.set_defaults(run="lavin_bench.pipeline.bench:bench_pipeline")
    startup = kinds.add_parser(
        "startup",
        help="from the start of a process to its first picture, part by part",
        description="Starts fresh processes and times them from the start to the first picture, cold and warm.",
    )
    startup.add_argument(
        "--checkpoint", help="folder, archive, hub id or artifact (default: a random one, made for this)"
    )
    startup.add_argument(
        "--model",
        default="auto",
        choices=("auto", "small", "released"),
        help="which random one (default: auto, which is released on CUDA)",
    )
    startup.add_argument("--size", type=int, help="pixels (default: 512; for the small model 128)")
    startup.add_argument("--pairs", type=int, default=4, help="pairs of the context (default: 4)")
    add_device(startup)
    startup.add_argument("--impl", default="auto", choices=IMPLS, help="what computes (default: auto)")
    startup.add_argument("--compile", action="store_true", help=COMPILE_HELP)
    startup.add_argument("-o", "--output", metavar="FILE", help="write the figures to this JSON file")
    startup.set_defaults(run="lavin_bench.pipeline.startup:bench_startup")
    _add_bench_speeds(kinds)
    _add_bench_engines(kinds)
    _add_bench_quality(kinds)
    _add_bench_serve(kinds)


def _add_bench_speeds(kinds) -> None:
    speeds = kinds.add_parser(
        "speeds",
        help="the named speeds at the released widths: samplings and whole calls, in turn",
        description="Answers a task's second query at every speed, by a model of the released widths, random weights.",
    )
    speeds.add_argument("--speed", nargs="+", choices=SPEEDS, default=list(SPEEDS), help="which (default: all)")
    speeds.add_argument("--blocks", type=int, default=4, help="of the released model's 22 (default: 4)")
    speeds.add_argument("--size", type=int, default=256, help="pixels (default: 256)")
    speeds.add_argument("--pairs", type=int, default=4, help="pairs of the context (default: 4)")
    add_device(speeds)
    speeds.add_argument("--compile", action="store_true", help=COMPILE_HELP)
    speeds.add_argument("--repeats", type=int, default=3, help="calls per speed (default: 3)")
    speeds.add_argument("--quick", action="store_true", help="a tiny model, once: shows that it works, not how fast")
    speeds.add_argument("-o", "--output", metavar="FILE", help="write the figures to this JSON file")
    speeds.set_defaults(run="lavin_bench.pipeline.speeds:bench_speeds")


def _add_bench_engines(kinds) -> None:
    engines = kinds.add_parser(
        "engines",
        help="one model by every engine of a CPU: export, size, first picture, single calls",
        description="Runs a small model of random weights by every engine that a CPU has, in float32.",
    )
    engines.add_argument("--engine", default="", help="only engines whose name contains this, and the packed step")
    engines.add_argument("--native", metavar="PROGRAM", help="the native runner, as built (default: left out)")
    engines.add_argument("--repeats", type=int, default=20, help="calls per engine (default: 20)")
    engines.add_argument("--threads", type=int, help="of a CPU (default: as many as PyTorch takes)")
    engines.add_argument("--quick", action="store_true", help="a tiny model: shows that it works, not how fast")
    engines.add_argument("-o", "--output", metavar="FILE", help="write the figures to this JSON file")
    engines.set_defaults(run="lavin_bench.engines:bench_engines")


def _add_bench_quality(kinds) -> None:
    quality = kinds.add_parser(
        "quality",
        help="how well a pipeline does the tasks of lavin-mini, on held-out scenes",
        description="Measures answers to held-out queries of lavin-mini's tasks, beside what needs no model.",
    )
    add_checkpoint(quality)
    quality.add_argument(
        "--against",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="also run a checkpoint (default: the same) in float32 and print the differences to it",
    )
    quality.add_argument(
        "--speed",
        nargs="+",
        choices=SPEEDS[1:],
        help="instead hold these speeds against exact: measures, distance to the exact answer, "
        "FLOPs and seconds of every task",
    )
    quality.add_argument(
        "--task",
        metavar="DIR|NAME",
        help="with --speed: a folder of your own pairs instead of lavin-mini's tasks; each pair in turn is the query, "
        "others its context",
    )
    quality.add_argument("--tasks", nargs="+", metavar="TASK", help="by their full names (default: all)")
    quality.add_argument("--scenes", type=int, help="held-out queries a task (default: 64)")
    quality.add_argument("--pairs", type=int, nargs="+", help="of a context (default: 1 2 4)")
    quality.add_argument("--size", type=int, help="pixels (default: the checkpoint's own)")
    quality.add_argument("--steps", type=int, default=20, help="knots of the schedule (default: 20)")
    quality.add_argument("--guidance", type=float, default=1.5, help="guidance scale (default: 1.5)")
    quality.add_argument("--seed", type=int, default=0, help="of degradations, contexts and noise (default: 0)")
    quality.add_argument("--batch-size", type=int, default=8, help="queries that run together at most (default: 8)")
    quality.add_argument("--compile", action="store_true", help=COMPILE_HELP)
    quality.add_argument("--quick", action="store_true", help="4 scenes and 2 pairs: shows that it works, not how well")
    quality.add_argument(
        "-o", "--output", metavar="FILE", help="write the figures to this JSON file and sheets of pictures beside it"
    )
    add_checkpoint_options(quality)
    quality.set_defaults(run="lavin_bench.quality.command:bench_quality")


def _add_bench_serve(kinds) -> None:
    load = kinds.add_parser(
        "serve",
        help="a service under many clients: what batches gain, right answers, memory",
        description="Starts a service of the small model on this machine's CPU and asks by one client and by many.",
    )
    load.add_argument("--clients", type=int, default=32, help="at once (default: 32)")
    load.add_argument("--requests", type=int, default=200, help="in all; 0 for --memory alone (default: 200)")
    load.add_argument("--alone", type=int, default=40, help="of them, also asked by one client (default: 40)")
    load.add_argument("--steps", type=int, default=20, help="knots of the schedule (default: 20)")
    load.add_argument("--check", type=int, default=200, help="answers held against the pipeline's (default: 200)")
    load.add_argument("--memory", type=int, default=1000, help="more requests, for memory; 0 none (default: 1000)")
    load.add_argument("-o", "--output", metavar="FILE", help="write the figures to this JSON file")
    load.set_defaults(run="lavin_bench.serve_load:bench_serve")
