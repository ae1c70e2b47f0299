"""The denoiser of an OpenVINO artifact in int8: NNCF's post-training quantisation, calibrated on contexts of tasks."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lavin_export.to_openvino.shared import save_network
from lavin_rt.artifact.load import assemble
from lavin_rt.artifact.manifest import Manifest
from lavin_rt.artifact.openvino import import_openvino, read_network
from lavin_rt.errors import InputError, missing_extra
from lavin_rt.files import scratch
from lavin_rt.pictures.context import read_template, task_folders
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.schedule import schedule

TASKS, PAIRS, EVALUATIONS = 40, 4, 4
# Of little work, and what the whole result goes through.
KEPT = ("cond_embedder.0.weight", "x_embedder.0.weight", "head.weight")

Inputs = list[torch.Tensor]


def quantize_denoiser(manifest: Manifest, templates: Path) -> None:
    """Writes an artifact's denoiser anew, its products of weights in int8: weights by output channel, activations by
    tensor, where SmoothQuant has moved outliers from the one to the other.

    Attention, the embedders and the head stay as they are. Weights use 7 of their 8 bits: processors without VNNI add
    two products in 16 bits, which 8 would overflow.

    Args:
        manifest: of the artifact, whose files are float32.
        templates: a folder of tasks' folders.

    Raises:
        InputError: NNCF is missing, or there are no tasks.
    """
    openvino, nncf = import_openvino("exporting to OpenVINO"), import_nncf()
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    part = manifest.parts["denoiser"]
    samples = [[tensor.numpy() for tensor in inputs] for inputs in calibration(manifest, templates)]
    model = read_network(openvino, manifest.folder, part)
    kept = [
        port.get_node().get_friendly_name()
        for node in model.get_ops()
        if node.get_friendly_name() in KEPT
        for port in node.output(0).get_target_inputs()
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # its bars
        quantized = nncf.quantize(
            model,
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(names=kept, types=["ScaledDotProductAttention"]),
            # Steps that reach to the largest activation of all samples: NNCF's mean over samples cuts off what the
            # last evaluations have, and errs twice as much there.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE,
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            ),
        )
    with scratch(manifest.folder) as made:
        save_network(openvino, quantized, made / part["file"])
        del model, quantized  # which map the files that go now
        for name in (part["file"], *part["weights"]):
            (made / name).replace(manifest.folder / name)


def calibration(manifest: Manifest, templates: Path) -> Iterator[Inputs]:
    """What the denoiser is given on the way to a target, evaluations spread over the first schedule, of both branches
    of a guided step: to each task's last target, and, for the ranges of what is no task here, to noise in contexts of
    noise.
    """
    folders = task_folders(templates)
    if not folders:
        raise InputError(f"{templates} has no tasks to calibrate int8 with; expected folders of *_input and *_target")
    folders = folders[:: -(-len(folders) // TASKS)]  # from the first to the last of however many
    network, vae = assemble(manifest, torch.device("cpu"))
    pipe, knots = Pipeline(network, vae), schedule(manifest.schedules[0])
    blocks, head_scale = network.table(knots)
    generator = torch.Generator().manual_seed(0)
    last = len(knots) - 2
    side, channels = manifest.size // 8, manifest.config.in_channels

    def contexts() -> Iterator[torch.Tensor]:
        for folder in folders:
            pairs = min(PAIRS, len(read_template(folder)))
            yield pipe.task(folder, pairs, manifest.size, frames=1).context.latents
        for pairs in (PAIRS, 1, 0):
            yield torch.randn(1, channels, 2 * pairs + 2, side, side, generator=generator)

    for latents in contexts():
        cond, target = latents[:, :, :-1], latents[:, :, -1:]
        query = cond[:, :, -1:]
        null = torch.cat([torch.zeros_like(query), query], dim=2)
        for evaluation in (round(index * last / (EVALUATIONS - 1)) for index in range(EVALUATIONS)):
            time = knots[evaluation]
            noise = torch.randn(target.shape, generator=generator)
            noisy = (1 - time) * noise + time * target
            for branch in (cond, null):
                yield [noisy, branch.contiguous(), blocks[evaluation], head_scale[evaluation]]


def import_nncf() -> ModuleType:
    """The module `nncf`, which tells nobody what it is used for: it reports to its makers where it finds the package to
    do so.
    """
    reporting = "openvino_telemetry"
    known: Any = sys.modules.get(reporting)
    sys.modules[reporting] = None  # type: ignore[assignment]
    try:
        import nncf
    except ImportError as error:
        if error.name != "nncf":
            raise
        raise missing_extra("nncf", "openvino", "exporting in int8") from None
    finally:
        del sys.modules[reporting]
        if known is not None:
            sys.modules[reporting] = known
    nncf.set_log_level(logging.ERROR)
    return nncf
