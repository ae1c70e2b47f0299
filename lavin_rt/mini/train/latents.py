"""Training pairs as latents: every picture goes through the VAE once, and its latent stays on the device."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from lavin_rt.errors import TooLittleMemory
from lavin_rt.files import written_whole
from lavin_rt.mini.world.pieces import CLIPS, PICTURES, Piece, PieceMaker
from lavin_rt.vae.model import STVAE, scale_latents

ENCODE_BATCH = {"cuda": 2048, "cpu": 64}  # frames at once
AHEAD = 4  # pieces read while others are encoded


@dataclasses.dataclass(frozen=True, eq=False)
class TaskLatents:
    """A task's pairs: rows of `LatentPool.latents`, int64 `[members, pairs, 2]`, input and target, for every trained
    member of the task. Of a folder's pairs `digest` is a hash of their pictures.
    """

    name: str
    rows: torch.Tensor
    digest: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class LatentPool:
    """Scaled latents `[N, 16, t, h, w]` float16, and every task's pairs in them."""

    latents: torch.Tensor
    tasks: tuple[TaskLatents, ...]

    def draw(
        self,
        edges: torch.Tensor,
        pairs: int,
        batch: int,
        generator: torch.Generator,
        repeat: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random contexts, drawn where the latents lie and without waiting for the device.

        Args:
            edges: running sums of the tasks' shares of the samples, up to 1, `[tasks]` on the latents' device.
            pairs: of every context.
            batch: contexts.
            generator: of the latents' device.
            repeat: share of the contexts whose query is one of the pairs.

        Returns:
            conditions `[batch, 16, (2 pairs + 1) t, h, w]`, targets `[batch, 16, t, h, w]`, both float32, and the
            contexts' tasks, int64 `[batch]`.
        """
        table, offsets, members, counts = self._index
        device = table.device
        draws = torch.rand(batch, 4, generator=generator, device=device)
        chosen = torch.searchsorted(edges, draws[:, 0].contiguous()).clamp_(max=len(self.tasks) - 1)
        member = (draws[:, 1] * members[chosen]).long().clamp_(max=members[chosen] - 1)
        count, wanted = counts[chosen, None], pairs + 1
        # All different, where there are so many: sorted draws with repeats, spread by their places, in random order.
        places = torch.rand(batch, wanted, generator=generator, device=device, dtype=torch.float64)
        places = (places * (count - pairs).clamp(min=1)).long().sort(1).values
        places = (places + torch.arange(wanted, device=device)) % count
        order = torch.rand(batch, wanted, generator=generator, device=device).argsort(1)
        picked = places.gather(1, order)
        one_of_them = picked.gather(1, (draws[:, 2:3] * pairs).long().clamp_(max=pairs - 1))
        picked[:, -1:] = torch.where(draws[:, 3:] < repeat, one_of_them, picked[:, -1:])
        rows = table[offsets[chosen, None] + member[:, None] * count + picked].flatten(1)  # [batch, 2 pairs + 2]
        frames = self.latents[rows].float().transpose(1, 2)  # [batch, 16, 2 pairs + 2, t, h, w]
        return frames[:, :, :-1].flatten(2, 3), frames[:, :, -1], chosen

    @functools.cached_property
    def _index(self) -> tuple[torch.Tensor, ...]:
        """All tasks' rows `[M, 2]`, and by task where they begin, their members and their pairs, `[tasks]`."""
        rows = [task.rows for task in self.tasks]
        sizes = [part.shape[0] * part.shape[1] for part in rows]
        starts = [0, *itertools.accumulate(sizes)][:-1]
        numbers = [starts, [part.shape[0] for part in rows], [part.shape[1] for part in rows]]
        kept = torch.cat([part.reshape(-1, 2) for part in rows]), *map(torch.tensor, numbers)
        return tuple(part.to(self.latents.device) for part in kept)


class _Collector:
    """Puts the pieces of one kind together."""

    def __init__(self):
        self.latents: list[torch.Tensor] = []
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.count = 0

    def add(self, latents: torch.Tensor, piece: Piece) -> None:
        for name, rows in piece.rows.items():
            self.rows.setdefault(name, []).append(torch.from_numpy(rows).long() + self.count)
        self.latents.append(latents)
        self.count += len(latents)

    def pool(self) -> LatentPool | None:
        if not self.count:
            return None
        tasks = tuple(TaskLatents(name, torch.cat(parts, dim=1)) for name, parts in self.rows.items())
        latents = torch.empty(
            self.count, *self.latents[0].shape[1:], dtype=torch.float16, device=self.latents[0].device
        )
        for start, part in zip(itertools.accumulate(map(len, self.latents), initial=0), self.latents, strict=False):
            latents[start : start + len(part)] = part
        self.latents = []
        return LatentPool(latents, tasks)


def to_device(frames: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 `[N, T, S, S, 3]` to float32 `[N, 3, T, S, S]` in [-1, 1] on a device."""
    return frames.to(device, non_blocking=True).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


@torch.no_grad()
def encode(vae: STVAE, frames: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Scaled latents `[N, 16, t, S/8, S/8]` float16 on the device, of uint8 frames `[N, T, S, S, 3]`, in the arithmetic
    of `vae`. A batch that does not fit is halved.

    Raises:
        TooLittleMemory: a single picture or clip does not fit.
    """
    batch, done, start = max(1, ENCODE_BATCH[device.type] // frames.shape[1] ** 2), [], 0
    while start < len(frames):
        part = to_device(frames[start : start + batch], device)
        try:
            moments = vae.encoder(part.to(vae.dtype))
        except torch.OutOfMemoryError as error:
            if batch == 1:
                what = " x ".join(map(str, frames.shape[1:4]))
                raise TooLittleMemory(f"out of memory while encoding {what}; free some of the device's") from error
            batch //= 2
            torch.cuda.empty_cache()
            continue
        done.append(scale_latents(moments.float()[:, : vae.config.latent_channels]).half())
        start += batch
    return torch.cat(done)


def loaded(paths: Iterable[Path]) -> Iterator[tuple[Path, Piece]]:
    """Pieces, some read ahead; damaged ones are left out."""
    with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
        waiting: list[tuple[Path, concurrent.futures.Future]] = []
        for path in paths:
            waiting.append((path, pool.submit(Piece.load, path)))
            if len(waiting) > AHEAD:
                first, future = waiting.pop(0)
                if future.result() is not None:
                    yield first, future.result()
        for first, future in waiting:
            if future.result() is not None:
                yield first, future.result()


def encode_pieces(
    maker: PieceMaker, vae: STVAE, device: torch.device, patience: float
) -> tuple[LatentPool | None, LatentPool | None]:
    """Latents of pictures and of clips, of all pieces that arrive (see `PieceMaker.arriving`).

    On a GPU in float16 arithmetic, and in float32 where that overflows. On a CPU, which takes an hour for what a GPU
    does in a minute, a piece's latents are kept beside it.
    """
    once = device.type == "cpu"
    fast = vae if once else copy.deepcopy(vae).half()
    fingerprint = vae.fingerprint[:8]
    collected = {PICTURES: _Collector(), CLIPS: _Collector()}
    for path, piece in loaded(maker.arriving(patience)):
        kept = path.with_suffix(f".{fingerprint}.npy")
        latents = _read_latents(kept, len(piece.frames)) if once else None
        if latents is None:
            latents = encode(fast, torch.from_numpy(piece.frames), device)
            if not bool(latents.isfinite().all()):
                print(f"warning: {path.name} overflowed in float16; encoded again in float32", flush=True)
                latents = encode(vae, torch.from_numpy(piece.frames), device).clamp(-60, 60)
            if once:
                with written_whole(kept) as partial, partial.open("wb") as file:
                    np.save(file, latents.numpy())
        collected[maker.kind(path)].add(latents, piece)
    return collected[PICTURES].pool(), collected[CLIPS].pool()


def _read_latents(path: Path, frames: int) -> torch.Tensor | None:
    """What an earlier run kept of a piece of so many frames, if it is whole."""
    try:
        latents = torch.from_numpy(np.load(path))
    except (OSError, ValueError, EOFError):
        return None
    return latents if len(latents) == frames else None
