"""From an ONNX file to a TensorRT plan, with TensorRT 10.15 or newer and with TensorRT 11.

All that differs between the two majors is in this file: precision flags exist in 10 only (nothing here uses them),
strong typing is a choice in 10 and the only way in 11 (its flag is set wherever it exists), and enum values were
renumbered (they are always taken from the module, by name).

Written against NVIDIA's Python bindings of TensorRT 10.16 and 11.4 and checked with them; the project has not yet built
an engine with the real libraries.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lavin_rt.artifact.tensorrt_library import create, make_logger, signals_noted
from lavin_rt.errors import InputError
from lavin_rt.files import written_whole

Bounds = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""Of every input with a shape that varies: its smallest, its tuned and its largest shape."""

# In the names of TensorRT's fused attention kernels and of such layers' type. Whatever else it tells of a layer repeats
# the names of the graph's nodes, which are attention's however they are computed.
FUSED_ATTENTION, OF_KERNEL = re.compile(r"mha|attention", re.IGNORECASE), ("TacticName", "LayerType")


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        optimization_level: 0 (quick) to 5 (slow build, fastest engine).
        workspace: most bytes of scratch memory for a layer; None leaves it to TensorRT.
        tf32: float32 matrix products may round their inputs to TF32.
        timing_cache: file that keeps the timings of kernels from one build to the next.
    """

    optimization_level: int = 4
    workspace: int | None = None
    tf32: bool = False
    timing_cache: Path | None = None

    def __post_init__(self):
        if not 0 <= self.optimization_level <= 5:
            raise InputError(f"optimization level is {self.optimization_level}; expected 0 to 5")
        if self.workspace is not None and self.workspace <= 0:
            raise InputError(f"workspace is {self.workspace} bytes; expected a positive number")


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What came out of a build.

    Attributes:
        seconds: of building, parsing included.
        plan_bytes: of the file.
        attention: `nodes`, how many attention operators the network holds, all marked decomposable, and `fused`, the
            engine's layers that run an attention kernel. Fewer of these than nodes: some run decomposed.
        layers: of the engine, after fusion.
        warnings: of parser and builder.
    """

    seconds: float
    plan_bytes: int
    attention: Mapping[str, int]
    layers: int
    warnings: tuple[str, ...]

    def as_dict(self) -> dict:
        return {**dataclasses.asdict(self), "seconds": round(self.seconds, 1), "warnings": list(self.warnings)}


def build_plan(
    trt: ModuleType,
    onnx_file: Path,
    plan_file: Path,
    profiles: Sequence[Bounds],
    options: BuildOptions,
    *,
    layer_file: Path | None = None,
    quiet: bool = False,
) -> BuildReport:
    """Builds the plan of an ONNX file on the current CUDA device.

    Args:
        trt: the module `tensorrt`.
        onnx_file: external data beside it; dtypes of the graph are those of the engine.
        plan_file: written whole.
        profiles: one set of shapes per optimisation profile.
        options: how to build.
        layer_file: JSON of the engine's layers, as its inspector tells them.
        quiet: no progress bars.

    Raises:
        InputError: the parser or a profile refuses something; one line with all reasons.
        RuntimeError: TensorRT cannot build the engine.
    """
    start = time.perf_counter()
    logger = make_logger(trt)
    builder = create(trt.Builder, logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    with signals_noted():
        # The form that takes a path finds external data beside the file, of any size.
        parsed = parser.parse_from_file(str(onnx_file))
    if not parsed:
        raise InputError(f"{onnx_file.name}: TensorRT cannot take the graph: {_parser_errors(parser)}")
    attention = _mark_attention_decomposable(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    for bounds in profiles:
        _add_profile(builder, config, bounds)
    cache = _timing_cache(config, options.timing_cache)
    with signals_noted() as noted:
        config.progress_monitor = progress_monitor(trt, plan_file.name, noted, quiet)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"{onnx_file.name}: TensorRT cannot build the engine: {'; '.join(logger.errors[-3:])}")
    # The parser and the cache own memory that the builder reads, so they must outlive the build.
    del parser, cache
    if options.timing_cache is not None:
        with written_whole(options.timing_cache) as path:
            path.write_bytes(config.get_timing_cache().serialize())
    with written_whole(plan_file) as path, path.open("wb") as file:
        file.write(plan)
    layers = layer_report(trt, plan, logger)
    if layer_file is not None:
        with written_whole(layer_file) as path:
            path.write_text(json.dumps(layers, indent=1) + "\n")
    told = [layer if isinstance(layer, dict) else {} for layer in layers["Layers"]]  # a mere name, in less detail
    kernels = [" ".join(str(layer.get(name)) for name in OF_KERNEL) for layer in told]
    return BuildReport(
        seconds=time.perf_counter() - start,
        plan_bytes=plan.nbytes,
        attention={"nodes": attention, "fused": sum(map(bool, map(FUSED_ATTENTION.search, kernels)))},
        layers=len(kernels),
        warnings=tuple(message for severity, message in logger.lines if severity == "warning"),
    )


def _network_flags(trt: ModuleType) -> int:
    """Strong typing, so that dtypes are the graph's. TensorRT 11 knows no other and keeps the flag for old code."""
    flag = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    return 0 if flag is None else 1 << int(flag)


def _parser_errors(parser: Any) -> str:
    """All errors of an ONNX parser in one line, each with its node."""
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f"{error.node_operator()} {error.node_name()}".strip()
        where = f"{node}: " if node else ""
        lines.append(f"{where}{' '.join(error.desc().split())} ({error.code().name})")
    return "; ".join(lines) or "it gave no reason"


def _mark_attention_decomposable(trt: ModuleType, network: Any) -> int:
    """Lets every attention operator be taken apart where TensorRT has no fused kernel; returns how many there are.

    The parser leaves them indivisible, and a build without a kernel for one of them would fail.
    """
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # `get_layer` returns the base class, whose instance is the layer all the same.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
            count += 1
    return count


def _configure(trt: ModuleType, config: Any, options: BuildOptions) -> None:
    tf32 = trt.BuilderFlag.TF32
    config.set_flag(tf32) if options.tf32 else config.clear_flag(tf32)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)


def _add_profile(builder: Any, config: Any, bounds: Bounds) -> None:
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in bounds.items():
        try:
            profile.set_shape(name, min=tuple(least), opt=tuple(best), max=tuple(most))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"profile {least} to {most} of {name}: TensorRT refuses it: {error}") from error
    if config.add_optimization_profile(profile) < 0:
        raise InputError(f"TensorRT refuses the profile {dict(bounds)}")


def _timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    held = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(held)
    # A cache of another GPU or version is not wrong to have: it is started afresh.
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def layer_report(trt: ModuleType, plan: Any, logger: Any) -> dict:
    """The engine's layers after fusion, as its inspector tells them: `{"Layers": [...], "Bindings": [...]}`."""
    runtime = create(trt.Runtime, logger)
    with signals_noted():
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(f"TensorRT cannot read the plan that it has just built: {logger.why}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    report = json.loads(text)
    report.setdefault("Layers", [])
    return report


def progress_monitor(trt: ModuleType, title: str, noted: Sequence[int], quiet: bool) -> Any:
    """Ends a build at its next step once a signal is `noted`; unless `quiet`, a bar for every phase, nested ones below.

    TensorRT calls from C++, which no exception may pass.
    """
    from tqdm import tqdm

    base: Any = trt.IProgressMonitor

    class Monitor(base):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.bars: dict[str, tqdm] = {}

        def phase_start(self, phase_name, parent_phase, num_steps):
            name = f"  {phase_name}" if parent_phase else f"{title}: {phase_name}"
            if not quiet:
                self.bars[phase_name] = tqdm(total=num_steps, desc=name, leave=False, disable=None, unit="step")

        def step_complete(self, phase_name, step):
            bar = self.bars.get(phase_name)
            if bar is not None:
                bar.update(step + 1 - bar.n)
            return not noted

        def phase_finish(self, phase_name):
            bar = self.bars.pop(phase_name, None)
            if bar is not None:
                bar.close()

    return Monitor()
