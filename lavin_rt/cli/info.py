"""`lavin-rt info`: what a checkpoint or an artifact is, and what this machine can run it with."""

from __future__ import annotations

import argparse
import dataclasses
import platform

import torch

from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.console import installed_version, print_json
from lavin_rt.devices import gigabytes, resolve_device, resolve_dtype
from lavin_rt.dit.config import PRESETS
from lavin_rt.dit.packed import resolve_impl
from lavin_rt.errors import InputError
from lavin_rt.find.model import BUNDLED, Artifact, find_model, template_roots
from lavin_rt.pictures.context import task_folders


def info(options: argparse.Namespace) -> None:
    """Runs the command."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    record: dict = {"machine": machine(device, dtype)}
    if options.size is not None or options.pairs is not None:
        record["the published model, estimated"] = published(options, device, dtype)
    checks, model = [], None
    if options.self_check:
        from lavin_rt.sampling.self_check import check_known_answers

        checks += check_known_answers(device)
    if options.checkpoint:
        model = find_model(options.checkpoint, options.revision, options.trust)
        if isinstance(model, Artifact):
            record["artifact"] = artifact(model, device, options.self_check)
        else:
            model = dataclasses.replace(model, header=model.read_header())
            record["checkpoint"], more = checkpoint(options, model, device, dtype)
            record["memory on a GPU"] = memory(model)
            checks += more
    record["tasks"] = {"by name": tasks(model)}
    if options.self_check:
        record["self-check"] = [
            {"name": check.name, "error": check.error, "allowed": check.allowed, "passed": check.passed}
            for check in checks
        ]
    if options.json:
        print_json(record)
    else:
        show(record)
    if not all(check.passed for check in checks):
        raise RuntimeError("the self-check failed: results of this machine cannot be trusted")


def machine(device: torch.device, dtype: torch.dtype) -> dict:
    """Versions and the device that a run would take."""
    released = PRESETS["lavin-dit-3.4b"]
    described = {
        "lavin-rt": installed_version("lavin-rt"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version("triton") or "not installed",
        "device": f"{device} ({_device_name(device)})",
        "dtype": str(dtype).removeprefix("torch."),
        "impl": resolve_impl("auto", device, released),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        described["compute capability"] = f"{major}.{minor}"
        described["memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.1f} GiB"
    return described


def artifact(model: Artifact, device: torch.device, self_check: bool) -> dict:
    """What an artifact is and whether it runs here; hashes its files for the self-check only, and loads none.

    Raises:
        InputError: a manifest that cannot be read, or with `self_check` a file that is not the one exported.
    """
    manifest = model.manifest
    record = {**manifest.record(), "artifact": model.source}
    try:
        manifest.check_device(device)
        record["runs here"] = f"yes, on {device}"
    except InputError as error:
        record["runs here"] = f"no: {error}"
    if self_check:
        manifest.check_files()
    record["files"] = "as exported" if self_check else "not checked (--self-check does)"
    return record


def tasks(model: Artifact | Checkpoint | None) -> list[str]:
    """Names of the tasks in a model's templates and in the package's own, which --task takes."""
    roots = [BUNDLED / "template"] if model is None else template_roots(model)
    return list(dict.fromkeys(path.name for root in roots for path in task_folders(root)))


def checkpoint(
    options: argparse.Namespace, files: Checkpoint, device: torch.device, dtype: torch.dtype
) -> tuple[dict, list]:
    """What a checkpoint holds; loads its weights for the self-check only."""
    from lavin_rt.checkpoint.load import describe, load_dit

    described = describe(files)
    impl = resolve_impl(options.impl, device, described.config)
    record = {**described.record(), "impl": impl}
    if not options.self_check:
        return record, []
    from lavin_rt.sampling.self_check import check_checkpoint

    dit = load_dit(files.read_header(), device=device, dtype=dtype, strict=options.strict)
    return record, [check_checkpoint(dit, impl)]


def memory(files: Checkpoint) -> dict:
    """What a first and a second picture take on a GPU in bfloat16, as predicted (`lavin_rt.memory`),
    with the released autoencoder's shape.
    """
    from lavin_rt.checkpoint.header import dit_config, picture_size
    from lavin_rt.memory import PAIRS, predict
    from lavin_rt.task import task_shape
    from lavin_rt.vae.config import VAEConfig

    header = files.read_header()
    size = picture_size(header)
    stages = predict(dit_config(header), VAEConfig(), task_shape(1, PAIRS, 1, (size, size), guided=True))
    last = stages[-1]
    return {
        "for": f"{size}x{size}, {PAIRS} pairs, bfloat16",
        **{
            stage.name: f"{gigabytes(stage.allocated)} GB allocated, {gigabytes(stage.reserved)} GB reserved"
            for stage in stages
        },
        "at most": f"{gigabytes(last.peak_allocated)} GB allocated, {gigabytes(last.peak_reserved)} GB reserved",
    }


def published(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """What the published model would take, from a probe of some seconds.

    Raises:
        InputError: a size or a number of pairs that it does not take.
    """
    from lavin_rt.checkpoint.header import RELEASED_SIZE
    from lavin_rt.estimate import estimate
    from lavin_rt.pictures.images import parse_size
    from lavin_rt.task import task_shape

    size = parse_size(RELEASED_SIZE if options.size is None else options.size)
    pairs = 4 if options.pairs is None else options.pairs
    if pairs < 1:
        raise InputError(f"--pairs is {pairs}; expected 1 or more")
    found = estimate(task_shape(1, pairs, 1, size, guided=True), device, dtype, options.impl)
    return {
        "for": f"{size[0]}x{size[1]}, {pairs} pair{'s' * (pairs != 1)}, {str(dtype).removeprefix('torch.')}",
        "download": f"{gigabytes(found.download)} GB",
        "memory": f"{gigabytes(found.memory)} GB of {gigabytes(found.at_hand)} GB at hand",
        "context, once a task": f"{found.context:.3g} s",
        "schedule, once": f"{found.prepare:.3g} s",
        "a picture": f"{found.query:.3g} s, {found.evaluations} evaluations of {found.evaluation:.3g} s",
    }


def show(record: dict) -> None:
    """The record as aligned lines."""
    for section, values in record.items():
        print(section)
        if isinstance(values, list):
            for check in values:
                verdict = "ok" if check["passed"] else "FAILED"
                print(f"  {verdict}  {check['name']}: error {check['error']:.1e}, allowed {check['allowed']:.0e}")
            continue
        width = max(len(name) for name in values)
        for name, value in values.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"  {name:<{width}}  {'none' if text in ('', None) else text}")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
