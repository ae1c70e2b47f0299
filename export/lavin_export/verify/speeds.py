"""The sampling runs of a verification at the speeds that an artifact serves."""

from __future__ import annotations

import torch

from lavin_export.networks.denoiser import BranchDenoiser
from lavin_rt.artifact.load import ArtifactNetwork
from lavin_rt.artifact.manifest import Manifest
from lavin_rt.artifact.speeds import EXACT
from lavin_rt.dit.model import JDiT
from lavin_rt.dit.modulation import modulation_table
from lavin_rt.sampling.denoisers import Denoiser, Tensors
from lavin_rt.sampling.sampler import sampled


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
