"""Holding an artifact against the checkpoint it was made of: every part, a short sampling run, one at every speed, and
every row of modulation.

Every error is against the plain model in float32. In float32 it may be 1e-5 for a pass and 1e-4 for the sampling run;
in 16 bits at most twice the error that the plain model itself makes in that dtype; of a denoiser in int8 at most twice
what the plain one makes whose linears' inputs are rounded to 8 bits, and weights to 7.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavin_export.errors import VerificationError
from lavin_export.networks import vae as vae_parts
from lavin_export.networks.denoiser import BranchDenoiser
from lavin_export.verify.int8 import EightBits, in_int8
from lavin_export.verify.modulation import check_modulation
from lavin_export.verify.onnx_weights import widened
from lavin_export.verify.speeds import PlainBranches, at_speeds, kept_passes, kept_sizes, other_speeds
from lavin_export.verify.weights import check_weights
from lavin_export.writer import ArtifactWriter
from lavin_rt.artifact.aoti import read_weights
from lavin_rt.artifact.load import ArtifactNetwork, ArtifactVAE, Session, assemble
from lavin_rt.artifact.manifest import KEPT, Manifest
from lavin_rt.artifact.parts import Part
from lavin_rt.artifact.sizes import check_ranges, ranges_of, sized
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.load import load_dit, load_vae
from lavin_rt.checkpoint.names import official_layout
from lavin_rt.devices import current_device
from lavin_rt.dit.model import JDiT
from lavin_rt.errors import InputError
from lavin_rt.files import scratch
from lavin_rt.sampling.denoisers import Denoiser, PlainNetwork
from lavin_rt.sampling.schedule import schedule
from lavin_rt.vae.model import STVAE

PASS, RUN = 1e-5, 1e-4  # relative errors allowed in float32
EVALUATIONS, GUIDANCE = 3, 1.5
AGREE_LEAST = 1e-6  # of a 16-bit budget, where the plain model happens to make next to no error
WORK = 4e12  # operations of the largest case, a minute of a small CPU
MOST_ROWS = 2560
LARGEST = {"batch": 2, "target_frames": 1, "cond_frames": 9, "height": 32, "width": 32}
ODD = {"batch": 3, "target_frames": 2, "cond_frames": 5, "height": 6, "width": 10}
LARGEST_PICTURE, ODD_PICTURE = {"rows": 12, "columns": 16}, {"rows": 3, "columns": 5}

Sizes = dict[str, int]
Velocity = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
"""`(latents, evaluation, cond_latents) -> velocity` of one branch."""


@dataclasses.dataclass(frozen=True)
class PartCheck:
    """One comparison: of what, at which sizes, the error and what is allowed."""

    part: str
    sizes: Sizes
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


def verify_written(artifact: ArtifactWriter, device: torch.device | str = "cpu", **limits: Any) -> dict[str, Any]:
    """Runs what was written so far as `verify_artifact` does, and keeps the errors for the manifest.

    Raises:
        VerificationError: an error above its budget.
    """
    artifact.write_manifest()
    room = artifact.folder.parent  # that a copy would not fit is then said of the right place
    artifact.verification = verify_artifact(artifact.folder, artifact.checkpoint, device, room=room, **limits)
    return artifact.verification


def verify_artifact(
    folder: Path,
    checkpoint: Checkpoint,
    device: torch.device | str = "cpu",
    evaluations: int = EVALUATIONS,
    room: Path | None = None,
) -> dict[str, Any]:
    """Runs every part of an artifact, a short sampling run and whole ones at its other speeds, beside the plain model.

    At the smallest sizes that the artifact takes, odd ones, and the largest up to 2,560 rows (fewer for a large model:
    a minute of a small CPU). The plain models and the artifact are in memory one after another.

    Args:
        folder: the artifact; its files' hashes are checked first.
        checkpoint: that it was made of.
        device: to run both on.
        evaluations: of the sampling run, spread over the first schedule.
        room: a folder for a copy in float32 of what this machine cannot compute; the temporary one by default.

    Returns:
        what the manifest keeps as "verification": plain values.

    Raises:
        VerificationError: an error above its budget; names the part, the sizes and both numbers. Weights or modulation
            that are not the checkpoint's.
        InputError: an artifact that is damaged or cannot run on the device.
    """
    manifest, device = Manifest.read(folder), torch.device(device)
    manifest.check_device(device)
    manifest.check_files()
    check_modulation(manifest, checkpoint)
    if manifest.kind in ("onnx", "openvino"):
        check_weights(manifest, checkpoint)
    elif manifest.kind == "aoti":
        check_compiled_weights(manifest, checkpoint)
    cases = Cases(manifest, checkpoint, evaluations)
    with torch.no_grad(), current_device(device), scratch(room or Path(tempfile.gettempdir())) as copy:
        truth = cases.of_plain(torch.float32, device)
        own = truth if manifest.dtype == torch.float32 else cases.of_plain(manifest.dtype, device)
        eight = cases.of_eight_bits() if in_int8(manifest) else {}
        runnable, method = manifest, "as it runs"
        if manifest.kind == "onnx" and manifest.dtype == torch.bfloat16 and device.type == "cpu":
            runnable, method = widened(manifest, copy), "its bfloat16 weights in float32 arithmetic"
        network, vae = assemble(runnable, device)
        if getattr(network.session, "computes_in", manifest.dtype) != manifest.dtype:
            method = "in float32 arithmetic, as this processor has no bfloat16"
        found = cases.of_artifact(network, vae)
    checks = []
    for index, ((part, sizes), result, right, plain) in enumerate(zip(cases.keys, found, truth, own, strict=True)):
        fixed = RUN if part.startswith(("sampling", "speed")) else PASS
        exact = manifest.dtype == torch.float32 and index not in eight
        budget = fixed if exact else max(2 * relative_error(eight.get(index, plain), right), AGREE_LEAST)
        checks.append(PartCheck(part, sizes, relative_error(result, right), budget))
    for check in checks:
        if not check.passed:
            raise VerificationError(
                f"{folder}: {check.part} at {check.sizes} is off by {check.error:.2e} from the plain model, allowed "
                f"are {check.budget:.2e}; do not use this artifact"
            )
    return {
        "passed": True,
        "device": device.type,
        "method": method,
        "parts": {
            name: [{"sizes": check.sizes, "error": check.error, "budget": check.budget} for check in of_part]
            for name, of_part in itertools.groupby((c for c in checks if c.part in manifest.parts), lambda c: c.part)
        },
        "speeds": {
            check.part.partition(" ")[2]: {"error": check.error, "budget": check.budget}
            for check in checks
            if check.part.startswith("speed ")
        },
        "sampling": {
            "evaluations": evaluations,
            "sizes": checks[-1].sizes,
            "error": checks[-1].error,
            "budget": checks[-1].budget,
        },
    }


def check_compiled_weights(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Compares the weights of an AOTInductor artifact with what the checkpoint's weights make, bit by bit.

    A tensor that the network has no name for is a constant of its trace, which only the results can judge.

    Raises:
        VerificationError: one that differs, by name.
        InputError: a weights file that cannot be read.
    """

    @functools.cache
    def vae() -> STVAE:
        return load_vae(checkpoint.vae, dtype=torch.float32)

    for name, part in manifest.parts.items():
        if name in ("denoiser", KEPT):
            wanted = _denoiser(part, load_dit(checkpoint.dit, dtype=manifest.dtype)).state_dict()
        else:
            wanted = vae_parts.network_of(name, vae()).to(manifest.dtype).state_dict()
        for file in part["weights"]:
            for weight, found in read_weights(manifest.folder / file, torch.device("cpu")).items():
                if weight in wanted and not _same_bits(found, wanted[weight]):
                    raise VerificationError(
                        f"{manifest.folder}: the weight {weight} of {name} is not the checkpoint's; "
                        "do not use this artifact"
                    )


def _denoiser(part: Part, dit: JDiT) -> nn.Module:
    """What the part "denoiser" was compiled from."""
    if part.get("impl") == "triton":
        from lavin_export.networks.kernel_denoiser import KernelDenoiser

        return KernelDenoiser(dit)
    return BranchDenoiser(dit)


def _same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (found, wanted)))


class Cases:
    """The inputs of a verification, and what a model makes of them.

    Attributes:
        keys: (part, sizes) of every result, the sampling run last.
    """

    def __init__(self, manifest: Manifest, checkpoint: Checkpoint, evaluations: int):
        self.manifest, self.checkpoint, self.evaluations = manifest, checkpoint, evaluations
        self.knots = schedule(manifest.schedules[0])
        parameters = sum(torch.Size(place.shape).numel() for place in official_layout(manifest.config))
        self.rows = rows = min(MOST_ROWS, int(WORK / (2 * parameters)))
        self.passes = sizes_to_check(manifest.parts["denoiser"], LARGEST, ODD, lambda sizes: _rows(sizes) <= rows)
        self.pictures = [
            (name, sizes)
            for name, part in manifest.parts.items()
            if name.startswith("vae")
            for sizes in sizes_to_check(part, LARGEST_PICTURE, ODD_PICTURE, lambda sizes: True)
        ]
        self.run = dict(self.passes[0])
        fits = _within(manifest.parts["denoiser"], {**self.run, "height": 4, "width": 6, "cond_frames": 3})
        if fits:
            self.run |= {"height": 4, "width": 6, "cond_frames": 3}
        self.keys = [("denoiser", sizes) for sizes in self.passes]
        self.keys += [(KEPT, sizes) for sizes in kept_sizes(manifest, rows) for _ in range(3)] + self.pictures
        self.keys += [(f"speed {name}", self.run) for name in other_speeds(manifest)] + [("sampling", self.run)]

    def of_plain(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """Results of the plain model, on the CPU in float32."""
        passes, speeds, run = self._of_transformer(dtype, device)
        vae = load_vae(self.checkpoint.vae, device=device, dtype=dtype).in_form("plain")
        return [*passes, *self._pictures(vae, device), *speeds, run]

    def _of_transformer(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """The passes, the runs at other speeds, the sampling run."""
        dit = load_dit(self.checkpoint.dit, device=device, dtype=dtype)

        def velocity(latents: torch.Tensor, evaluation: int, cond_latents: torch.Tensor) -> torch.Tensor:
            return dit(latents, self.knots[evaluation].to(device).expand(len(latents)), cond_latents)

        # Read once for all calls: from the file a call takes as long to read 28 % of the model as to compute.
        with dit.resident_modulation():
            plain = PlainNetwork(dit)
            passes = self._passes(velocity, device) + kept_passes(plain, self.manifest, self.rows)
            return passes, self._at_speeds(plain), self._sampled(velocity, device)

    def of_artifact(self, network: ArtifactNetwork, vae: ArtifactVAE) -> list[torch.Tensor]:
        """Results of an artifact, on the CPU in float32."""
        passes, run = self._of_denoiser(network.session, network.table(self.knots), network.dtype, network.device)
        passes += kept_passes(network, self.manifest, self.rows)
        return [*passes, *self._pictures(vae, network.device), *self._at_speeds(network), run]

    def of_eight_bits(self) -> dict[int, torch.Tensor]:
        """Results of the plain denoiser with linears of 8-bit operands, by their places among `keys`."""
        dit = load_dit(self.checkpoint.dit, dtype=torch.float32)
        network = PlainBranches(self.manifest, dit)
        with EightBits():
            passes, run = self._of_denoiser(network.session, network.table(self.knots), torch.float32, network.device)
            runs = [*self._at_speeds(network), run]
        return {**dict(enumerate(passes)), **dict(enumerate(runs, len(self.keys) - len(runs)))}

    def _of_denoiser(
        self,
        session: Session,
        table: tuple[torch.Tensor, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        blocks, head_scale = table

        def velocity(latents: torch.Tensor, evaluation: int, cond_latents: torch.Tensor) -> torch.Tensor:
            rows = blocks[evaluation], head_scale[evaluation]
            return session(latents.to(dtype), cond_latents.to(dtype), *rows)[0]

        return self._passes(velocity, device), self._sampled(velocity, device)

    def _passes(self, velocity: Velocity, device: torch.device) -> list[torch.Tensor]:
        results = []
        for index, sizes in enumerate(self.passes):
            latents, cond_latents = self._latents(sizes, device, index)
            evaluation = min(index * 7, len(self.knots) - 2)
            results.append(velocity(latents, evaluation, cond_latents).float().cpu())
        return results

    def _at_speeds(self, network: Denoiser) -> list[torch.Tensor]:
        noise, cond_latents = self._latents(self.run, network.device, 100)
        return at_speeds(network, self.manifest, cond_latents, noise, GUIDANCE if self._guided() else 1.0)

    def _guided(self) -> bool:
        """Whether the denoiser takes the null branch of the sampling run."""
        return _within(self.manifest.parts["denoiser"], {**self.run, "cond_frames": 2})

    def _sampled(self, velocity: Velocity, device: torch.device) -> torch.Tensor:
        latents, cond_latents = self._latents(self.run, device, 100)
        query = cond_latents[:, :, -1:]
        null = torch.cat([torch.zeros_like(query), query], dim=2)
        guided = self._guided()
        # A few wide Euler steps over the whole schedule: its first knots lie so close that they would move nothing.
        last = len(self.knots) - 1
        chosen = [round(index * last / self.evaluations) for index in range(self.evaluations)] + [last]
        for evaluation, following in itertools.pairwise(chosen):
            step = velocity(latents, evaluation, cond_latents).float()
            if guided:
                unguided = velocity(latents, evaluation, null).float()
                step = unguided + GUIDANCE * (step - unguided)
            latents = latents + (self.knots[following] - self.knots[evaluation]).item() * step
        return latents.cpu()

    def _pictures(self, vae: STVAE | ArtifactVAE, device: torch.device) -> list[torch.Tensor]:
        results = []
        for index, (name, sizes) in enumerate(self.pictures):
            shape = sized(self.manifest.parts[name]["inputs"][0]["shape"], sizes)
            generator = torch.Generator().manual_seed(200 + index)
            if name.startswith("vae_encoder"):
                posterior = vae.encode((torch.rand(shape, generator=generator) * 2 - 1).to(device))
                result = torch.cat([posterior.mean, posterior.logvar], dim=1)
            else:
                result = vae.decode(torch.randn(shape, generator=generator).to(device))
            results.append(result.float().cpu())
        return results

    def _latents(self, sizes: Sizes, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        channels, grid = self.manifest.config.in_channels, (sizes["height"], sizes["width"])
        frames = sizes["target_frames"], sizes["cond_frames"]
        latents, cond_latents = (
            torch.randn(sizes["batch"], channels, count, *grid, generator=generator).to(device) for count in frames
        )
        return latents, cond_latents


def sizes_to_check(part: Part, largest: Sizes, odd: Sizes, affordable: Callable[[Sizes], bool]) -> list[Sizes]:
    """The smallest sizes that a part takes, odd ones and large ones, of every range that it has; none twice."""
    found: list[Sizes] = []
    for ranges in ranges_of(part):
        bounds = {name: ranges.get(name, [1, largest[name]]) for name in largest}
        smallest = {name: least for name, (least, _) in bounds.items()}
        middle, large = (
            {name: min(max(wanted[name], least), most) for name, (least, most) in bounds.items()}
            for wanted in (odd, largest)
        )
        for name in ("batch", "height", "width", "cond_frames"):
            if not affordable(large) and name in large:
                large[name] = middle[name] if affordable({**large, name: middle[name]}) else smallest[name]
        found += [sizes for sizes in (smallest, middle, large) if sizes not in found]
    return found


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """`||result - truth|| / ||truth||` in float64; infinite for another shape."""
    if result.shape != truth.shape:
        return float("inf")
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


def _rows(sizes: Sizes) -> int:
    return sizes["batch"] * (sizes["cond_frames"] + sizes["target_frames"]) * sizes["height"] * sizes["width"] // 4


def _within(part: Part, sizes: Sizes) -> bool:
    try:
        check_ranges(part, sizes)
    except InputError:
        return False
    return True
