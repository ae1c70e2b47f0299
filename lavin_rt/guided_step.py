"""One guided Euler step on static buffers, which say themselves which evaluation it is."""

from __future__ import annotations

import dataclasses

import torch

from lavin_rt.layout import Form
from lavin_rt.networks import Step, Tensors


@dataclasses.dataclass(eq=False)
class Schedule:
    """The schedule's buffers, which all shapes share, as runs are served in turn.

    Attributes:
        tables: room for what the evaluations differ in, each `[capacity, ...]`.
        widths: `[capacity]` float32, `t[i + 1] - t[i]`.
        guidance: `[]` float32.
        evaluation: `[1]` int64, the device's own counter.
        finite: `[capacity]` bool, whether the latents were finite after each evaluation.
        loaded: the knots in the buffers.
    """

    tables: Tensors
    widths: torch.Tensor
    guidance: torch.Tensor
    evaluation: torch.Tensor
    finite: torch.Tensor
    loaded: tuple[float, ...] = ()

    @classmethod
    def make(cls, tables: Tensors, capacity: int, device: torch.device) -> Schedule:
        return cls(
            tuple(table.new_zeros(capacity, *table.shape[1:]) for table in tables),
            torch.zeros(capacity, dtype=torch.float32, device=device),
            torch.zeros((), dtype=torch.float32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.ones(capacity, dtype=torch.bool, device=device),
        )

    def rewind(self) -> None:
        """Back to the first evaluation."""
        self.evaluation.zero_()
        self.finite.fill_(True)


def guided_step(
    schedule: Schedule,
    step: Step,
    latents: torch.Tensor,
    condition: Tensors,
    difference: torch.Tensor,
    form: Form,
    guided: bool,
) -> None:
    """One guided Euler step, `z += (t[i+1] - t[i]) * velocity(z, t[i])`, i from the device's own counter."""
    rows = [table.index_select(0, schedule.evaluation)[0] for table in schedule.tables]
    velocity = step(latents, condition, *rows).float()
    if form.null:
        # Guidance, section 3.3 of the paper: null + scale * (cond - null).
        cond, null = velocity.chunk(2)
        apart = torch.sub(cond, null, out=difference) if form.held else cond - null
        velocity = null + schedule.guidance * apart
    elif guided:
        velocity = velocity + (schedule.guidance - 1) * difference
    latents.addcmul_(velocity, schedule.widths.index_select(0, schedule.evaluation))
    schedule.finite.index_copy_(0, schedule.evaluation, torch.isfinite(latents).all().unsqueeze(0))
    schedule.evaluation.add_(1)
