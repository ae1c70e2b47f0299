"""The modulation of every evaluation of a schedule, computed once.

The adaptive norms depend on the time alone and the knots are fixed, so a run needs one small table instead of 28 % of
the model's parameters.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F

from lavin_rt.dit.model import JDiT, modulate


@dataclasses.dataclass(frozen=True, eq=False)
class ModulationTable:
    """Modulation of a schedule's evaluations.

    Attributes:
        blocks: `[evaluations, depth, 2, 4, D]` float32: per stream scale_msa, gate_msa, scale_mlp, gate_mlp, tanh
            applied to the gates.
        head_scale: `[evaluations, D]` float32.
    """

    blocks: torch.Tensor
    head_scale: torch.Tensor


@torch.no_grad()
def modulation_table(dit: JDiT, times: torch.Tensor) -> ModulationTable:
    """Tabulates a model's modulation at `times` `[evaluations]`.

    Runs in float32 whatever the model's dtype, one block at a time, so that weights still in the checkpoint's file
    pass through memory a block at a time (42 MB for the released model in bfloat16) and are released.
    """
    times = times.to(dit.device, torch.float32)
    head = dit.head.modulation
    embedded = copy.deepcopy(dit.time_embedder).float()(times)
    silu_t = F.silu(torch.stack([embedded + dit.prompt_embed, embedded + dit.answer_embed], dim=1))
    silu_t = silu_t.to(times.dtype)
    table = torch.empty(
        len(times), dit.config.depth, 2, 4, dit.config.hidden_size, dtype=torch.float32, device=dit.device
    )
    for index in range(dit.config.depth):
        weight, bias = dit.modulation_parameters(index)
        table[:, index] = modulate(weight.float(), bias.float(), silu_t)
    head_scale = F.linear(silu_t[:, 1], head.weight.float(), head.bias.float())
    return ModulationTable(table, head_scale)
