"""Encoded contexts, in memory and in files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lavin_rt.errors import InputError
from lavin_rt.files import utf8_path, written_whole
from lavin_rt.pictures import images
from lavin_rt.pictures.context import check_query_frames

_FORMAT, _VERSION = "lavin-rt encoded context", "1"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
THUMBNAILS, KEPT, KEPT_FINGERPRINT = "thumbnails", "kept_keys", "kept_keys_fingerprint"
ANEW = "make the pack again with --keep-keys, or without"


@dataclasses.dataclass(frozen=True, eq=False)
class KeptKeys:
    """What the context's frames leave in every block of one transformer (`lavin_rt.kept_keys`).

    Attributes:
        parts: `[2 * depth, context rows, kv_heads, head_size]`, of every block in turn keys and values.
        fingerprint: of the transformer.
    """

    parts: torch.Tensor
    fingerprint: str

    @classmethod
    def read(cls, file: Any, source: str) -> KeptKeys:
        """Those in an opened safetensors file; raises `InputError` for what are none."""
        parts = file.get_tensor(KEPT).clone()
        if parts.ndim != 4 or not _finite(parts):
            found = f"{str(parts.dtype).removeprefix('torch.')} {list(parts.shape)}"
            raise InputError(
                f"{source}: kept keys and values are {found}, expected finite numbers "
                f"[2 * blocks, rows, heads, head size]; {ANEW}"
            )
        return cls(parts, file.metadata().get(KEPT_FINGERPRINT, ""))


def _finite(values: torch.Tensor) -> bool:
    """Whether they are finite numbers, of a type that PyTorch calculates with: with those of 8 bits it does not."""
    return values.dtype in FLOATS and bool(values.isfinite().all())


class WhenRead:
    """A dataclass's field of text that takes it, or a function that gives it when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> str:
        if instance is None:
            raise AttributeError(self._name)  # no default
        value = instance.__dict__[self._name]
        if callable(value):
            value = instance.__dict__[self._name] = value()
        return value

    def __set__(self, instance: object, value: str | Callable[[], str]) -> None:
        instance.__dict__[self._name] = value


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedContext:
    """A context as the diffusion transformer reads it, encoded once for any number of queries.

    Attributes:
        latents: `[1, 16, F, h, w]`, `h = height / 8`, already scaled (`(z - shift) * scale` after the VAE's encoder);
            F is the latent frames of `in1, target1, in2, target2, ...` one after another.
        vae_fingerprint: `vae_fingerprint` of the VAE that encoded it, or what computes it once it is asked for.
        size: (height, width) of the frames, pixels.
        posterior: "mean" or "sample", what was taken of the VAE's posterior.
        pairs: how many.
        frames_per_clip: frames of every input and target, `1 + 4 k`.
        source: where it comes from, for messages.
        kept: keys and values of the pairs in one transformer, or None.
    """

    latents: torch.Tensor
    if TYPE_CHECKING:
        vae_fingerprint: str  # mypy would take the descriptor for a default
    else:
        vae_fingerprint: str = WhenRead()
    size: tuple[int, int]
    posterior: str
    pairs: int
    frames_per_clip: int
    source: str = "encoded context"
    kept: KeptKeys | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, `latents` and metadata, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        self.save_with(path, {}, {})

    def save_with(self, path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], more: Mapping[str, str]) -> None:
        """Writes the file of `save` with more tensors and metadata, as a task pack has them."""
        from safetensors.torch import save

        described = {
            "format": _FORMAT,
            "version": _VERSION,
            "vae_fingerprint": self.vae_fingerprint,
            "size": f"{self.size[0]}x{self.size[1]}",
            "posterior": self.posterior,
            "pairs": str(self.pairs),
            "frames_per_clip": str(self.frames_per_clip),
        }
        tensors = {"latents": self.latents.detach().cpu().contiguous(), **tensors}
        if self.kept is not None:
            tensors[KEPT], described[KEPT_FINGERPRINT] = self.kept.parts, self.kept.fingerprint
        content = save(tensors, metadata={**more, **described})
        images.check_writable(path)
        with written_whole(path) as partial:
            partial.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> EncodedContext:
        """Reads what `save` wrote, on the CPU and in the dtype it was saved in.

        Raises:
            InputError: no such file, truncated, another kind of file or version, or a contradiction.
        """
        from safetensors import SafetensorError, safe_open

        name = images.source_name(path)
        foreign = f"{name}: not an encoded context of lavin-rt"
        try:
            with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
                described = file.metadata() or {}
                if described.get("format") != _FORMAT:
                    raise InputError(f"{foreign} (its metadata do not say so); expected a file saved as one")
                version = described.get("version", "none")
                if version != _VERSION:
                    raise InputError(f"{name}: is of version {version}, this package reads {_VERSION}; encode it again")
                # A task pack has small pictures of its pairs beside them (lavin_rt.packs).
                held = set(file.keys())
                if "latents" not in held or held - {"latents", THUMBNAILS, KEPT}:
                    raise InputError(f"{name}: holds {sorted(held)}, expected latents alone; encode it again")
                latents = file.get_tensor("latents").clone()
                kept = KeptKeys.read(file, name) if KEPT in held else None
        except FileNotFoundError:
            raise InputError(f"{name}: no such file; expected an encoded context") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"{foreign}, or truncated ({' '.join(str(error).split())}); encode it again") from error
        try:
            size = images.parse_size(described["size"])
            pairs, frames_per_clip = int(described["pairs"]), int(described["frames_per_clip"])
            images.check_clip_frames(frames_per_clip)
            posterior, fingerprint = described["posterior"], described["vae_fingerprint"]
        except (KeyError, ValueError) as error:
            raise InputError(f"{name}: damaged metadata ({error}); encode it again") from error
        shape = [1, 16, 2 * pairs * images.latent_frames(frames_per_clip), size[0] // 8, size[1] // 8]
        if pairs < 1 or list(latents.shape) != shape or not _finite(latents):
            found = f"{str(latents.dtype).removeprefix('torch.')} {list(latents.shape)}"
            raise InputError(f"{name}: latents are {found}, expected finite numbers {shape}; encode it again")
        return cls(latents, fingerprint, size, posterior, pairs, frames_per_clip, name, kept)

    def check(
        self,
        vae_fingerprint: str,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        posterior: str | None = None,
    ) -> None:
        """Refuses to be used with another VAE, or where given, at another size, frame count or posterior.

        Raises:
            InputError: one of them differs; names both values.
        """
        if vae_fingerprint != self.vae_fingerprint:
            raise InputError(
                f"{self.source}: encoded by another VAE (fingerprint {self.vae_fingerprint[:12]}, this one has "
                f"{vae_fingerprint[:12]}); encode the task's context again with this VAE"
            )
        if size is not None and tuple(size) != self.size:
            raise InputError(
                f"{self.source}: encoded at size {self.size[0]}x{self.size[1]}, asked for {size[0]}x{size[1]}; "
                f"run at {self.size[0]}x{self.size[1]} or encode it again"
            )
        if posterior is not None and posterior != self.posterior:
            raise InputError(
                f"{self.source}: holds the posterior's {self.posterior}, asked for {posterior}; encode it again"
            )
        if frames is not None:
            check_query_frames(frames, self.frames_per_clip)
