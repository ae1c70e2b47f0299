"""Pictures in, pictures out: a checkpoint or an artifact, and the tasks that its contexts show."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lavin_rt import context as contexts
from lavin_rt import images
from lavin_rt.artifact import ArtifactNetwork, ArtifactVAE, Manifest
from lavin_rt.artifact import load as load_artifact
from lavin_rt.checkpoint import load_dit, load_vae
from lavin_rt.checkpoint_header import RELEASED_SIZE, open_checkpoint, picture_size
from lavin_rt.context import EncodedContext
from lavin_rt.devices import DTYPES, out_of_memory, resolve_device, resolve_dtype
from lavin_rt.download import Artifact, Checkpoint, find_model, settled, template_roots
from lavin_rt.errors import InputError, TooLittleMemory
from lavin_rt.executor import Executor
from lavin_rt.files import Progress
from lavin_rt.host_state import own_state
from lavin_rt.model import JDiT
from lavin_rt.networks import Network, make_network
from lavin_rt.packed import check_impl
from lavin_rt.speeds import Speed, speed_of
from lavin_rt.task import Result, Task, check_seed, draw_noise, task_shape
from lavin_rt.vae import STVAE, scale_latents, unscale_latents

__all__ = ["Pipeline", "Result", "Task", "draw_noise"]

PIXELS_TOGETHER = 512 * 512  # of all the pictures that the VAE encodes in one pass on a GPU
# Of all that it decodes in one pass where no graph is captured for one. On a CPU four of 64 x 64 take 0.6 of the time
# that they take one by one, of 128 x 128 0.7, and from 192 x 192 on there is nothing to gain.
PIXELS_DECODED = 256 * 256
POSTERIORS = ("mean", "sample")


class Pipeline:
    """A diffusion transformer with its VAE.

    Serves requests from several threads in turn.

    Args:
        dit, vae: both on the device and in the dtype that they shall run in; or an artifact's network and VAE.
        impl: `"auto"`, `"plain"`, `"torch"` or `"triton"`; settled here, once, and readable as `pipe.impl`. An
            artifact's network has settled it already.
        compile: run the network through `torch.compile`.
        graphs: on CUDA, replay captured steps; False runs them one operator after another, to the same bits.
        tile, chunk: latent rows and columns per VAE tile and latent frames per VAE piece, for pictures too large and
            clips too long for memory; None encodes and decodes all at once (exact).
        template_roots: folders in which `task("depth")` looks for a task by name.
        source: where the weights came from, for records.
        size: of pictures, where a task asks for none.
    """

    @own_state()
    def __init__(
        self,
        dit: JDiT | Network,
        vae: STVAE,
        impl: str = "auto",
        compile: bool = False,
        graphs: bool = True,
        tile: int | None = None,
        chunk: int | None = None,
        template_roots: Sequence[Path] = (),
        source: str = "memory",
        size: int = RELEASED_SIZE,
    ):
        self.network = make_network(dit, impl, compile) if isinstance(dit, JDiT) else dit
        self.dit, self.vae = dit, vae
        self.executor = Executor(self.network, graphs)
        self.compile = compile
        self.tile, self.chunk = tile, chunk
        self.template_roots = tuple(template_roots)
        self.source = source
        self.size = size
        self._fingerprint: str | None = None
        self._origin: tuple[Checkpoint | Artifact, dict[str, Any]] | None = None
        self._as_loaded: list[tuple[int, int]] = []

    @classmethod
    @own_state()
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike | Checkpoint | Artifact | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        impl: str = "auto",
        compile: bool = False,
        graphs: bool = True,
        tile: int | None = None,
        chunk: int | None = None,
        revision: str | None = None,
        strict: bool = False,
        trust: bool = False,
        progress: Progress | None = None,
    ) -> Pipeline:
        """Loads a folder, a `weights.tar.gz` or a Hugging Face id with the official files, or an exported artifact.

        Args:
            checkpoint: a folder with `lavin_dit.safetensors` and `stvae.pt` or `stvae.safetensors`, the published
                archive, an artifact's folder, a hub id of either, or what `find_model` found; None is the small model
                that comes with the package.
            device, dtype, impl: `"auto"` picks once, by what the machine has; an artifact has settled dtype and impl.
            revision: of a hub id.
            strict: treat unexpected tensors as an error instead of a warning.
            trust: run the code in an artifact that came from a hub.
            progress: `(bytes done, bytes in all)` while an archive is unpacked and while the transformer is read.

        Raises:
            InputError: files, tensors or a device that are not there or do not fit.
        """
        files = checkpoint
        if not isinstance(files, Checkpoint | Artifact):
            files = find_model(files, revision, trust, progress=progress)
        files = settled(files)
        roots = template_roots(files)
        if isinstance(files, Artifact):
            if impl != "auto" or compile:
                raise InputError(
                    "an artifact has settled what runs it; leave impl and compile out, or give a checkpoint"
                )
            network, vae = _load_artifact(files, device, dtype, trust, progress)
            pipe = cls(network, vae, "auto", False, graphs, tile, chunk, roots, files.source, network.manifest.size)
            pipe._origin = files, {"device": str(pipe.device), "trust": trust}
            return pipe
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        check_impl(impl)
        dit = load_dit(files.dit, device=device, dtype=dtype, strict=strict, progress=progress)
        vae = load_vae(files.vae, device=device, dtype=dtype, strict=strict)
        size = picture_size(open_checkpoint(files.dit))
        pipe = cls(dit, vae, impl, compile, graphs, tile, chunk, roots, files.source, size)
        pipe._origin = files, {"device": str(pipe.device), "dtype": dtype, "impl": pipe.impl, "compile": compile}
        pipe._as_loaded = pipe._weights()
        return pipe

    def __reduce__(self) -> tuple:
        """Pickled, it is where it was loaded from: it is loaded again there.

        Raises:
            InputError: it was made of networks in memory, or its weights have changed since.
        """
        if self._origin is None or self._as_loaded != self._weights():
            raise InputError(
                "the pipeline's weights are in this process's memory alone, so it cannot be pickled; save them with "
                "save_dit and save_vae, and load it with Pipeline.from_pretrained where it is to run"
            )
        files, options = self._origin
        options = {**options, "graphs": self.executor.graphs, "tile": self.tile, "chunk": self.chunk}
        return partial(type(self).from_pretrained, **options), (files,)

    def _weights(self) -> list[tuple[int, int]]:
        """What tells whether a model's weights are those that were loaded."""
        if not isinstance(self.dit, JDiT):
            return []
        return [(id(tensor), tensor._version) for net in (self.dit, self.vae) for tensor in net.parameters()]

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<Pipeline {self.source}: {self.size} px, impl {self.impl}, {self.device}, {dtype}>"

    @property
    def impl(self) -> str:
        """What runs the network."""
        return self.network.impl

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def _vae(self) -> STVAE:
        """The VAE, computing as this pipeline does."""
        return self.vae.use(self.impl)

    @property
    def vae_fingerprint(self) -> str:
        """Hash of the VAE's tensors, which an encoded context carries."""
        return self._hash_vae()

    def _hash_vae(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = self.vae.fingerprint
        return self._fingerprint

    def speed(self, speed: str | Speed) -> Speed:
        """The speed that a name means, if the network has it.

        Raises:
            InputError: no such name, or one that an artifact was not exported for.
        """
        chosen = speed_of(speed)
        self.network.check_speed(chosen)
        return chosen

    @own_state()
    def task(
        self,
        context: str | os.PathLike | EncodedContext | Iterable[tuple[Any, Any]],
        pairs: int = 4,
        size: int | str | tuple[int, int] | None = None,
        seed: int = 0,
        repeats: bool = False,
        posterior: str = "mean",
        frames: int | None = None,
    ) -> Task:
        """Encodes a task's context once, for any number of queries.

        Args:
            context: a template folder (`*_input.png`, `*_target.png`), the name of a task in the checkpoint's
                templates, an encoded context or its `.safetensors` file, or pairs `[(input, target), ...]` (pictures
                or clips; all are used, in order).
            pairs: how many pairs to choose from a folder; pairs given and encoded contexts are used whole.
            size: (height, width) in pixels, multiples of 16; None is an encoded context's, or the pipeline's.
            seed: of the choice, and of the posterior's sample.
            repeats: choose with repeats, as the published scripts do.
            posterior: `"mean"`, or `"sample"` to draw the VAE's latents.
            frames: of clips, `1 + 4 k`; longer ones, of pairs and queries, are cut to their first so many.

        Raises:
            InputError: whatever of these cannot be used, or too little memory for one query.
        """
        size = None if size is None else images.parse_size(size)
        seed = check_seed(seed)
        check_posterior(posterior)
        if not isinstance(context, EncodedContext) and _is_encoded_file(context):
            context = EncodedContext.load(context)
        if isinstance(context, EncodedContext):
            self.check_context(context, size, posterior)
            return Task(self, context, cut=frames)
        size = images.parse_size(self.size) if size is None else size
        if isinstance(context, str | os.PathLike):
            folder = contexts.find_task(context, self.template_roots)
            chosen = contexts.choose_pairs(contexts.read_template(folder), pairs, seed, repeats)
        else:
            chosen = contexts.given_pairs(context)
        clips = contexts.ContextFrames.prepare(chosen, size, frames)
        images.check_clip_frames(clips.frames_per_clip, "context")
        latent_frames = 1 + (clips.frames_per_clip - 1) // 4
        self.executor.check_memory(task_shape(1, clips.pairs, latent_frames, size, guided=False))
        # Not the generator of the noise, which may well have the same seed.
        generator = torch.Generator().manual_seed(seed ^ 0x5DEECE66D) if posterior == "sample" else None
        latents = torch.cat(self.encode(clips, generator), dim=2)
        # Hashing the VAE takes longer than encoding: it waits until the context is saved or compared.
        encoded = EncodedContext(latents, self._hash_vae, size, posterior, clips.pairs, clips.frames_per_clip)
        return Task(self, encoded, clips, frames)

    def check_context(
        self, context: EncodedContext, size: tuple[int, int] | None = None, posterior: str | None = None
    ) -> None:
        """Refuses an encoded context of another VAE, or where given of another size or posterior, and keys and values
        of another transformer.

        Raises:
            InputError: one of these differs.
        """
        context.check(self.vae_fingerprint, size, posterior=posterior)
        if context.kept is not None:
            rows = context.latents[0, 0].numel() // self.network.config.patch_size**2
            context.kept.check(self.network, rows, context.source)

    def encode(self, clips: Sequence[torch.Tensor], generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """Scaled latents of clips, a few at a time so that memory does not grow with their number.

        Args:
            clips: each `[1, 3, T, H, W]` float32 in [-1, 1], of one shape.
            generator: draws from the posterior; None takes its mean.

        Returns:
            `[1, 16, 1 + (T - 1) / 4, H / 8, W / 8]` float32 each, on the CPU.
        """

        def latents_of(pixels: torch.Tensor) -> torch.Tensor:
            posterior = self._vae.encode(pixels, tile=self.tile, chunk=self.chunk)
            return scale_latents((posterior.mode() if generator is None else posterior.sample(generator)).float())

        def run() -> torch.Tensor:
            together = self._frames_together(clips[0]) if generator is None else 1
            encoded = []
            for first in range(0, len(clips), together):
                pixels = torch.cat([clips[i] for i in range(first, min(first + together, len(clips)))])
                encoded.append(latents_of(pixels) if generator else self._replayed("encode", latents_of, pixels))
            # The host waits for the device once, not for every frame.
            return torch.cat(encoded).cpu()

        return list(self._within_memory(run, f"encode {_shown(clips[0])}").split(1))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of scaled latents `[n, 16, t, h, w]`: `[n * T, 3, H, W]` uint8 on the CPU."""

        def pixels_of(latents: torch.Tensor) -> torch.Tensor:
            pixels = self._vae.decode(unscale_latents(latents), tile=self.tile, chunk=self.chunk)
            return images.from_pixels(pixels.float()).transpose(1, 2).flatten(0, 1)

        def run() -> torch.Tensor:
            together = 1 if self.executor.graphs else max(1, PIXELS_DECODED // (64 * latents[0, 0].numel()))
            return torch.cat([self._replayed("decode", pixels_of, part) for part in latents.split(together)]).cpu()

        return self._within_memory(run, f"decode {_shown(latents)} latents")

    def ready_decoder(self, latents: tuple[int, ...]) -> None:
        """Decodes latents of this shape once before the first step is captured, where decoding will be captured too.

        Beside the steps' graphs it would take its memory a second time; after this it is captured into theirs.
        """
        if self.executor.graphs and not self.executor.holds() and isinstance(self.vae, STVAE):
            self.decode(torch.zeros(latents, dtype=torch.float32))

    def _frames_together(self, clip: torch.Tensor) -> int:
        """Clips of one shape that the VAE encodes in one pass: on a GPU small pictures fill it together only."""
        return max(1, PIXELS_TOGETHER // clip[:, 0].numel()) if self.device.type == "cuda" else 1

    def _replayed(self, name: str, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """`function(x)` of the VAE on its device, a graph's replay where it pays: cut into pieces it runs as it is, and
        an artifact's VAE captures what it can by itself.
        """
        vae = self._vae
        if self.tile is not None or self.chunk is not None or not isinstance(vae, STVAE):
            return function(x.to(self.device))
        stamp = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in vae.parameters()]
        return self.executor.replayed((name, vae.impl), function, x.to(self.device), stamp)

    def _within_memory(self, work: Callable[[], torch.Tensor], what: str) -> torch.Tensor:
        """Does the VAE's work in this thread's turn, if need be without the sampler's buffers."""
        try:
            with self.executor.turn():
                return self.executor.with_room(work)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        raise TooLittleMemory(
            f"too little memory on {self.device} to {what}; encode and decode in pieces (tile=, chunk=; --tile, "
            "--chunk), or give a smaller size"
        )


def check_posterior(posterior: str) -> None:
    """Raises an `InputError` for what cannot be taken of the VAE's posterior."""
    if posterior not in POSTERIORS:
        raise InputError(f"posterior is {posterior!r}; expected one of {', '.join(POSTERIORS)}")


def _shown(clip: torch.Tensor) -> str:
    return f"{clip.shape[2]}x{clip.shape[3]}x{clip.shape[4]}"


def _load_artifact(
    files: Artifact, device: str | torch.device, dtype: str | torch.dtype, trust: bool, progress: Progress | None
) -> tuple[ArtifactNetwork, ArtifactVAE]:
    manifest = Manifest.read(files.folder)
    if device == "auto" and manifest.target["device"] != "any":
        device = manifest.target["device"]
    if dtype != "auto" and resolve_dtype(dtype, torch.device("cpu")) != manifest.dtype:
        made = next(name for name, known in DTYPES.items() if known == manifest.dtype)
        raise InputError(
            f"{files.source} was exported in {made}, asked for {dtype}; leave dtype out or export it again"
        )
    # A folder that the user named is theirs; what a hub gave runs code only for who trusts it.
    trust = trust or not files.fetched
    return load_artifact(files.folder, resolve_device(device), trust, progress)[:2]


def _is_encoded_file(context: Any) -> bool:
    return isinstance(context, str | os.PathLike) and os.fspath(context).endswith(".safetensors")
