"""Pictures in, pictures out: a checkpoint, a task shown by example pairs, and queries."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lavin_rt import context as contexts
from lavin_rt import images
from lavin_rt.checkpoint import Checkpoint, find_checkpoint, load_dit, load_vae
from lavin_rt.context import EncodedContext
from lavin_rt.errors import InputError
from lavin_rt.model import JDiT
from lavin_rt.packed import resolve_impl
from lavin_rt.sampler import Callback, current_device, sample
from lavin_rt.vae import STVAE, scale_latents, unscale_latents

if TYPE_CHECKING:
    from PIL import Image

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POSTERIORS = ("mean", "sample")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device that a name means; `"auto"` is CUDA where there is one, else the CPU.

    Raises:
        InputError: no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError):
        found = f"cpu, cuda:0..{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
        raise InputError(f"no device {str(device)!r} on this machine; expected auto or one of {found}") from None
    if resolved.type == "meta":
        raise InputError("device 'meta' holds no numbers; expected auto, cpu or cuda")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a name means; `"auto"` is bfloat16 on CUDA with compute capability 8.0 or newer, else float32."""
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float32
    resolved = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise InputError(f"dtype is {str(dtype)!r}; expected auto, {', '.join(DTYPES)}")
    return resolved


def check_seed(seed: int, count: int = 1) -> None:
    """Raises an `InputError` unless `count` seeds from `seed` on are what a generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed <= 2**64 - count:
        raise InputError(f"seed is {seed!r}; expected a whole number from -2**63 to 2**64 - {count}")


def draw_noise(
    seeds: Sequence[int], frames: int, size: tuple[int, int], channels: int = 16, factor: int = 8
) -> torch.Tensor:
    """Noise of every query, drawn on the CPU in float32 so that a seed means the same on every device.

    Returns:
        `[len(seeds), channels, frames, height / factor, width / factor]` float32, item i from `seeds[i]` alone.
    """
    shape = (1, channels, frames, size[0] // factor, size[1] // factor)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What one query gave.

    Attributes:
        frames: `[T, 3, H, W]` uint8.
        latents: `[1, 16, t, h, w]` float32, scaled, before decoding.
        seed: of the noise; None where the caller gave the noise.
    """

    frames: torch.Tensor
    latents: torch.Tensor
    seed: int | None

    @property
    def image(self) -> Image.Image | list[Image.Image]:
        """The picture, or the list of a clip's frames."""
        pictures = [images.to_pil(frame) for frame in self.frames]
        return pictures[0] if len(pictures) == 1 else pictures


class Pipeline:
    """A diffusion transformer with its VAE.

    Args:
        dit, vae: both on the device and in the dtype that they shall run in.
        impl: `"auto"`, `"plain"`, `"torch"` or `"triton"`; settled here, once, and readable as `pipe.impl`.
        compile: run the network through `torch.compile`.
        tile, chunk: latent rows and columns per VAE tile and latent frames per VAE piece, for pictures too large and
            clips too long for memory; None encodes and decodes all at once (exact).
        template_roots: folders in which `task("depth")` looks for a task by name.
        source: where the weights came from, for records.
    """

    def __init__(
        self,
        dit: JDiT,
        vae: STVAE,
        impl: str = "auto",
        compile: bool = False,
        tile: int | None = None,
        chunk: int | None = None,
        template_roots: Sequence[Path] = (),
        source: str = "memory",
    ):
        self.impl = resolve_impl(impl, dit.device, dit.config)
        self.dit, self.vae = dit.eval(), vae.eval()
        self.compile = compile
        self.tile, self.chunk = tile, chunk
        self.template_roots = tuple(template_roots)
        self.source = source
        self._fingerprint: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike | Checkpoint,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        impl: str = "auto",
        compile: bool = False,
        tile: int | None = None,
        chunk: int | None = None,
        revision: str | None = None,
        strict: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Pipeline:
        """Loads a folder, a `weights.tar.gz` or a Hugging Face id with the official files.

        Args:
            checkpoint: a folder with `lavin_dit.safetensors` and `stvae.pt` or `stvae.safetensors`, the published
                archive, a hub id, or what `find_checkpoint` found.
            device, dtype, impl: `"auto"` picks once, by what the machine has.
            revision: of a hub id.
            strict: treat unexpected tensors as an error instead of a warning.
            progress: `(bytes done, bytes in all)` while an archive is unpacked and while the transformer is read.

        Raises:
            InputError: files, tensors or a device that are not there or do not fit.
        """
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        files = checkpoint
        if not isinstance(files, Checkpoint):
            files = find_checkpoint(files, revision=revision, progress=progress)
        dit = load_dit(files.dit, device=device, dtype=dtype, strict=strict, progress=progress)
        vae = load_vae(files.vae, device=device, dtype=dtype, strict=strict)
        roots = [files.templates] if files.templates else []
        return cls(dit, vae, impl, compile, tile, chunk, roots, files.source)

    @property
    def device(self) -> torch.device:
        return self.dit.device

    @property
    def _vae(self) -> STVAE:
        """The VAE, computing as this pipeline does; another one may share it."""
        return self.vae.use(self.impl)

    @property
    def vae_fingerprint(self) -> str:
        """Hash of the VAE's tensors, which an encoded context carries."""
        if self._fingerprint is None:
            self._fingerprint = contexts.vae_fingerprint(self.vae.state_dict())
        return self._fingerprint

    def task(
        self,
        context: str | os.PathLike | EncodedContext | Iterable[tuple[Any, Any]],
        pairs: int = 4,
        size: int | str | tuple[int, int] = 512,
        seed: int = 0,
        repeats: bool = False,
        posterior: str = "mean",
    ) -> Task:
        """Encodes a task's context once, for any number of queries.

        Args:
            context: a template folder (`*_input.png`, `*_target.png`), the name of a task in the checkpoint's
                templates, an encoded context or its `.safetensors` file, or pairs `[(input, target), ...]` (pictures
                or clips; all are used, in order).
            pairs: how many pairs to choose from a folder; pairs given and encoded contexts are used whole.
            size: (height, width) in pixels, multiples of 16.
            seed: of the choice, and of the posterior's sample.
            repeats: choose with repeats, as the published scripts do.
            posterior: `"mean"`, or `"sample"` to draw the VAE's latents.

        Raises:
            InputError: whatever of these cannot be used.
        """
        size = images.parse_size(size)
        check_seed(seed)
        if posterior not in POSTERIORS:
            raise InputError(f"posterior is {posterior!r}; expected one of {', '.join(POSTERIORS)}")
        if not isinstance(context, EncodedContext) and _is_encoded_file(context):
            context = EncodedContext.load(context)
        if isinstance(context, EncodedContext):
            context.check(self.vae_fingerprint, size, posterior=posterior)
            return Task(self, context)
        if isinstance(context, str | os.PathLike):
            folder = contexts.find_task(context, self.template_roots)
            chosen = contexts.choose_pairs(contexts.read_template(folder), pairs, seed, repeats)
        else:
            chosen = contexts.given_pairs(context)
        clips = contexts.ContextFrames.prepare(chosen, size)
        images.check_clip_frames(clips.frames_per_clip, "context")
        # Not the generator of the noise, which may well have the same seed.
        generator = torch.Generator().manual_seed(seed ^ 0x5DEECE66D) if posterior == "sample" else None
        latents = torch.cat(self.encode(clips, generator), dim=2)
        encoded = EncodedContext(latents, self.vae_fingerprint, size, posterior, clips.pairs, clips.frames_per_clip)
        return Task(self, encoded, clips)

    @torch.no_grad()
    def encode(self, clips: Sequence[torch.Tensor], generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """Scaled latents of clips, one by one so that memory does not grow with their number.

        Args:
            clips: each `[1, 3, T, H, W]` float32 in [-1, 1].
            generator: draws from the posterior; None takes its mean.

        Returns:
            `[1, 16, 1 + (T - 1) / 4, H / 8, W / 8]` float32 each, on the CPU.
        """
        encoded = []
        with current_device(self.device):
            for clip in clips:
                posterior = self._vae.encode(clip.to(self.device), tile=self.tile, chunk=self.chunk)
                latents = posterior.mode() if generator is None else posterior.sample(generator)
                encoded.append(scale_latents(latents.float()).cpu())
        return encoded

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of scaled latents `[1, 16, t, h, w]`: `[T, 3, H, W]` uint8 on the CPU."""
        with current_device(self.device):
            pixels = self._vae.decode(unscale_latents(latents.to(self.device)), tile=self.tile, chunk=self.chunk)
        return images.from_pixels(pixels.float())[0].transpose(0, 1).cpu()


class Task:
    """A context encoded for a pipeline; call it with queries.

    Attributes:
        context: the encoded pairs, which `context.save(path)` keeps for later.
        frames: the pairs' pictures at the task's size, None where the context came encoded.
    """

    def __init__(self, pipeline: Pipeline, context: EncodedContext, frames: contexts.ContextFrames | None = None):
        self.pipeline = pipeline
        self.context = context
        self.frames = frames

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures that the network works on."""
        return self.context.size

    def __call__(self, query: Any, **options) -> Image.Image | list[Image.Image]:
        """Answers one query; the options are those of `run`, and `noise` `[1, 16, T, h, w]`."""
        return self.run([query], **options)[0].image

    def batch(self, queries: Sequence[Any], **options) -> list[Image.Image | list[Image.Image]]:
        """Answers several queries, `batch_size` at a time in one packed run; item i uses `seed + i`."""
        return [result.image for result in self.run(queries, **options)]

    def run(
        self,
        queries: Sequence[Any],
        steps: int = 20,
        guidance: float = 1.5,
        seed: int = 0,
        noise: torch.Tensor | None = None,
        batch_size: int = 4,
        keep_size: bool = False,
        callback: Callback | None = None,
    ) -> list[Result]:
        """Answers queries.

        Args:
            queries: pictures or clips: paths, PIL images, uint8 arrays `[H, W, 3]` or `[T, H, W, 3]`; all of one
                frame count.
            steps: knots of the schedule; the network runs `steps - 1` times.
            guidance: classifier-free guidance scale; 1.0 runs the conditional branch alone.
            seed: of the noise; query i uses `seed + i`.
            noise: `[queries, 16, T, h, w]` instead of a seed.
            batch_size: queries that run together.
            keep_size: return pictures at each query's own size instead of the task's.
            callback: `(step, evaluations, latents)` after every step.

        Returns:
            one `Result` per query, in order.

        Raises:
            InputError: a query that cannot be read or does not fit the context, or a bad option.
            NonFiniteError: naming the step at which the latents stopped being finite.
        """
        clips = [images.load_clip(query) for query in queries]
        if not clips:
            raise InputError("no queries; expected at least one picture")
        for clip in clips:
            images.check_clip_frames(len(clip), "query")
            contexts.check_query_frames(len(clip), self.context.frames_per_clip)
        check_seed(seed, len(clips))
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}; expected a positive whole number")
        latent_frames = 1 + (self.context.frames_per_clip - 1) // 4
        if noise is None:
            noise = draw_noise([seed + i for i in range(len(clips))], latent_frames, self.size)
            seeds: list[int | None] = [seed + i for i in range(len(clips))]
        else:
            expected = [len(clips), 16, latent_frames, self.size[0] // 8, self.size[1] // 8]
            if list(noise.shape) != expected:
                raise InputError(f"noise is {list(noise.shape)}; expected {expected}")
            seeds = [None] * len(clips)
        results = []
        for first in range(0, len(clips), batch_size):
            chunk = slice(first, first + batch_size)
            latents = self._sample(clips[chunk], noise[chunk], steps, guidance, seed + first, callback)
            for clip, one, used in zip(clips[chunk], latents.split(1), seeds[chunk], strict=True):
                frames = self.pipeline.decode(one)
                if keep_size:
                    frames = images.resize(frames, tuple(clip.shape[-2:]))
                results.append(Result(frames, one.cpu(), used))
        return results

    def _sample(
        self,
        clips: Sequence[torch.Tensor],
        noise: torch.Tensor,
        steps: int,
        guidance: float,
        seed: int,
        callback: Callback | None,
    ) -> torch.Tensor:
        pipe = self.pipeline
        pixels = [images.to_pixels(images.resize(clip, self.size)).transpose(0, 1)[None] for clip in clips]
        conditions = []
        for i, clip in enumerate(pixels):
            generator = None
            if self.context.posterior == "sample":
                generator = torch.Generator().manual_seed(seed + i)
                torch.randn(noise.shape[1:], generator=generator)  # the posterior's draw comes behind the noise's
            conditions.append(torch.cat([self.context.latents, *pipe.encode([clip], generator)], dim=2))
        cond = torch.cat(conditions)
        return sample(pipe.dit, cond, noise, steps, guidance, pipe.impl, noise.shape[2], pipe.compile, callback)

    def warmup(self, steps: int = 20, guidance: float = 1.5) -> float:
        """Answers one black query, so that compilation and caches are behind it; returns the seconds it took."""
        began = time.perf_counter()
        height, width = self.size
        self.run([torch.zeros(self.context.frames_per_clip, height, width, 3, dtype=torch.uint8)], steps, guidance)
        return time.perf_counter() - began


def _is_encoded_file(context: Any) -> bool:
    return isinstance(context, str | os.PathLike) and os.fspath(context).endswith(".safetensors")
