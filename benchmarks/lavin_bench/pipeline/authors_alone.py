"""How fast the authors' way is by itself: `python -m lavin_bench.pipeline.authors_alone`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lavin_bench.pipeline.authors_way import AuthorsWay
from lavin_bench.programs import at_least, multiple_of, program


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what the authors' way reaches, so that everyone can see that it is no straw man."""
    from lavin_bench.ceilings import matmul_ceiling
    from lavin_bench.pipeline.variants import CPU_CONFIG, RELEASED, Setting, random_model
    from lavin_bench.timing import header, header_line, measure
    from lavin_rt.devices import resolve_device, resolve_dtype

    parser = argparse.ArgumentParser(prog="lavin_bench.pipeline.authors_alone", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--size", type=int, help="pixels a side (default: 512 on CUDA, 128 on a CPU)")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    options.size = (512 if device.type == "cuda" else 128) if options.size is None else options.size
    at_least(options, pairs=1, repeats=1)
    multiple_of(options, 16)
    setting = Setting(options.size, options.pairs, RELEASED if device.type == "cuda" else CPU_CONFIG)
    dit = random_model(setting.config, device, dtype)
    cond, noise = setting.latents(device)
    way = AuthorsWay(dit, compile=not options.eager)
    timing = measure({"way": lambda: way.sample(cond, noise)}, options.repeats, device=device)["way"]
    rate = (len(way.knots) - 1) * setting.useful_flops / timing.median
    ceiling = matmul_ceiling(device, dtype)["flops_per_second"]
    print(header_line(header(device)))
    print(f"{setting.name}, {dtype}, {'eager' if options.eager else f'compiled, mode {way.mode}'}")
    for length, choice in way.attention.items():
        print(f"attention over {length} tokens: {choice.name}")
    print(
        f"one sampling of {len(way.knots) - 1} evaluations {timing.median:.3f} s ({timing.low:.3f}-{timing.high:.3f}), "
        f"{setting.useful_flops / 1e12:.3g} TFLOP a step, {rate / 1e12:.3g} useful TFLOP/s, {rate / ceiling:.0%} of "
        "the matmul ceiling"
    )


if __name__ == "__main__":
    sys.exit(main())
