"""What a verification runs of the speeds that an artifact serves: the denoiser that keeps keys and values, and whole
runs.
"""

from __future__ import annotations

import torch

from lavin_export.networks.denoiser import BranchDenoiser
from lavin_rt.artifact.load import ArtifactNetwork
from lavin_rt.artifact.manifest import KEPT, Manifest
from lavin_rt.artifact.speeds import EXACT
from lavin_rt.dit.layout import REUSED, STORED, Form, Shape
from lavin_rt.dit.model import JDiT
from lavin_rt.dit.modulation import modulation_table
from lavin_rt.sampling.denoisers import Denoiser, Tensors
from lavin_rt.sampling.sampler import sampled
from lavin_rt.sampling.schedule import schedule


def other_speeds(manifest: Manifest) -> list[str]:
    """The names of all that an artifact serves but `exact`."""
    return [name for name in manifest.speeds if name != EXACT]


def at_speeds(
    network: Denoiser, manifest: Manifest, cond_latents: torch.Tensor, noise: torch.Tensor, guidance: float
) -> list[torch.Tensor]:
    """Latents float32 on the CPU of a whole run at every one of `other_speeds`; arguments as of `sampled`."""
    steps, results = max(manifest.schedules), []
    for name in other_speeds(manifest):
        speed = manifest.speeds[name]
        results.append(
            sampled(network, cond_latents, noise, speed, None if speed.owns_grid else steps, guidance).float().cpu()
        )
    return results


def kept_passes(network: Denoiser, manifest: Manifest, rows: int) -> list[torch.Tensor]:
    """Of every one of `kept_sizes` a velocity that stores the context's keys and values, one that reuses them at
    another time, and what was stored, float32 on the CPU.
    """
    tables, results = network.table(schedule(manifest.schedules[0])), []
    for index, sizes in enumerate(kept_sizes(manifest, rows)):
        generator, channels = torch.Generator().manual_seed(300 + index), network.config.in_channels
        grid = 2 * sizes["rows"], 2 * sizes["columns"]
        context, query, first, second = (
            torch.randn(sizes["batch"], channels, sizes[frames], *grid, generator=generator).to(network.device)
            for frames in ("kept_frames", "cond_frames", "target_frames", "target_frames")
        )
        frames = sizes["kept_frames"] + sizes["cond_frames"]
        shape = Shape(
            sizes["batch"], frames, sizes["cond_frames"], sizes["target_frames"], *grid, guided=False, kept=True
        )
        stored, reused = (network.step(shape, Form(source)) for source in (STORED, REUSED))
        condition = stored.buffers()
        stored.fill(condition, network.embed(context), network.embed(query))
        before = stored(first, condition, *(table[0] for table in tables))
        after = reused(second, condition, *(table[-1] for table in tables))
        kept = torch.cat([part.flatten() for part in stored.context(condition)])
        results += [part.float().cpu() for part in (before, after, kept)]
    return results


def kept_sizes(manifest: Manifest, rows: int) -> list[dict[str, int]]:
    """The sizes of `kept_passes`, of so many rows at most; none where the artifact keeps nothing."""
    names = "batch", "target_frames", "cond_frames", "kept_frames", "rows", "columns"
    chosen = [(1, 1, 1, 1, 1, 1), (3, 2, 2, 3, 3, 5), (1, 1, 1, 8, 16, 16)] if KEPT in manifest.parts else []
    return [
        dict(zip(names, (batch, *frames, height, width), strict=True))
        for batch, *frames, height, width in chosen
        if batch * sum(frames) * height * width <= rows
    ]


class PlainBranches(ArtifactNetwork):
    """What an artifact's network is held against where it is in int8: the module that it was made of, in the artifact's
    place, modulation from the checkpoint.
    """

    def __init__(self, manifest: Manifest, dit: JDiT):
        denoiser = BranchDenoiser(dit)
        super().__init__(manifest, torch.device("cpu"), lambda *given: (denoiser(*given),))
        self.dit = dit

    def table(self, knots: torch.Tensor) -> Tensors:
        table = modulation_table(self.dit, knots[:-1])
        return table.blocks, table.head_scale
