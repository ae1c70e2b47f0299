"""Attention as PyTorch offers it, on the packed branches: what `joint_attention` is measured against.

Every backend gets q, k, v in the layout that it likes best and padded as it needs, made beforehand: only attention is
timed. Key/value heads are repeated for their query heads, as not every backend knows grouped heads; that costs bytes,
which do not limit attention at these lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lavin_rt.errors import one_line

Call = Callable[[], list[torch.Tensor]]
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention_backends(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: list[int], key_lens: list[int]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls of every backend of the installed torch that runs here, and the reason of every one that does not.

    Args:
        q: `[rows, heads, head_size]` branch-contiguous. k, v: `[rows, kv_heads, head_size]`.
        lens: rows of q of every branch.
        key_lens: rows of k and v of every branch.

    Returns:
        `(calls, skipped)`. A call returns an output `[1, heads, rows, >= head_size]` for every branch.
    """
    calls: dict[str, Call] = {}
    skipped: dict[str, str] = {}
    found = _attempts(q, k, v, lens, key_lens)
    if q.device.type != "cuda":
        skipped = dict.fromkeys(("cudnn", "efficient"), "needs a CUDA device")
        skipped["flex"] = "takes a compilation of every branch's shape"
        found = {"flash": found["flash"], **_attempts_on_cpu(q, k, v, lens, key_lens)}
    for name, attempts in found.items():
        for make in attempts:
            try:
                call = make()
                call()
                if q.is_cuda:
                    torch.cuda.synchronize()
            except Exception as error:  # each backend has errors of its own for what it does not take
                skipped[name] = one_line(error, 200)
            else:
                calls[name] = call
                skipped.pop(name, None)
                break
    return calls, skipped


def _attempts(q, k, v, lens: list[int], key_lens: list[int]) -> dict[str, list[Callable[[], Call]]]:
    """Ways to make each backend's call, the least padded first."""
    head_size = q.shape[-1]
    scale = head_size**-0.5
    widths = sorted({head_size, -(-head_size // 16) * 16, -(-head_size // 32) * 32, 1 << (head_size - 1).bit_length()})

    def sdpa(backend: SDPBackend, width: int) -> Call:
        parts = _branches(q, k, v, lens, key_lens, width)

        def call() -> list[torch.Tensor]:
            with sdpa_kernel(backend):
                return [F.scaled_dot_product_attention(*part, scale=scale) for part in parts]

        return call

    def flex(width: int) -> Call:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        parts = _branches(q, k, v, lens, key_lens, width)
        return lambda: [compiled(*part, scale=scale) for part in parts]

    # Lists: a generator would look its backend up when it runs, and find that of the last one for all of them.
    attempts: dict[str, list[Callable[[], Call]]] = {
        name: [partial(sdpa, backend, width) for width in widths] for name, backend in BACKENDS.items()
    }
    return {**attempts, "flex": [partial(flex, width) for width in widths]}


def _branches(q, k, v, lens: list[int], key_lens: list[int], width: int) -> list[Parts]:
    """q, k, v of every branch as contiguous `[1, heads, rows, width]`."""
    group = q.shape[1] // k.shape[1]
    parts = []
    for of_q, of_k, of_v in zip(q.split(lens), k.split(key_lens), v.split(key_lens), strict=True):
        of_k, of_v = (part.repeat_interleave(group, dim=1) for part in (of_k, of_v))
        wide = (F.pad(part, (0, width - part.shape[-1])) for part in (of_q, of_k, of_v))
        one_q, one_k, one_v = (part.transpose(0, 1).unsqueeze(0).contiguous() for part in wide)
        parts.append((one_q, one_k, one_v))
    return parts


def _attempts_on_cpu(q, k, v, lens: list[int], key_lens: list[int]) -> dict[str, list[Callable[[], Call]]]:
    """Ways around the head size, where PyTorch's kernel has a form of its own for multiples of 64 in 16 bits."""
    head_size, scale = q.shape[-1], q.shape[-1] ** -0.5

    def padded(width: int) -> Call:
        parts = _branches(q, k, v, lens, key_lens, width)
        return lambda: [F.scaled_dot_product_attention(*part, scale=scale) for part in parts]

    def grouped(rows: int) -> Call:
        """The query heads of a key/value head as rows of one product, so many of them at a time."""
        kv_heads, parts = k.shape[1], []
        for of_branch in zip(q.split(lens), k.split(key_lens), v.split(key_lens), strict=True):
            of_q, of_k, of_v = (part.transpose(0, 1).contiguous() for part in of_branch)
            parts.append((of_q.view(kv_heads, -1, head_size), of_k.transpose(1, 2), of_v, of_q.shape))

        def call() -> list[torch.Tensor]:
            outputs = []
            for of_q, of_k, of_v, shape in parts:
                blocks = [torch.softmax(block @ of_k * scale, -1) @ of_v for block in of_q.split(rows, dim=1)]
                outputs.append(torch.cat(blocks, dim=1).view(1, *shape))
            return outputs

        return call

    def split(first: int) -> Call:
        """Scores of the first columns by the kernel, those of the rest added as a mask; the columns of the values
        in two calls, as the kernel wants them as wide as the queries.
        """
        parts = []
        for of_q, of_k, of_v in _branches(q, k, v, lens, key_lens, head_size):
            halves = [(part[..., :first].contiguous(), part[..., first:].contiguous()) for part in (of_q, of_k, of_v)]
            rest_of_v = F.pad(halves[2][1], (0, 2 * first - head_size))
            parts.append((*halves[0], halves[1][0], halves[1][1].transpose(2, 3), halves[2][0], rest_of_v))

        def call() -> list[torch.Tensor]:
            outputs = []
            for of_q, rest_of_q, of_k, rest_of_k, of_v, rest_of_v in parts:
                mask = rest_of_q @ rest_of_k * scale
                both = [
                    F.scaled_dot_product_attention(of_q, of_k, values, attn_mask=mask, scale=scale)
                    for values in (of_v, rest_of_v)
                ]
                outputs.append(torch.cat(both, dim=-1))
            return outputs

        return call

    attempts: dict[str, list[Callable[[], Call]]] = {f"padded to {w}": [partial(padded, w)] for w in (96, 128)}
    attempts |= {f"grouped, {rows} rows": [partial(grouped, rows)] for rows in (256, 1024)}
    return {**attempts, "64 + 8": [partial(split, 64)]} if head_size == 72 else attempts
