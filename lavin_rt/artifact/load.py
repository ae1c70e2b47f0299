"""Running an artifact: its networks in the place of the model's own, without the checkpoint.

What comes from others is checked in this order, and nothing is loaded before: the manifest, the trust that code needs,
the device, the files' sizes and hashes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from lavin_rt.artifact.manifest import KEPT, KINDS_OF_CODE, MODULATION, Manifest
from lavin_rt.artifact.sizes import check_ranges, token_grid
from lavin_rt.artifact.speeds import read_table, tables_of
from lavin_rt.dit.layout import Form, Shape
from lavin_rt.errors import InputError
from lavin_rt.files import Progress
from lavin_rt.sampling.denoisers import KeptCondition, KeptContext, LatentCondition, Tensors
from lavin_rt.sampling.speeds import Speed
from lavin_rt.vae.model import LATENT_SCALE, LATENT_SHIFT, Posterior
from lavin_rt.vae.tiling import Axis, blended, decode_axes, encode_axes

if TYPE_CHECKING:
    from lavin_rt.artifact.tensorrt import TensorRTSession

Session = Callable[..., Tensors]
SMALL_WEIGHTS = 32 * 2**20  # bytes of a denoiser's, up to which it is loaded beside the other one


def load(
    folder: str | os.PathLike | Manifest,
    device: torch.device | str = "cpu",
    trust: bool = False,
    progress: Progress | None = None,
    provider: str = "auto",
) -> tuple[ArtifactNetwork, ArtifactVAE, Manifest]:
    """Loads an artifact.

    Args:
        folder: with its `manifest.json`, or the manifest where it has been read.
        device: to run on.
        trust: whether code of this artifact may run: TensorRT plans and AOTInductor packages are code, ONNX and
            OpenVINO graphs are not and need none.
        progress: `(bytes hashed, bytes in all)`.
        provider: of ONNX Runtime, see `lavin_rt.artifact.onnxruntime.OrtSession`.

    Raises:
        InputError: not an artifact, one of another version, not trusted, for another device, damaged or incomplete.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    manifest = folder if isinstance(folder, Manifest) else Manifest.read(folder)
    if manifest.kind in KINDS_OF_CODE and not trust:
        raise InputError(
            f"{manifest.folder} is a {manifest.kind} artifact, whose files are code; nothing of it was run: "
            "pass --trust if you trust whoever made it"
        )
    if manifest.latent_scaling != {"shift": LATENT_SHIFT, "scale": LATENT_SCALE}:
        raise InputError(
            f"{manifest.folder} scales latents by {manifest.latent_scaling}; this package knows {LATENT_SHIFT} and "
            f"{LATENT_SCALE} only"
        )
    manifest.check_device(device)
    manifest.check_files(progress)
    return *assemble(manifest, device, provider), manifest


def assemble(manifest: Manifest, device: torch.device, provider: str = "auto") -> tuple[ArtifactNetwork, ArtifactVAE]:
    """The networks of an artifact whose files have been checked."""
    open_part = opener(manifest, device, provider)
    return ArtifactNetwork(manifest, device, open_part("denoiser"), open_part), ArtifactVAE(manifest, device, open_part)


def opener(manifest: Manifest, device: torch.device, provider: str = "auto") -> Callable[[str], Session]:
    """Loads a part by its name, whose files have to be those that were checked: some come to be opened hours later."""
    open_part = _opener(manifest, device, provider)

    def opened(name: str) -> Session:
        part = manifest.parts[name]
        manifest.check_unchanged(part["file"], *part["weights"])
        return open_part(name)

    return opened


def _opener(manifest: Manifest, device: torch.device, provider: str) -> Callable[[str], Session]:
    if manifest.kind == "onnx":
        from lavin_rt.artifact.onnxruntime import OrtSession

        return lambda name: OrtSession(manifest.folder, manifest.parts[name], manifest, device, provider)
    if manifest.kind == "tensorrt":
        from lavin_rt.artifact.tensorrt import TensorRTSession

        return lambda name: TensorRTSession(manifest.folder, manifest.parts[name], manifest, device)
    if manifest.kind == "openvino":
        from lavin_rt.artifact.openvino import OpenVinoSession

        # Compiled once, as a run asks it for four sets of shapes, of each of which it would have weights of its own.
        return lambda name: OpenVinoSession(manifest.folder, manifest.parts[name], manifest, any_shape=name == KEPT)
    from lavin_rt.artifact.aoti import AotiSession

    weights: dict[str, dict[str, torch.Tensor]] = {}  # a file's are those of all parts that name it
    return lambda name: AotiSession(manifest.folder, manifest.parts[name], manifest, device, weights)


class ArtifactNetwork:
    """An artifact's network as an executor runs it (`lavin_rt.sampling.denoisers.Denoiser`): one call a branch kind.

    Speeds that keep keys and values run a denoiser of their own, which is loaded when one is asked for. AOTInductor's
    two share their weights; of other kinds, whose sessions have them each for itself, one of the two is loaded at a
    time, unless they are small.

    Args:
        session: the denoiser.
        open_part: loads a part by its name.
    """

    compiles = False

    def __init__(
        self,
        manifest: Manifest,
        device: torch.device,
        session: Session,
        open_part: Callable[[str], Session] | None = None,
    ):
        self.manifest, self.device, self._open = manifest, device, open_part
        self._sessions = {"denoiser": session}
        weights = sum(manifest.files[name]["bytes"] for name in manifest.parts["denoiser"]["weights"])
        self._both = manifest.kind == "aoti" or weights <= SMALL_WEIGHTS
        self.config, self.dtype, self.impl = manifest.config, manifest.dtype, manifest.kind
        self.forkable = manifest.kind == "aoti"  # others have threads of their own
        self.capturable = bool(getattr(session, "capturable", manifest.kind in KINDS_OF_CODE))

    @property
    def session(self) -> Session:
        """The denoiser that keeps nothing."""
        return self.loaded("denoiser")

    def loaded(self, name: str) -> Session:
        """The denoiser of a part's name; another one may be let go for it."""
        if name not in self._sessions:
            if not self._both:
                self._sessions.clear()
            assert self._open is not None  # of every network that is assembled
            self._sessions[name] = self._open(name)
        return self._sessions[name]

    def table(self, knots: torch.Tensor) -> Tensors:
        """Modulation `[n - 1, depth, 2, 4, D]` and head scale `[n - 1, D]` float32 of a schedule's knots `[n]`.

        Raises:
            InputError: a schedule that the artifact was exported without, with those it has; a file that is damaged, or
                another one than was checked.
        """
        steps, manifest = len(knots), self.manifest
        names = tables_of(steps, manifest.schedules, manifest.speeds)
        if not names:
            has = ", ".join(map(str, manifest.schedules))
            raise InputError(
                f"{manifest.folder} has no modulation for steps {steps}; it has {has}: "
                f"choose one of these, or export it with --steps {steps}"
            )
        manifest.check_unchanged(MODULATION)
        found = read_table(manifest.folder / MODULATION, names, self.config, knots)
        return found["blocks"].to(self.device), found["head_scale"].to(self.device)

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents with their frames as rows, `[n, T, 16, h, w]`."""
        return latents.to(self.device, self.dtype).transpose(1, 2)

    def check(self, shape: Shape) -> None:
        """Raises an `InputError` for a shape that the artifact was not exported for."""
        name = KEPT if shape.kept else "denoiser"
        if name not in self.manifest.parts:
            raise InputError(f"{self.manifest.folder} keeps no keys and values; export it for a speed that does")
        part = self.manifest.parts[name]
        for frames in {shape.cond_frames, *([1 + shape.query_frames] if shape.guided else [])}:
            sizes = {
                "batch": shape.queries,
                "cond_frames": frames,
                "target_frames": shape.target_frames,
                "height": shape.height,
                "width": shape.width,
            }
            if shape.kept:
                sizes |= {"kept_frames": frames - shape.query_frames, **token_grid(shape.height, shape.width)}
            check_ranges(part, sizes, str(self.manifest.folder))

    def check_speed(self, speed: Speed) -> None:
        """Raises an `InputError` for a speed that the artifact was not exported for, with those it has."""
        self.manifest.check_speed(speed)

    def step(self, shape: Shape, form: Form | None = None, once: bool = False) -> LatentCondition:
        """The network at one shape; an `InputError` as of `check`."""
        self.check(shape)
        form = Form.exact(shape) if form is None else form
        if shape.kept:
            return KeptCondition(shape, self.dtype, self.device, self.kept_velocity, form, self.config, self.dtype)
        # What a plan needs for a shape goes with the shape's graph.
        plan = cast("TensorRTSession", self.session).calls() if self.manifest.kind == "tensorrt" else None
        return LatentCondition(shape, self.dtype, self.device, partial(self._velocity, plan), form)

    def _velocity(
        self, session: Session | None, latents: torch.Tensor, cond_latents: torch.Tensor, *rows: torch.Tensor
    ) -> torch.Tensor:
        return self._own((session or self.session)(latents.to(self.dtype), cond_latents, *rows)[0])

    def _own(self, velocity: torch.Tensor) -> torch.Tensor:
        """A velocity that no later call writes over, as a session may answer in memory of its own."""
        return velocity.clone() if self.manifest.kind == "onnx" and self.device.type == "cuda" else velocity

    def kept_velocity(
        self,
        latents: torch.Tensor,
        cond_latents: torch.Tensor,
        modulation: torch.Tensor,
        head_scale: torch.Tensor,
        kept: KeptContext,
    ) -> torch.Tensor:
        """Velocity of one branch kind that stores or reuses its context's keys and values (`KeptCondition`)."""
        grid = token_grid(*latents.shape[3:])
        frames = kept.keys.shape[2] // (grid["rows"] * grid["columns"])
        given = frames if kept.reused else 0
        keys, values = (
            part.flatten(3).unflatten(2, (frames, *grid.values()))[:, :, :given] for part in (kept.keys, kept.values)
        )
        inputs = latents.to(self.dtype), cond_latents[:, :, given:], modulation, head_scale, keys, values
        velocity, new_keys, new_values = self.loaded(KEPT)(*inputs)
        if not kept.reused:
            for part, new in ((kept.keys, new_keys), (kept.values, new_values)):
                part.copy_(new[:, :, :frames].reshape(part.shape))
        return self._own(velocity)

    def workspace(self, shape: Shape) -> int:
        """Bytes of one branch kind's activations; a half more than the packed step takes a row, as nothing is reused
        on purpose. Of a shape that keeps keys and values those, and a call's own, in and out.
        """
        rows = shape.queries * (shape.cond_frames + shape.target_frames) * shape.frame_tokens
        width = 8 * self.config.hidden_size + 4 * self.config.mlp_size
        kept = 2 * self.config.depth * self.config.kv_size * (shape.rows + 2 * rows) if shape.kept else 0
        return (rows * width + kept) * self.dtype.itemsize

    def running(self) -> AbstractContextManager[object]:
        return nullcontext()


class ArtifactVAE:
    """An artifact's encoder and decoder with the methods of `lavin_rt.vae.model.STVAE` that a pipeline calls.

    Pictures, and clips of the lengths that were exported; a clip's parts are loaded when one comes.
    """

    def __init__(self, manifest: Manifest, device: torch.device, open_part: Callable[[str], Session]):
        self.manifest, self.device, self.dtype = manifest, device, manifest.dtype
        self.fingerprint = manifest.vae_fingerprint
        self._open = open_part
        self._sessions = {name: open_part(name) for name in ("vae_encoder", "vae_decoder")}

    def encode(
        self,
        pixels: torch.Tensor,
        *,
        tile: int | str | None = None,
        chunk: int | None = None,
        batch: int | None = None,
    ) -> Posterior:
        """The posterior of `[N, 3, T, H, W]`; arguments as `STVAE.encode`, `batch` aside, as it runs one at a time.

        Raises:
            InputError: clips of a length, or pictures of a size, that the artifact was not exported for.
        """
        axes = encode_axes(pixels.shape, tile, chunk)
        moments = self._run("vae_encoder", pixels, axes, lambda frames: frames)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar)

    def decode(
        self,
        latents: torch.Tensor,
        *,
        tile: int | str | None = None,
        chunk: int | None = None,
        batch: int | None = None,
    ) -> torch.Tensor:
        """Pixels of raw latents `[N, 16, t, h, w]`; arguments as `STVAE.decode`, `batch` aside.

        Raises:
            InputError: as `encode`.
        """
        axes = decode_axes(latents.shape, tile, chunk)
        return self._run("vae_decoder", latents, axes, lambda frames: 1 + 4 * (frames - 1))

    def _run(
        self, part: str, x: torch.Tensor, axes: list[Axis] | None, frames_of: Callable[[int], int]
    ) -> torch.Tensor:
        def run(piece: torch.Tensor) -> torch.Tensor:
            session = self._session(part, frames_of(piece.shape[2]))
            return torch.cat(session(piece.to(self.device, self.dtype).contiguous()), dim=1)

        results = [run(item) if axes is None else blended(run, item, axes) for item in x.split(1)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _session(self, part: str, frames: int) -> Session:
        name = part if frames == 1 else f"{part}_clip{frames}"
        if name not in self.manifest.parts:
            lengths = sorted(int(n.removeprefix(f"{part}_clip") or 0) if "clip" in n else 1 for n in self._parts(part))
            raise InputError(
                f"{self.manifest.folder} takes clips of {', '.join(map(str, lengths))} frames, not {frames}; "
                f"export it with --clip-frames {frames}"
            )
        if name not in self._sessions:
            self._sessions[name] = self._open(name)
        return self._sessions[name]

    def _parts(self, part: str) -> list[str]:
        return [name for name in self.manifest.parts if name.startswith(part)]
