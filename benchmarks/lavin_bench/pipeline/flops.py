"""The work of a run at a speed, in the same useful FLOPs in which exact runs are counted."""

from __future__ import annotations

from typing import Any

from lavin_rt.dit.layout import REUSED, Form, Shape
from lavin_rt.sampling.speeds import Speed


def form_flops(config: Any, shape: Shape, form: Form) -> int:
    """FLOPs of one evaluation: of the unpruned model, with unpadded heads, linears and attention of the blocks.

    Args:
        config: the transformer's.
        shape: of the run.
        form: what the evaluation computes.
    """
    hidden, kv, mlp = config.hidden_size, config.kv_size, config.mlp_size
    weights = hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * mlp  # q, k, v; proj; gate, up, down
    total = 0
    for kind, context in ((form.context, shape.cond_frames - shape.query_frames), (form.null, 1)):
        if kind is None:
            continue
        keys = (context + shape.query_frames + shape.target_frames) * shape.frame_tokens
        queries = keys - (context * shape.frame_tokens if kind == REUSED else 0)
        total += shape.queries * (2 * weights * queries + 4 * queries * keys * hidden)
    return config.depth * total


def speed_flops(config: Any, shape: Shape, speed: Speed, evaluations: int) -> int:
    """FLOPs of a whole run of so many evaluations, without what is made once for a task."""
    return sum(form_flops(config, shape, form) for form in speed.forms(shape, evaluations))
