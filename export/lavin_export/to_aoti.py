"""Checkpoint to AOTInductor artifact: `.pt2` packages of compiled code, the weights apart in safetensors files."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavin_export.networks import denoiser as denoiser_part
from lavin_export.networks import kept_denoiser
from lavin_export.networks import vae as vae_parts
from lavin_export.options import common_options
from lavin_export.verify.artifact import verify_written
from lavin_export.writer import ArtifactWriter, Speeds, writing
from lavin_rt.artifact.aoti import CPU_LEVELS, PERMUTED, read_weights
from lavin_rt.artifact.manifest import KEPT
from lavin_rt.artifact.parts import Ranges, Record, Target, TensorSpec
from lavin_rt.artifact.speeds import named_speeds
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.load import load_dit
from lavin_rt.checkpoint.tensors import write_safetensors
from lavin_rt.compiling import compiling
from lavin_rt.devices import resolve_device, resolve_dtype
from lavin_rt.dit.packed import resolve_impl
from lavin_rt.errors import InputError
from lavin_rt.find.model import find_checkpoint

# Compiler's options by what `--cpu` says: vector bits and architecture; None is the machine's own.
CPUS: dict[str, tuple[int | None, str | None]] = {
    "native": (None, None),
    "avx512": (512, "x86-64-v4"),
    "avx2": (256, "x86-64-v3"),
}
# (batch, target frames, condition frames, height, width). The compiler decides by these what is worth two threads.
EXAMPLE = (2, 2, 9, 16, 24)


def export_aoti(
    checkpoint: Checkpoint,
    output: str | os.PathLike,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    steps: Sequence[int] = (20,),
    speeds: Speeds = (),
    clip_frames: Sequence[int] = (),
    cpu: str = "native",
    templates: bool = True,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Compiles a checkpoint ahead of time and verifies what came out.

    Every part takes batches, frame counts and sizes other than those that it was traced with. On a CPU the denoiser is
    plain torch calls; its matrices are kept with the inner dimension first, in which order MKL multiplies few rows
    (the target's) up to 1.5x as fast. On CUDA the Triton kernels are inside. Compiling takes about a minute a part.

    Args:
        checkpoint: what `find_checkpoint` found.
        output: the artifact's folder; must not exist, or be empty.
        device: "auto", "cpu", or a CUDA device of the kind that it shall run on.
        dtype: that the networks compute in; "auto" as in `resolve_dtype`, but float32 for a CPU: the one that runs it
            may be another.
        steps: schedules to tabulate the modulation of.
        speeds: that it shall serve besides `exact`; see `lavin_export.writer.writing`.
        clip_frames: frame counts `1 + 4 k` of clips to compile the VAE for, besides pictures.
        cpu: "native" (this machine's processor), "avx512" or "avx2" (any x86-64 processor with these).
        templates: copy the checkpoint's templates.
        verify: run the parts against the plain model; an artifact that fails leaves nothing behind.
        progress: `(parts done, parts in all)`.

    Returns:
        the artifact's folder.

    Raises:
        InputError: what of these cannot be used, or no C++ compiler.
        VerificationError: a result beyond its error budget.
    """
    device = resolve_device(device)
    dtype = resolve_dtype("float32" if dtype == "auto" and device.type == "cpu" else dtype, device)
    if cpu not in CPUS:
        raise InputError(f"cpu is {cpu!r}; expected one of {', '.join(CPUS)}")
    if cpu != "native" and platform.machine() != "x86_64":
        raise InputError(f"cpu is {cpu!r}, this is an {platform.machine()} machine; use native")
    keeping = [name for name, speed in named_speeds(speeds).items() if speed.keeps]
    if keeping and device.type != "cpu":
        raise InputError(
            f"speed {keeping[0]} keeps keys and values of the context, which aoti artifacts for {device.type} do not: "
            "leave it out, or export for --device cpu"
        )
    lengths = vae_parts.clip_lengths(clip_frames)
    target: Target = {"device": device.type, "compute_capability": None}
    if device.type == "cuda":
        target["compute_capability"] = list(torch.cuda.get_device_capability(device))
    options: Record = {"cpu": cpu, "clip_frames": list(clip_frames)}
    with writing(output, "aoti", checkpoint, dtype, target, options, steps, templates, speeds) as artifact:
        parts: list[Callable[[], None]] = [lambda: compile_denoiser(artifact, device, cpu)]
        parts += [
            partial(compile_vae, artifact, part, frames, device, cpu)
            for frames in lengths
            for part in ("encoder", "decoder")
        ]
        for done, compile_part in enumerate(parts):
            if progress is not None:
                progress(done, len(parts))
            compile_part()
        artifact.write_modulation()
        if verify:
            verify_written(artifact, device)
        if progress is not None:
            progress(len(parts), len(parts))
    return Path(output)


def compile_denoiser(artifact: ArtifactWriter, device: torch.device, cpu: str) -> None:
    """Compiles one branch of an evaluation into the artifact, and where its speeds keep keys and values the one that
    takes and gives them, of the same weights.
    """
    config = artifact.config
    # Not the artifact's own copy: its joined matrices go one by one as they are reordered.
    dit = load_dit(artifact.checkpoint.dit, dtype=artifact.dtype, device=device)
    inputs, outputs, ranges = denoiser_part.specification(config, artifact.dtype_name)
    shapes = denoiser_part.dynamic_shapes()
    impl = resolve_impl("auto", device, config)
    if impl == "triton":
        from lavin_export.networks.kernel_denoiser import BATCH, KernelDenoiser

        network: nn.Module = KernelDenoiser(dit)
        ranges["batch"] = list(BATCH)
        shapes = denoiser_part.dynamic_shapes({**denoiser_part.RANGES, "batch": BATCH})
    else:
        network = denoiser_part.BranchDenoiser(dit)
    del dit
    if device.type == "cpu":
        inner_first_(network)
    example = denoiser_part.example_inputs(config, artifact.dtype, device, EXAMPLE)
    described = (inputs, outputs, ranges)
    _compile(artifact, "denoiser", network.eval(), example, shapes, device, cpu, described, impl=impl)
    if artifact.keeps:
        assert isinstance(network, denoiser_part.BranchDenoiser)  # as of a CPU, which alone is served
        _compile(
            artifact,
            KEPT,
            kept_denoiser.KeptDenoiser(network).eval(),
            kept_denoiser.example_inputs(config, artifact.dtype, device, EXAMPLE),
            kept_denoiser.dynamic_shapes(),
            device,
            cpu,
            kept_denoiser.specification(config, artifact.dtype_name),
            weights_of="denoiser",
            impl=impl,
        )


def compile_vae(artifact: ArtifactWriter, part: str, frames: int, device: torch.device, cpu: str) -> None:
    """Compiles the VAE's "encoder" or "decoder" for clips of so many frames into the artifact."""
    network = vae_parts.NETWORKS[part](artifact.vae(), frames).eval().to(device, artifact.dtype)
    inputs = tuple(x.to(device) for x in vae_parts.example_inputs(part, artifact.dtype, frames, rows=16, columns=24))
    _compile(
        artifact,
        vae_parts.part_name(part, frames),
        network,
        inputs,
        vae_parts.dynamic_shapes(part),
        device,
        cpu,
        vae_parts.specification(part, artifact.dtype_name, frames),
    )


def inner_first_(network: nn.Module) -> None:
    """Reorders the memory of a network's matrices `[out, in]`, one at a time, to inner dimension first; their shapes
    stay.
    """
    for name in [name for name, _ in network.named_parameters()]:
        parameter = network.get_parameter(name)
        if parameter.dim() == 2:
            owner, _, leaf = name.rpartition(".")
            value = parameter.detach().t().contiguous().t()
            setattr(network.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _compile(
    artifact: ArtifactWriter,
    name: str,
    network: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    dynamic_shapes: Any,
    device: torch.device,
    cpu: str,
    specification: tuple[list[TensorSpec], list[TensorSpec], Ranges],
    weights_of: str | None = None,
    **more: Any,
) -> None:
    """Compiles a network into the artifact, with weights of its own or those of a part that has the same ones."""
    file, weights = f"{name}.pt2", f"{weights_of or name}.weights.safetensors"
    with _compiling(name), torch.no_grad():
        program = torch.export.export(network, inputs, dynamic_shapes=dynamic_shapes)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(artifact.folder / file), inductor_configs=inductor_options(cpu)
        )
    tensors = {**program.state_dict, **program.constants}
    if weights_of is None:
        write_weights(artifact.folder / weights, tensors)
    else:
        _check_shared(artifact.folder / weights, tensors)
    level = {"avx512": "AVX512", "avx2": "AVX2"}.get(cpu, torch.backends.cpu.get_cpu_capability())
    more |= {"machine": platform.machine(), "cpu_level": level if level in CPU_LEVELS else "DEFAULT"}
    artifact.add_part(name, file, [weights], *specification, **more)


def _check_shared(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises a `RuntimeError` unless a weights file has these tensors, to the bit and in their order of memory."""
    found = read_weights(path, torch.device("cpu"))
    for name, tensor in tensors.items():
        same = name in found and found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach())
        if not same or found[name].stride() != tensor.stride():
            raise RuntimeError(f"{path.name} does not have the constant {name} of a part that shares it")


def inductor_options(cpu: str) -> dict[str, Any]:
    """The compiler's options: weights apart, and as many threads as the process that runs it has."""
    options: dict[str, Any] = {"aot_inductor.package_constants_in_so": False, "cpp.dynamic_threads": True}
    bits, architecture = CPUS[cpu]
    if bits is not None:
        options["cpp.simdlen"] = bits
        if not hasattr(torch._inductor.config.cpp, "march"):
            raise InputError(f"--cpu {cpu} needs a newer torch than {torch.__version__}; use --cpu native")
        options["cpp.march"] = architecture
    return options


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors in the order of their memory, which compiled code relies on; where that is not the order of their
    dimensions, the file's metadata has the permutation from the one to the other.
    """
    orders, stored = {}, {}
    for name, tensor in tensors.items():
        # Slowest dimension first; of two dimensions with one stride, the longer one goes around the other.
        extents = list(zip(tensor.stride(), tensor.shape, strict=True))
        dims = sorted(range(tensor.dim()), key=extents.__getitem__, reverse=True)
        in_order = tensor.is_contiguous() or dims == sorted(dims)
        stored[name] = tensor.detach() if in_order else tensor.detach().permute(dims)
        if not stored[name].is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()} for {tuple(tensor.shape)}, which leave gaps")
        if not in_order:
            orders[name] = [dims.index(dim) for dim in range(tensor.dim())]
    # Those of whole cache lines first, so that every one of them starts at one.
    stored = dict(sorted(stored.items(), key=lambda item: item[1].nbytes % 64 != 0))
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()]
    write_safetensors(path, layout, stored.values(), {"format": "pt", PERMUTED: json.dumps(orders)})


@contextlib.contextmanager
def _compiling(name: str) -> Iterator[None]:
    """Without the compiler's warnings, and with its errors about what it needs as one line."""
    with compiling(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lavin-rt export aoti` that the other formats do not have."""
    parser.add_argument(
        "--cpu",
        choices=list(CPUS),
        default="native",
        help="processors to compile for: this one's kind, or any x86-64 with AVX-512 or AVX2 (default: native)",
    )


def from_arguments(arguments: argparse.Namespace) -> Path:
    """Runs `lavin-rt export aoti`."""
    from lavin_rt.console import Progress

    checkpoint = find_checkpoint(arguments.checkpoint, revision=arguments.revision)
    with Progress(arguments.quiet).bar("compiling", " parts") as progress:
        return export_aoti(
            checkpoint,
            arguments.output,
            device=arguments.device,
            dtype=arguments.dtype,
            cpu=arguments.cpu,
            progress=progress,
            **common_options(arguments),
        )
