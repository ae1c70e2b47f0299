"""Pictures in, pictures out: a checkpoint or an artifact, and the tasks that its contexts show."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch

from lavin_rt.artifact.load import ArtifactNetwork, ArtifactVAE
from lavin_rt.artifact.load import load as load_artifact
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.header import RELEASED_SIZE, picture_size
from lavin_rt.checkpoint.load import load_dit, load_vae
from lavin_rt.devices import resolve_device, resolve_dtype, slow_dtype
from lavin_rt.dit.model import JDiT
from lavin_rt.dit.packed import check_impl
from lavin_rt.dit.prepacked import prepacked, unpack_
from lavin_rt.engine import VAE, Engine
from lavin_rt.errors import InputError
from lavin_rt.files import Progress
from lavin_rt.find.model import Artifact, find_model, opened, template_roots
from lavin_rt.host_state import own_state
from lavin_rt.kept_keys import check_kept_keys
from lavin_rt.pictures import context as contexts
from lavin_rt.pictures import images
from lavin_rt.pictures.encoded import EncodedContext
from lavin_rt.sampling.denoisers import Denoiser, PackedNetwork
from lavin_rt.task import Task, check_seed, task_shape
from lavin_rt.vae.model import STVAE

POSTERIORS = ("mean", "sample")


class Pipeline(Engine):
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
        dit: JDiT | Denoiser,
        vae: VAE,
        impl: str = "auto",
        compile: bool = False,
        graphs: bool = True,
        tile: int | None = None,
        chunk: int | None = None,
        template_roots: Sequence[Path] = (),
        source: str = "memory",
        size: int = RELEASED_SIZE,
    ):
        super().__init__(dit, vae, impl, compile, graphs, tile, chunk)
        self._dit = dit
        self.compile = compile
        self.template_roots = tuple(template_roots)
        self.source = source
        self.size = size
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
            device, dtype, impl: `"auto"` picks once, by what the machine has (bfloat16 on GPUs and on CPUs that
                multiply it fast, else float32); an artifact has settled dtype and impl, but for OpenVINO's, which
                computes in the dtype asked for.
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
        files = opened(files)
        roots = template_roots(files)
        if isinstance(files, Artifact):
            if impl != "auto" or compile:
                raise InputError(
                    "an artifact has settled what runs it; leave impl and compile out, or give a checkpoint"
                )
            network, coder = _load_artifact(files, device, dtype, trust, progress)
            pipe = cls(network, coder, "auto", False, graphs, tile, chunk, roots, files.source, network.manifest.size)
            pipe._origin = files, {"device": str(pipe.device), "dtype": pipe.dtype, "trust": trust}
            return pipe
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        if slow_dtype(dtype, device):
            warnings.warn("float16 is slower than float32 on this CPU, which has no instructions for it", stacklevel=2)
        check_impl(impl)
        dit = load_dit(files.read_header(), device=device, dtype=dtype, strict=strict, progress=progress)
        vae = load_vae(files.vae, device=device, dtype=dtype, strict=strict)
        size = picture_size(files.read_header())
        pipe = cls(dit, vae, impl, compile, graphs, tile, chunk, roots, files.source, size)
        if isinstance(pipe.network, PackedNetwork):
            pipe.network.prepack()  # nobody else holds this model
        files = dataclasses.replace(files, header=None)  # where it is loaded again, it may be another
        pipe._origin = files, {"device": str(pipe.device), "dtype": dtype, "impl": pipe.impl, "compile": compile}
        pipe._as_loaded = pipe._weights()
        return pipe

    @property
    def dit(self) -> JDiT | Denoiser:
        """The transformer, or an artifact's network. A model's linears are parameters from here on, which sampling in
        16 bit on a CPU does without as long as nobody asks: it has them in the layout that it multiplies fastest.

        Raises:
            InputError: asked for the first time in a callback of a run.
        """
        if isinstance(self._dit, JDiT) and prepacked(self._dit):
            with self.executor.turn():
                untouched = self._as_loaded == self._weights()
                unpack_(self._dit)
                if untouched:
                    self._as_loaded = self._weights()
        return self._dit

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
        if not isinstance(self._dit, JDiT) or not isinstance(self.vae, STVAE):
            return []
        return [(id(tensor), tensor._version) for net in (self._dit, self.vae) for tensor in net.parameters()]

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<Pipeline {self.source}: {self.size} px, impl {self.impl}, {self.device}, {dtype}>"

    @own_state()
    def task(
        self,
        context: str | os.PathLike | EncodedContext | Iterable[Sequence[Any] | contexts.Pair],
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
        latent_frames = images.latent_frames(clips.frames_per_clip)
        self.executor.check_memory(task_shape(1, clips.pairs, latent_frames, size, guided=False))
        # Not the generator of the noise, which may well have the same seed.
        generator = torch.Generator().manual_seed(seed ^ 0x5DEECE66D) if posterior == "sample" else None
        latents = torch.cat(self.encode(clips, generator), dim=2)
        # Hashing the VAE takes longer than encoding: it waits until the context is saved or compared.
        fingerprint: Any = partial(getattr, self, "vae_fingerprint")
        encoded = EncodedContext(latents, fingerprint, size, posterior, clips.pairs, clips.frames_per_clip)
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
            check_kept_keys(context.kept, self.network, self.dit_fingerprint, rows, context.source)


def check_posterior(posterior: str) -> None:
    """Raises an `InputError` for what cannot be taken of the VAE's posterior."""
    if posterior not in POSTERIORS:
        raise InputError(f"posterior is {posterior!r}; expected one of {', '.join(POSTERIORS)}")


def _load_artifact(
    files: Artifact, device: str | torch.device, dtype: str | torch.dtype, trust: bool, progress: Progress | None
) -> tuple[ArtifactNetwork, ArtifactVAE]:
    manifest = files.manifest
    if device == "auto" and manifest.target["device"] != "any":
        device = manifest.target["device"]
    if dtype != "auto":
        manifest = manifest.computing_in(resolve_dtype(dtype, torch.device("cpu")))
    # A folder that the user named is theirs; what a hub gave runs code only for who trusts it.
    trust = trust or not files.fetched
    return load_artifact(manifest, resolve_device(device), trust, progress)[:2]


def _is_encoded_file(context: Any) -> TypeGuard[str | os.PathLike]:
    return isinstance(context, str | os.PathLike) and os.fspath(context).endswith(".safetensors")
