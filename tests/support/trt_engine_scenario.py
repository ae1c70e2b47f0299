"""A whole build and a whole run of our TensorRT code against the strict stand-in; seeded mistakes that it catches."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import types
import weakref
from pathlib import Path
from types import ModuleType

import torch

import lavin_export.to_tensorrt.build as trt_build
import lavin_rt.artifact.tensorrt as trt_session
from lavin_rt.artifact.tensorrt_library import create, make_logger
from lavin_rt.errors import InputError
from lavin_rt.process import terminating
from support import trt_bindings
from support.trt_host_cuda import Device, Stream, Torch, aligned
from support.trt_libraries import GRAPH, LAYERS, PLAN, Libraries
from support.trt_stand_in import StandIn

BOUNDS = {"latents": ((1, 3), (2, 3), (4, 3))}
EVERYTHING = {"tf32": True, "workspace": 1 << 30}
# (module, text of ours, mistake): each must be refused by both versions.
MISTAKES = [
    (trt_build, "set_memory_pool_limit", "set_max_workspace_size"),
    (trt_build, "ignore_mismatch=False", "ignore_mismatches=False"),
    (trt_build, "min=tuple(least)", "minimum=tuple(least)"),
    (trt_build, "opt=tuple(best)", "opt=str(best)"),
    (trt_build, "config.builder_optimization_level", "config.optimization_level"),
    (trt_build, ".IAttentionInputLayer", ".IAttention"),
    (trt_build, "parse_from_file(str(onnx_file))", "parse_from_file(onnx_file)"),
    (trt_build, "builder.create_network(_network_flags(trt))", "builder.create_network(flag=1)"),
    (trt_build, "get_engine_information(trt.LayerInformationFormat.JSON)", 'get_engine_information("JSON")'),
    (trt_build, "        plan = builder.build", "        del parser\n        plan = builder.build"),
    (
        trt_build,
        "    cache = _timing_cache(config, options.timing_cache)",
        "    _timing_cache(config, options.timing_cache)\n    cache = None",
    ),
    (trt_session, "execute_async_v3(stream_handle=stream.cuda_stream)", "execute_async_v2([0], stream.cuda_stream)"),
    (trt_session, "ExecutionContextAllocationStrategy.USER_MANAGED", "ExecutionContextAllocationStrategy.USER"),
    (trt_session, "context.set_device_memory(memory.data_ptr(), size)", "context.set_device_memory(memory, size)"),
    (trt_session, "self.engine.get_tensor_profile_shape(name, index)", "self.engine.get_profile_shape(index, name)"),
    (trt_session, "value.is_contiguous() and value.data_ptr() % ALIGNMENT == 0", "True"),
]
# Fine in one version, a mistake in the other.
VERSIONED = [
    (
        trt_build,
        "    config.profiling_verbosity =",
        "    config.clear_flag(trt.BuilderFlag.FP16)\n    config.profiling_verbosity =",
        10,
    ),
    (
        trt_build,
        "    config.profiling_verbosity =",
        "    config.build_route = ''\n    config.profiling_verbosity =",
        11,
    ),
]


def scenario(trt: ModuleType) -> dict:
    classes = trt_bindings.dump(trt)
    major = int(trt.__version__.split(".")[0])
    whole(trt, classes, trt_build, trt_session)
    builds(trt, classes)
    sessions(trt, classes)
    # The bindings themselves, whose stand-in libraries make nothing: no GPU, no builder.
    for kind in (trt.Builder, trt.Runtime):
        assert "cannot start: " in failure(RuntimeError, create, kind, make_logger(trt))
    for module, text, mistake in MISTAKES:
        try_mistake(trt, classes, module, text, mistake)
    for module, text, mistake, fine_in in VERSIONED:
        try_mistake(trt, classes, module, text, mistake, expected=major != fine_in)
    return {"version": trt.__version__, "classes": len(classes)}


def try_mistake(trt, classes, module, text, mistake, expected=True) -> None:
    """A whole build and run with a mistake in one of our modules, which must not pass in silence."""
    source = Path(module.__file__).read_text()
    assert text in source, text
    broken = types.ModuleType(module.__name__)
    broken.__file__ = module.__file__
    sys.modules[broken.__name__], kept = broken, sys.modules[module.__name__]
    try:
        exec(compile(source.replace(text, mistake), module.__file__, "exec"), broken.__dict__)
        pair = {trt_build: (broken, trt_session), trt_session: (trt_build, broken)}[module]
        whole(trt, classes, *pair)
    except (AttributeError, TypeError, AssertionError, NameError, KeyError) as error:
        assert expected, f"{mistake}: {error}"
    else:
        assert not expected, f"{mistake} was accepted"
    finally:
        sys.modules[module.__name__] = kept


def whole(trt: ModuleType, classes: dict, build_module: ModuleType, session_module: ModuleType) -> None:
    """Builds with every option there is, then loads and runs."""
    libraries = Libraries(trt)
    stand_in = StandIn(trt, classes, libraries.script())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "denoiser.onnx").write_bytes(GRAPH)
        options = build_module.BuildOptions(**EVERYTHING, timing_cache=folder / "timing")
        (folder / "timing").write_bytes(b"timings")
        report = build_module.build_plan(
            stand_in,
            folder / "denoiser.onnx",
            folder / "denoiser.plan",
            [BOUNDS, {"latents": ((2, 3), (4, 3), (8, 3))}],
            options,
            layer_file=folder / "layers.json",
        )
        assert libraries.network_flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert [attention.decomposable for attention in libraries.attention] == [True, True]
        assert libraries.flags == {trt.BuilderFlag.TF32}
        assert libraries.profiles[0] == BOUNDS and len(libraries.profiles) == 2
        assert libraries.config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
        assert (folder / "timing").read_bytes() == b"timings and more"
        assert (folder / "denoiser.plan").read_bytes() == PLAN
        assert json.loads((folder / "layers.json").read_text()) == LAYERS
        assert report.attention == {"nodes": 2, "fused": 1} and report.layers == 5
        assert report.plan_bytes == len(PLAN)
        session_module.import_tensorrt = lambda purpose: stand_in
        session_module.torch = Torch()
        session = session_module.TensorRTSession(folder, PART, a_manifest(trt), Device())
        runs(session, session_module, libraries)


PART = {
    "file": "denoiser.plan",
    "weights": [],
    "inputs": [
        {"name": "latents", "dtype": "float32", "shape": ["batch", 3]},
        {"name": "scale", "dtype": "float32", "shape": [3]},
    ],
    "outputs": [{"name": "velocity", "dtype": "float32", "shape": ["batch", 3]}],
}


def a_manifest(trt: ModuleType, version: str = "") -> types.SimpleNamespace:
    return types.SimpleNamespace(versions={"tensorrt": version or trt.__version__}, check_device=lambda device: None)


def runs(session, session_module, libraries: Libraries) -> None:
    scale = aligned(torch.tensor([1.0, 2.0, -3.0]))
    for rows, profile in ((1, 0), (2, 0), (3, 1), (8, 1)):
        latents = torch.randn(rows, 3)
        (velocity,) = session(aligned(latents), scale)
        assert torch.equal(velocity, latents * scale)
        assert libraries.contexts[-1].state["profile"] == profile
    # Unaligned rows of a table and a strided matrix are copied.
    table = aligned(torch.randn(4, 3))
    latents = aligned(torch.randn(3, 2)).T
    (velocity,) = session(latents, table[1])
    assert torch.equal(velocity, latents * table[1])
    assert len(libraries.contexts) == 4, "shapes seen before take their context again"
    assert set(libraries.streams) == {7}
    # The default stream is left alone, and joined.
    cuda = session_module.torch.cuda
    cuda.current = cuda.default
    session(latents, scale)
    own = session._own_stream()
    assert libraries.streams[-1] == 99 and own.waits[-1] is cuda.default and cuda.default.waits == [own]
    cuda.current = Stream(handle=7)


def builds(trt: ModuleType, classes: dict) -> None:
    """Builds that go wrong, and the options that leave something out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx, plan = folder / "denoiser.onnx", folder / "denoiser.plan"
        onnx.write_bytes(GRAPH)

        def build(fault: str = "", quiet: bool = True, **options) -> Libraries:
            libraries = Libraries(trt, fault)
            stand_in = StandIn(trt, classes, libraries.script())
            chosen = trt_build.BuildOptions(**options)
            trt_build.build_plan(stand_in, onnx, plan, [BOUNDS], chosen, quiet=quiet)
            return libraries

        message = failure(InputError, build, "parse")
        reason = "Frobnicate node_7: No importer registered for op (UNSUPPORTED_NODE)"
        assert message == f"denoiser.onnx: TensorRT cannot take the graph: {reason}; {reason}", message
        assert "refuses the profile" in failure(InputError, build, "profile")
        message = failure(RuntimeError, build, "build")
        assert message == "denoiser.onnx: TensorRT cannot build the engine: no tactic for node_7", message
        # Signals end a build at its next step, in silence or not, and then mean what they did before. What runs in the
        # background would ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fault in ("SIGINT", "SIGTERM"):
            for quiet in (True, False):
                with terminating():
                    message = failure(KeyboardInterrupt, build, fault, quiet)
                assert ("SIGTERM" in message) == (fault == "SIGTERM"), message
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        assert not plan.exists()
        libraries = build()
        assert not libraries.flags and libraries.network_flags == 1 << int(
            trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        )
        assert plan.read_bytes() == PLAN
        assert build(tf32=True).flags == {trt.BuilderFlag.TF32}
        # A timing cache of another GPU is replaced.
        (folder / "timing").write_bytes(b"of another GPU")
        build(timing_cache=folder / "timing")
        assert (folder / "timing").read_bytes() == b" and more"


def sessions(trt: ModuleType, classes: dict) -> None:
    """What a session refuses, and captures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "denoiser.plan").write_bytes(PLAN)

        def load(fault: str = "", manifest=None, part=PART):
            libraries = Libraries(trt, fault)
            stand_in = StandIn(trt, classes, libraries.script())
            trt_session.import_tensorrt = lambda purpose: stand_in
            trt_session.torch = Torch()
            return trt_session.TensorRTSession(folder, part, manifest or a_manifest(trt), Device()), libraries

        session, libraries = load()
        runs(session, trt_session, libraries)
        message = failure(InputError, session, aligned(torch.ones(9, 3)), aligned(torch.ones(3)))
        assert message == (
            "denoiser.plan has no profile for latents [9, 3]; it has latents [1, 3] to [2, 3]; latents [2, 3] to "
            "[8, 3]; export one that covers it"
        ), message
        assert "has dtype" in failure(TypeError, session, aligned(torch.ones(2, 3).double()), torch.ones(3))
        assert "dimensions" in failure(ValueError, session, torch.ones(3), torch.ones(3))
        assert "on meta" in failure(ValueError, session, torch.ones(2, 3, device="meta"), torch.ones(3))
        # Captured shapes stay; others go when there are many.
        cuda = trt_session.torch.cuda
        cuda.capturing = True
        scale = aligned(torch.ones(3))
        session(aligned(torch.ones(1, 3)), scale)
        assert "before capturing" in failure(RuntimeError, session, aligned(torch.ones(4, 3)), scale)
        cuda.capturing = False
        trt_session.SHAPES_HELD, kept = 3, trt_session.SHAPES_HELD
        for rows in range(2, 9):
            session(aligned(torch.ones(rows, 3)), scale)
        trt_session.SHAPES_HELD = kept
        held = [shapes[0][0] for shapes in session._bound]
        assert held == [1, 6, 7, 8], held
        # Those of a caller that knows how long its graphs live go with it, captured or not, once they are idle.
        calls = session.calls()
        calls(aligned(torch.ones(1, 3)), scale), calls(aligned(torch.ones(2, 3)), scale)
        cuda.capturing = True
        calls(aligned(torch.ones(1, 3)), scale)
        assert "before capturing" in failure(RuntimeError, calls, aligned(torch.ones(4, 3)), scale)
        cuda.capturing = False
        contexts = [weakref.ref(bound) for bound in calls._bound.values()]
        assert len(contexts) == 2 and all(one() is not None for one in contexts)
        cuda, waited = trt_session.torch.cuda, trt_session.torch.cuda.synchronized
        del calls
        assert cuda.synchronized == waited + 1 and not any(one() for one in contexts)
        assert [shapes[0][0] for shapes in session._bound] == held
        session, libraries = load("run")
        message = failure(RuntimeError, session, aligned(torch.ones(1, 3)), scale)
        assert message == "denoiser.plan: TensorRT failed: illegal address", message
        # Another version, another file, other tensors.
        message = failure(InputError, load, manifest=a_manifest(trt, "9.3.0"))
        assert "built with TensorRT 9.3.0" in message and trt.__version__ in message
        assert "of unknown version" in failure(InputError, load, manifest=a_manifest(trt, "?"))
        older = ".".join([*trt.__version__.split(".")[:1], "0", "0"])
        failure(InputError, load, manifest=a_manifest(trt, older))
        other = {**PART, "outputs": [{**PART["outputs"][0], "name": "noise"}]}
        assert "its manifest says ['noise']" in failure(InputError, load, part=other)
        other = {**PART, "outputs": [{**PART["outputs"][0], "dtype": "float16"}]}
        assert "velocity is torch.float32; its manifest says float16" in failure(InputError, load, part=other)
        (folder / "denoiser.plan").write_bytes(PLAN[:3])
        message = failure(InputError, load)
        assert message == "denoiser.plan: TensorRT cannot read the plan: magic tag does not match; export it again"
        (folder / "denoiser.plan").write_bytes(b"")
        assert failure(InputError, load) == "denoiser.plan is empty; export it again"


def failure(kind: type[BaseException], function, *arguments, **keywords) -> str:
    """The message, one line, of the error that a call must raise."""
    try:
        function(*arguments, **keywords)
    except kind as error:
        message = str(error)
        assert "\n" not in message, message
        return message
    raise AssertionError(f"no {kind.__name__}")
