"""A network with its VAE, on one device: what tasks run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Protocol

import torch

from lavin_rt.devices import out_of_memory
from lavin_rt.dit.model import JDiT
from lavin_rt.errors import NonFiniteError, TooLittleMemory
from lavin_rt.kept_keys import transformer_fingerprint
from lavin_rt.pictures import images
from lavin_rt.sampling.denoisers import Denoiser, make_network
from lavin_rt.sampling.executor import Executor
from lavin_rt.sampling.speeds import Speed, speed_of
from lavin_rt.vae.model import STVAE, Posterior, scale_latents, unscale_latents

PIXELS_TOGETHER = 512 * 512  # of all the pictures that the VAE encodes in one pass on a GPU
# Of all that it decodes in one pass where no graph is captured for one. On a CPU four of 64 x 64 take 0.6 of the time
# that they take one by one, of 128 x 128 0.7, and from 192 x 192 on there is nothing to gain.
PIXELS_DECODED = 256 * 256


class VAE(Protocol):
    """What an engine calls of an autoencoder: `STVAE`, or an artifact's."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, pixels: torch.Tensor, *, tile: int | None = None, chunk: int | None = None) -> Posterior: ...

    def decode(self, latents: torch.Tensor, *, tile: int | None = None, chunk: int | None = None) -> torch.Tensor: ...


class Engine:
    """Encodes, samples and decodes; serves requests from several threads in turn.

    Its arguments are described at `lavin_rt.pipeline.Pipeline`, which users make.
    """

    def __init__(
        self,
        dit: JDiT | Denoiser,
        vae: VAE,
        impl: str = "auto",
        compile: bool = False,
        graphs: bool = True,
        tile: int | None = None,
        chunk: int | None = None,
    ):
        self.network = make_network(dit, impl, compile) if isinstance(dit, JDiT) else dit
        self.vae = vae.in_form(self.network.impl) if isinstance(vae, STVAE) else vae
        self.executor = Executor(self.network, graphs)
        self.tile, self.chunk = tile, chunk

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

    @cached_property
    def vae_fingerprint(self) -> str:
        """Hash of the VAE's tensors, which an encoded context carries; made once."""
        return self.vae.fingerprint

    @cached_property
    def dit_fingerprint(self) -> str:
        """Hash of a part of the transformer's tensors, which kept keys and values carry; made once.

        Raises:
            InputError: the network is an artifact's, whose parameters are not at hand.
        """
        return transformer_fingerprint(self.network)

    def speed(self, speed: str | Speed) -> Speed:
        """The speed that a name means, if the network has it.

        Raises:
            InputError: no such name, or one that an artifact was not exported for.
        """
        chosen = speed_of(speed)
        self.network.check_speed(chosen)
        return chosen

    def encode(self, clips: Sequence[torch.Tensor], generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """Scaled latents of clips, a few at a time so that memory does not grow with their number.

        Args:
            clips: each `[1, 3, T, H, W]` float32 in [-1, 1], of one shape.
            generator: draws from the posterior; None takes its mean.

        Returns:
            `[1, 16, 1 + (T - 1) / 4, H / 8, W / 8]` float32 each, on the CPU.
        """
        latents_of = partial(_latents_of, self.vae, self.tile, self.chunk, generator)

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
        """Pictures of scaled latents `[n, 16, t, h, w]`: `[n * T, 3, H, W]` uint8 on the CPU.

        Raises:
            NonFiniteError: a pixel is NaN or infinite.
        """
        frames_of = partial(_frames_of, self.vae, self.tile, self.chunk)

        def run() -> torch.Tensor:
            together = 1 if self.executor.graphs else max(1, PIXELS_DECODED // (64 * latents[0, 0].numel()))
            return torch.cat([self._replayed("decode", frames_of, part) for part in latents.split(together)]).cpu()

        frames = self._within_memory(run, f"decode {_shown(latents)} latents")
        if not frames[:, -1].all():
            raise NonFiniteError
        height, width = (8 * side for side in latents.shape[3:])
        return frames[:, :-1].unflatten(1, (3, height, width)).contiguous()

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
        vae = self.vae
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


# Functions of their own, without the engine: a captured one is held by the engine's graphs.


def _latents_of(
    vae: VAE, tile: int | None, chunk: int | None, generator: torch.Generator | None, pixels: torch.Tensor
) -> torch.Tensor:
    posterior = vae.encode(pixels, tile=tile, chunk=chunk)
    return scale_latents((posterior.mode() if generator is None else posterior.sample(generator)).float())


def _frames_of(vae: VAE, tile: int | None, chunk: int | None, latents: torch.Tensor) -> torch.Tensor:
    return images.flagged_frames(vae.decode(unscale_latents(latents), tile=tile, chunk=chunk))


def _shown(clip: torch.Tensor) -> str:
    return f"{clip.shape[2]}x{clip.shape[3]}x{clip.shape[4]}"
