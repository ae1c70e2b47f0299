"""Training pairs as latents: every picture goes through the VAE once, before the transformer's training begins."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lavin_rt.errors import InputError
from lavin_rt.files import written_whole
from lavin_rt.mini.corpus import PHOTOGRAPHS_SHARE, Corpus, to_pixels
from lavin_rt.mini.scenes import Picture
from lavin_rt.mini.sources import photograph_crop
from lavin_rt.mini.tasks import Task
from lavin_rt.vae import STVAE, scale_latents

ENCODE_BATCH = 32
LATENTS_VERSION = 5  # bumped when tasks of the same name, or the files, come out otherwise


@dataclasses.dataclass(frozen=True, eq=False)
class TaskLatents:
    """A task's pairs: rows of `LatentPool.latents`, int64 `[variants, pairs, 2]`, input and target, for every
    variant of the target (`Task.variants`).
    """

    name: str
    rows: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class LatentPool:
    """Scaled latents `[N, 16, t, h, w]` float16, and every task's pairs in them."""

    latents: torch.Tensor
    tasks: tuple[TaskLatents, ...]

    def save(self, path: str | os.PathLike) -> None:
        with written_whole(path) as partial:
            torch.save({"latents": self.latents, "tasks": {task.name: task.rows for task in self.tasks}}, partial)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatentPool:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            return cls(content["latents"], tuple(TaskLatents(*item) for item in content["tasks"].items()))
        except (OSError, RuntimeError, KeyError) as error:
            raise InputError(f"{path}: damaged latents; remove the file and run again") from error


class _Encoder:
    """Collects frames, encodes them in batches."""

    def __init__(self, vae: STVAE, progress: tqdm):
        self.vae, self.progress = vae, progress
        self.waiting: list[np.ndarray] = []
        self.done: list[torch.Tensor] = []
        self.rows: dict[bytes, int] = {}

    def add(self, frames: np.ndarray) -> int:
        """Takes uint8 `[T, S, S, 3]`, returns its row; what came before is not encoded again."""
        digest = hashlib.sha256(frames.tobytes()).digest()
        if digest not in self.rows:
            self.rows[digest] = len(self.rows)
            self.waiting.append(frames)
            if len(self.waiting) == ENCODE_BATCH:
                self.flush()
        return self.rows[digest]

    def add_task(self, task: Task, pairs: Sequence[Sequence[np.ndarray]]) -> TaskLatents:
        """Takes inputs and targets of `task.make`, uint8 `[T, S, S, 3]`."""
        rows = [[[self.add(shown), self.add(vary(target))] for shown, target in pairs] for vary in task.variants]
        return TaskLatents(task.name, torch.tensor(rows))

    @torch.no_grad()
    def flush(self) -> None:
        if self.waiting:
            pixels = to_pixels(np.stack(self.waiting)).to(next(self.vae.parameters()).device)
            self.done.append(scale_latents(self.vae.encode(pixels).mode()).half().cpu())
            self.progress.update(len(self.waiting))
            self.waiting = []


def encode_pictures(
    corpus: Corpus, vae: STVAE, tasks: Sequence[Task], photographs: int, degraded: int, seed: int = 0
) -> LatentPool:
    """Pairs of picture tasks from all scenes and from `photographs` crops.

    Every scene is taken once, mirrored or not. Tasks that spoil a picture are made of `degraded` pictures each, of
    which photographs have their share.
    """
    rng = np.random.default_rng([seed, 2])
    scenes = [corpus.still(i, bool(rng.random() < 0.5)) for i in range(len(corpus.scenes))]
    photos = [Picture(photograph_crop(corpus.split, rng, corpus.size)) for _ in range(photographs)]
    single = [scenes[i] for i in corpus.single]
    with tqdm(desc="encoding pictures", unit="picture") as progress:
        encoder = _Encoder(vae, progress)
        found = []
        for task in tasks:
            if task.source == "any":
                from_photos = min(round(degraded * PHOTOGRAPHS_SHARE), len(photos))
                chosen = [photos[i] for i in rng.permutation(len(photos))[:from_photos]]
                chosen += [scenes[i] for i in rng.permutation(len(scenes))[: degraded - from_photos]]
            else:
                chosen = single if task.source == "single" else scenes
            pairs = [[frames[None] for frames in task.make(picture, rng)] for picture in chosen]
            found.append(encoder.add_task(task, pairs))
        encoder.flush()
    return LatentPool(torch.cat(encoder.done), tuple(found))


def encode_clips(corpus: Corpus, vae: STVAE, tasks: Sequence[Task], seed: int = 0) -> LatentPool:
    """Pairs of clip tasks, every clip once as it is and once mirrored."""
    rng = np.random.default_rng([seed, 3])
    with tqdm(desc="encoding clips", unit="clip") as progress:
        encoder = _Encoder(vae, progress)
        clips = [corpus.clip(index, mirrored) for index in range(len(corpus.clips)) for mirrored in (False, True)]
        found = [encoder.add_task(task, [task.make(frames, rng) for frames in clips]) for task in tasks]
        encoder.flush()
    return LatentPool(torch.cat(encoder.done), tuple(found))


def cached_latents(
    folder: str | os.PathLike,
    corpus: Corpus,
    vae: STVAE,
    fingerprint: str,
    picture_tasks: Sequence[Task],
    clip_tasks: Sequence[Task],
    photographs: int,
    degraded: int,
    seed: int = 0,
) -> tuple[LatentPool, LatentPool]:
    """Latents of pictures and of clips, kept in `folder` under the VAE's fingerprint and the amounts of data."""
    data = f"{corpus.size}px-{len(corpus.scenes)}-{len(corpus.clips)}-{photographs}-{degraded}-{seed}"
    names = [f"latents-v{LATENTS_VERSION}-{kind}-{fingerprint[:12]}-{data}.pt" for kind in ("pictures", "clips")]
    files = [Path(folder) / name for name in names]
    if not files[0].is_file():
        encode_pictures(corpus, vae, picture_tasks, photographs, degraded, seed).save(files[0])
    if not files[1].is_file():
        encode_clips(corpus, vae, clip_tasks, seed).save(files[1])
    return LatentPool.load(files[0]), LatentPool.load(files[1])
