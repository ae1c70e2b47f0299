"""The transformer in the form that trains: whole blocks with their modulation, low-rank adapters, shards on devices."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from lavin_rt.dit.model import Block, JDiT, modulate, patchify, unpatchify
from lavin_rt.dit.rope import token_angles
from lavin_rt.mini.train.trainer import whole

JOINED = (("attention", "qkv"), ("attention", "proj"), ("mlp", "gate_up"), ("mlp", "down"))  # `[2, N, K]` each


class TrainedBlock(nn.Module):
    """A block that makes its modulation itself, so that all its weights are read within it."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block

    def forward(
        self,
        cond: torch.Tensor,
        x: torch.Tensor,
        silu_t: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`cond` `[B, Lc, D]`, `x` `[B, Lx, D]`, `silu_t` `[B, 2, D]`; returns the new cond and x."""
        weights = self.block.modulation
        assert weights.weight is not None and weights.bias is not None  # in memory, or they could not be trained
        return self.block(cond, x, modulate(weights.weight, weights.bias, silu_t), angles)


class TrainedDiT(nn.Module):
    """Computes what `JDiT` does, with the same parameters.

    Args:
        dit: the network, its modulation linears in memory.
        checkpointing: compute a block's activations again in the backward pass instead of keeping them.
    """

    def __init__(self, dit: JDiT, checkpointing: bool = False):
        super().__init__()
        self.config, self.checkpointing = dit.config, checkpointing
        self.cond_embedder, self.x_embedder = dit.cond_embedder, dit.x_embedder
        self.time_embedder, self.head = dit.time_embedder, dit.head
        self.prompt_embed, self.answer_embed = dit.prompt_embed, dit.answer_embed
        self.blocks = cast("Sequence[TrainedBlock]", nn.ModuleList(map(TrainedBlock, dit.blocks)))

    def forward(self, latents: torch.Tensor, t: torch.Tensor, cond_latents: torch.Tensor) -> torch.Tensor:
        """See `JDiT`."""
        frames, height, width = latents.shape[2:]
        total = cond_latents.shape[2] + frames
        angles = token_angles(total, height // 2, width // 2, self.config.head_size, latents.device)
        cond, x = self.cond_embedder(patchify(cond_latents)), self.x_embedder(patchify(latents))
        embedded = self.time_embedder(t)
        silu_t = nn.functional.silu(torch.stack([embedded + self.prompt_embed, embedded + self.answer_embed], dim=1))
        for block in self.blocks:
            if self.checkpointing:
                cond, x = checkpoint(block, cond, x, silu_t, angles, use_reentrant=False)
            else:
                cond, x = block(cond, x, silu_t, angles)
        return unpatchify(self.head(x, silu_t[:, 1]), frames, height, width)


def shard_(network: TrainedDiT) -> TrainedDiT:
    """Shards all parameters over the processes (FSDP2), a block at a time. Returns the network."""
    for block in network.blocks:
        fully_shard(block)
    fully_shard(network)
    return network


class LowRank(nn.Module):
    """A change of rank r to a stacked weight `[2, N, K]`, zero at first (LoRA, arXiv 2106.09685)."""

    def __init__(self, weight: torch.Tensor, rank: int, scale: float = 1.0):
        super().__init__()
        streams, rows, columns = weight.shape
        self.scale = scale
        self.down = nn.Parameter(torch.randn(streams, rank, columns, device=weight.device) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(streams, rows, rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.up @ self.down)


def adapt_(dit: JDiT, rank: int, seed: int = 0) -> JDiT:
    """Puts low-rank adapters on the joined linears, and lets nothing else learn. Returns the model."""
    dit.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in dit.blocks:
            for part, name in JOINED:
                module = getattr(block, part)
                parametrize.register_parametrization(module, name, LowRank(getattr(module, name), rank))
                module.parametrizations[name].original.requires_grad_(False)
    return dit


@torch.no_grad()
def merged(dit: JDiT) -> JDiT:
    """A plain copy of the model, with its adapters, if any, added to the weights."""
    plain = JDiT(dit.config).to(dit.device, dit.dtype)
    for name, parameter in plain.named_parameters():
        parameter.copy_(operator.attrgetter(name)(dit))  # of an adapted weight, the sum
    return plain


@torch.no_grad()
def load_trained_(dit: JDiT, network: TrainedDiT, averaged: dict[str, torch.Tensor] | None = None) -> JDiT:
    """Copies a network's parameters, or averages of them by its names, into a model. Returns the model.

    With several processes every one has to call it; all end with the whole model.
    """
    values = dict(network.named_parameters()) | (averaged or {})
    targets = dict(dit.named_parameters())
    for name, value in values.items():
        targets[name.replace(".block.", ".")].copy_(whole(value))
    return dit
