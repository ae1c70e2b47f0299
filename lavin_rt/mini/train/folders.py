"""Training on anybody's pairs: folders in the templates' layout, each a task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from lavin_rt.errors import InputError
from lavin_rt.mini.train.latents import LatentPool, TaskLatents, encode
from lavin_rt.pictures.context import read_template
from lavin_rt.pictures.images import load_clip, resize
from lavin_rt.vae.model import STVAE


def folder_pools(
    folders: Sequence[Path], vae: STVAE, size: int, device: torch.device
) -> tuple[LatentPool | None, LatentPool | None]:
    """Latents of all pairs of the folders, pictures and clips apart; a task has its folder's name.

    Args:
        folders: each with `<name>_input` and `<name>_target` pictures, or folders of frames.
        vae: what encodes, on the device.
        size: of pictures, pixels a side, a multiple of 16; other shapes are squeezed into it.
        device: where the latents are to lie.

    Raises:
        InputError: a folder of fewer than two pairs, one name twice, or clips that do not all have one number of
            frames.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"two of the folders {', '.join(names)} have one name; rename one, as it is the task's")
    if size < 1 or size % 16:
        raise InputError(f"size is {size}; expected a positive multiple of 16")
    latents: dict[int, list[torch.Tensor]] = {}
    tasks: dict[int, list[TaskLatents]] = {}
    for name, folder in zip(names, folders, strict=True):
        pairs = [(load_clip(pair.input), load_clip(pair.target)) for pair in read_template(folder)]
        if len(pairs) < 2:
            raise InputError(f"{folder}: one pair; expected at least two, one of which is the query; add pairs")
        frames = {len(clip) for pair in pairs for clip in pair}
        if len(frames) > 1:
            raise InputError(f"{folder}: clips of {sorted(frames)} frames; expected the same number in all")
        [count] = frames
        digest = hashlib.sha256()
        for clip in (clip for pair in pairs for clip in pair):
            digest.update(f"{list(clip.shape)}".encode() + clip.contiguous().numpy().data)
        stacked = torch.stack([resize(clip, (size, size)) for pair in pairs for clip in pair])  # [2 N, T, 3, S, S]
        before = sum(map(len, latents.get(count, [])))
        rows = before + torch.arange(2 * len(pairs)).view(1, -1, 2)
        latents.setdefault(count, []).append(encode(vae, stacked.permute(0, 1, 3, 4, 2), device))
        tasks.setdefault(count, []).append(TaskLatents(name, rows, digest.hexdigest()))
    moving = sorted(set(latents) - {1})
    if len(moving) > 1:
        raise InputError(f"clips of {moving} frames in different folders; expected one number in all")
    pools = {count: LatentPool(torch.cat(latents[count]), tuple(tasks[count])) for count in latents}
    return pools.get(1), pools.get(moving[0]) if moving else None
