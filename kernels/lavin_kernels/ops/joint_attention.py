"""Variable-length, non-causal attention with grouped heads over the joint sequence of every branch, in one launch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from lavin_kernels import tuning, validate
from lavin_kernels.branches import Branches
from lavin_kernels.launch import interpreted, on_device, operator
from lavin_kernels.ops.joint_attention_triton import joint_attention_kernel
from lavin_kernels.reference import dit as reference
from lavin_kernels.static_case import StaticCase

# Worth timing on a device; "gluon" on compute capability 9.0 alone, with 64 query rows to a warpgroup.
CANDIDATES = [
    {"variant": variant, "block_m": block_m, "block_n": block_n, "num_warps": num_warps, "num_stages": num_stages}
    for variant, tiles in {
        "pointer": ((128, 64, 8), (128, 64, 4), (128, 128, 8), (64, 64, 4)),
        "gluon": ((192, 128, 4), (192, 64, 4), (128, 128, 4)),
    }.items()
    for block_m, block_n, num_warps in tiles
    for num_stages in (2, 3, 4)
]

# What runs on compute capability 9.0 where the Gluon form cannot: in traced graphs, over kept keys, and where a branch
# is too short.
PLAIN: tuning.Launch = {"variant": "pointer", "block_m": 128, "block_n": 64, "num_warps": 4, "num_stages": 3}

# Gluon as it is called here is that of Triton 3.6 and newer.
_GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)

# Room for branches in a traced graph where their number is not fixed.
GRAPH_BRANCHES = 16


def fits(config: tuning.Launch, capability: int) -> bool:
    """Whether a launch configuration can be compiled for a compute capability by the Triton that is installed.

    For other targets the compiler does not refuse the Gluon form's instructions: it ends the process.
    """
    return config["variant"] != "gluon" or (capability == 90 and _GLUON)


def _without_gluon(device: torch.device, dtype: torch.dtype) -> tuning.Launch:
    """The launch configuration of a device for what the Gluon form does not take."""
    config = tuning.default_config("joint_attention", tuning.capability(device), dtype)
    return PLAIN if config["variant"] == "gluon" else config


def head_pieces(head_size: int) -> tuple[int, int]:
    """Cuts a head into one or two powers of two of at least 16, the least width that matrix instructions take.

    72 = 64 + 8 becomes (64, 16), 11 % more work than useful; one power of two, 128, would be 78 % more. A head that
    one power of two covers as well is (that, 0).
    """
    whole = max(16, triton.next_power_of_2(head_size))
    first = whole // 2
    rest = max(16, triton.next_power_of_2(head_size - first))
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def _copyable(part: torch.Tensor) -> torch.Tensor:
    """`part` where 16 bytes at a time can be copied from it and offsets within a tile stay below 2**31, else a copy."""
    aligned = part.storage_offset() * part.element_size() % 16 == 0
    if aligned and part.stride(0) % 8 == 0 and part.stride(1) % 8 == 0 and part.stride(0) < 2**23:
        return part
    return torch.nn.functional.pad(part, (0, -part.shape[-1] % 8)).clone(memory_format=torch.contiguous_format)


def _shape(
    heads: int, kv_heads: int, head_size: int, x_only: bool, with_lse: bool, branches: int, columns: int = 4
) -> dict[str, int | bool]:
    """The compile-time arguments that both kernels have."""
    width, rest = head_pieces(head_size)
    return {
        "HEADS": heads,
        "GROUP": heads // kv_heads,
        "HEAD_SIZE": head_size,
        "WIDTH": width,
        "REST": rest,
        "X_ONLY": x_only,
        "WITH_LSE": with_lse,
        "MAX_BRANCHES": GRAPH_BRANCHES if isinstance(branches, torch.SymInt) else triton.next_power_of_2(branches),
        "COLUMNS": columns,
    }


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    shortest: int,
    head_size: int,
    scale: float,
    with_lse: bool,
    kept: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads = q.shape[0], q.shape[1]
    out = q.new_empty(rows, heads * head_size)
    lse = q.new_empty((rows, heads) if with_lse else (0,), dtype=torch.float32)
    if rows == 0:
        return out, lse
    # The Gluon form's descriptors are made from addresses, which a tensor has only outside of a trace.
    traced = type(q) is not torch.Tensor
    options = tuning.config("joint_attention", q.device, q.dtype)
    if options["variant"] == "gluon" and (
        traced
        or table.shape[1] > 4  # kept rows, which it does not know
        or q.dtype == torch.float32
        or shortest < options["block_n"]
        or not fits(options, tuning.capability(q.device))
    ):
        options = _without_gluon(q.device, q.dtype)
    variant = options["variant"]
    x_only = rows + kept != k.shape[0]
    block_m, block_n = _blocks(options, variant, x_only)
    pieces = head_pieces(head_size)
    parts = [_copyable(part) for part in (q, k, v)]
    branches = table.shape[0]
    shape = _shape(heads, k.shape[1], head_size, x_only, with_lse, branches, table.shape[1])
    # At most one tile of a branch is not full, so these are enough whatever the lengths in the table are.
    grid = ((rows // block_m + branches) * heads,)
    scale *= math.log2(math.e)
    if variant == "gluon":
        from lavin_kernels.ops import joint_attention_gluon as hopper

        sources = hopper.descriptors(parts, head_size, pieces, block_n)
        form = hopper.form(block_m, block_n, options["num_stages"], sum(pieces))
        del shape["COLUMNS"]
        with on_device(q):
            hopper.joint_attention_gluon_kernel[grid](
                *sources, out, lse, table, branches, scale, **shape, **form, num_warps=4
            )
        return out, lse
    kernel = torch.library.wrap_triton(joint_attention_kernel) if traced else joint_attention_kernel
    launch = ("num_warps", "num_stages") if traced else ("num_warps", "num_stages", "maxnreg")
    with on_device(q):
        kernel[grid](
            *(*parts, out, lse, table, branches),
            *(stride // 8 for part in parts for stride in part.stride()[:2]),
            scale,
            **shape,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            UPCAST=interpreted() and q.dtype == torch.bfloat16,
            **{key: options[key] for key in launch if key in options},
        )
    return out, lse


def _blocks(config: tuning.Launch, variant: str, x_only: bool) -> tuple[int, int]:
    """Rows of a tile of queries and of keys. The x stream alone is short: 1024 rows fill 5.3 tiles of 192, 8 of 128."""
    return 128 if variant == "gluon" and x_only else config["block_m"], config["block_n"]


def _launch_branches(q, k, v, table, cond_lens, x_lens, head_size, scale, kept_lens, with_lse):
    kept_lens = kept_lens or [0] * len(cond_lens)
    lens = [sum(rows) for rows in zip(cond_lens, x_lens, kept_lens, strict=True)]
    shortest = min((rows for rows in lens if rows), default=0)  # keys of a branch that has any
    return _launch(q, k, v, table, shortest, head_size, scale, with_lse, sum(kept_lens))


def _with_branches(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A reference with the operator's arguments; row maps of branches are none of attention's business."""

    def run(q, k, v, table, cond_lens, x_lens, head_size, scale, kept_lens=None):
        branches = Branches(tuple(cond_lens), tuple(x_lens), table, table.new_empty(0), tuple(kept_lens or ()))
        return reference(q, k, v, branches, head_size, scale)

    return run


@operator("joint_attention", _with_branches(reference.joint_attention))
def _joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    cond_lens: Sequence[int],
    x_lens: Sequence[int],
    head_size: int,
    scale: float,
    kept_lens: Sequence[int] | None = None,
) -> torch.Tensor:
    return _launch_branches(q, k, v, table, cond_lens, x_lens, head_size, scale, kept_lens, with_lse=False)[0]


@operator("joint_attention_with_lse", _with_branches(reference.joint_attention_with_lse))
def _joint_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    cond_lens: Sequence[int],
    x_lens: Sequence[int],
    head_size: int,
    scale: float,
    kept_lens: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_branches(q, k, v, table, cond_lens, x_lens, head_size, scale, kept_lens, with_lse=True)


def _checked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, branches: Branches, head_size: int, scale: float | None
) -> tuple:
    """The operator's arguments, if all of them can be used."""
    if not isinstance(branches, Branches):
        raise TypeError(f"branches is of type {type(branches).__name__}; expected Branches")
    if isinstance(head_size, bool) or not isinstance(head_size, int):
        raise TypeError(f"head_size is of type {type(head_size).__name__}; expected an int")
    if head_size % 8 or not 8 <= head_size <= 128:
        raise ValueError(f"head_size is {head_size}; expected a multiple of 8 from 8 to 128")
    scale = head_size**-0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; expected a finite number above 0")
    validate.rows("q", q, (None, None, None))
    validate.tensor("k", k, (None, None, None), device=q.device)
    validate.tensor("v", v, (None, None, None), device=q.device)
    for name, part in (("k", k), ("v", v)):
        validate.alike(name, part, "q", q)
        if part.shape[0] != branches.keys:
            raise ValueError(f"{name} has {part.shape[0]} rows; expected {branches.keys}, which the branches cover")
    x_rows = branches.rows - branches.split
    if q.shape[0] not in (branches.rows, x_rows):
        raise ValueError(f"q has {q.shape[0]} rows; expected {branches.rows}, or the {x_rows} of the x stream alone")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"v has {v.shape[1]} heads; expected {k.shape[1]}, as k has")
    if not 0 < k.shape[1] <= q.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads; expected a divisor of the {q.shape[1]} of q")
    for name, part in (("q", q), ("k", k), ("v", v)):
        if part.shape[2] < head_size:
            raise ValueError(f"{name} stores {part.shape[2]} elements a head; expected at least head_size, {head_size}")
    lens = (list(branches.cond_lens), list(branches.x_lens))
    kept = list(branches.kept_lens) or None
    validate.tensor("branches.table", branches.table, (len(lens[0]), 5 if kept else 4), (torch.int32,), q.device)
    return q, k, v, branches.table, *lens, head_size, scale, kept


def executed_flops(branches: Sequence[tuple[int, int]], heads: int, head_size: int, block_m: int, block_n: int) -> int:
    """Matrix work of one launch over branches of (queries, keys), masked parts of tiles and of heads included."""
    tiles = sum(triton.cdiv(queries, block_m) * triton.cdiv(keys, block_n) for queries, keys in branches)
    return 4 * tiles * block_m * block_n * heads * sum(head_pieces(head_size))


def static_cases(capability: int) -> list[StaticCase]:
    """The launches of the standard run (512 px, 4 pairs, two branches): 32 query, 8 key/value heads of 72 stored in 80.

    Blocks and last block (x rows as queries) at the capability's default, and on compute capability 9.0 in the form
    that compiled graphs launch instead of the Gluon kernel; one more over kept rows and with log-sum-exps.
    """
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        config = tuning.default_config("joint_attention", capability, dtype)
        configs = {config["variant"]: config}
        if config["variant"] == "gluon":
            configs["pointer"] = PLAIN
        cases += [static_case(config, dtype, x_only) for config in configs.values() for x_only in (False, True)]
        cases.append(static_case(configs["pointer"], dtype, x_only=False, kept=8192))
    return cases


def static_case(config: tuning.Launch, dtype: torch.dtype, x_only: bool, kept: int = 0) -> StaticCase:
    """One of them; with `kept`, so many of the first branch's rows are keys alone, and log-sum-exps are stored."""
    heads, kv_heads, head_size, stored = 32, 8, 72, 80
    branches = [(1024 if x_only else cond + 1024 - kept, cond + 1024) for cond, kept in ((9216, kept), (2048, 0))]
    queries, keys = (sum(rows) for rows in zip(*branches, strict=True))
    variant = config["variant"]
    block_m, block_n = _blocks(config, variant, x_only)
    shape = _shape(heads, kv_heads, head_size, x_only, bool(kept), len(branches), columns=5 if kept else 4)
    if variant == "gluon":
        from lavin_kernels.ops import joint_attention_gluon as hopper

        kernel = hopper.joint_attention_gluon_kernel
        form = hopper.form(block_m, block_n, config["num_stages"], sum(head_pieces(head_size)))
        del shape["COLUMNS"]
    else:
        kernel = joint_attention_kernel
        form = {"BLOCK_M": block_m, "BLOCK_N": block_n, "UPCAST": False}
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_source") and variant == "gluon":
            rows = block_n if name[0] in "kv" else 64
            width = (shape["REST"] if "rest" in name else 0) or shape["WIDTH"]
            layout = hopper.tile_layout(dtype, rows, width)
            signature[name] = f"tensordesc<{element}[1, {rows}, {width}],{layout!r}>"
        elif name.endswith("_source") or name == "out_ptr":
            signature[name] = "*" + element
        elif name.isupper():
            signature[name] = "constexpr"
        else:
            signature[name] = {"lse_ptr": "*fp32", "table_ptr": "*i32", "scale": "fp32"}.get(name, "i32")
    form_name = variant + ("/last_block" if x_only else "/kept_with_lse" if kept else "")
    return StaticCase(
        name=f"joint_attention/{form_name}/{str(dtype).removeprefix('torch.')}",
        fn=kernel,
        signature=signature,
        constexprs={**shape, **form},
        divisible=tuple(n for n, kind in signature.items() if kind.startswith("*") or n.endswith("row_stride")),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        useful_flops=sum(4 * rows * keys * heads * head_size for rows, keys in branches),
        executed_flops=executed_flops(branches, heads, head_size, block_m, block_n),
        bytes=dtype.itemsize * (queries * heads * (stored + head_size) + 2 * keys * kv_heads * stored),
        dtype=dtype,
        options={key: config[key] for key in ("maxnreg",) if key in config},
    )


def joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    branches: Branches,
    head_size: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Full (non-causal) attention of every branch over all its rows, cond and x together, with grouped heads.

    Scores and sums are float32; the weights are rounded to the dtype of the rows before they meet the values, as in the
    other fused attentions; float32 rows are multiplied in float32. On a CPU the reference runs instead.

    Args:
        q: `[rows, heads, >= head_size]` branch-contiguous, or the x rows alone; bfloat16, float16 or float32 (float64
            on a CPU). Rows and heads may be strided, the last dimension may not.
        k, v: `[branches.keys, kv_heads, >= head_size]` branch-contiguous, the kept rows of a branch before its own, in
            the dtype of q; query head i reads key/value head `i // (heads / kv_heads)`.
        branches: the row ranges, run-time values: other lengths do not compile another kernel, kept rows do once.
        head_size: size of one head, a multiple of 8 up to 128; what is stored beyond it is ignored.
        scale: softmax scale, above 0; `head_size ** -0.5` by default.

    Returns:
        `[query rows, heads * head_size]` in stream-major order, ready for the output projection.

    Raises:
        TypeError: an argument is of a type or dtype that is not listed, or dtypes differ.
        ValueError: ranks, sizes, devices, strides, a head size or a scale outside of what is listed, or branches that
            do not cover the rows of k.
    """
    return _joint_attention(*_checked(q, k, v, branches, head_size, scale))


def joint_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    branches: Branches,
    head_size: int,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`joint_attention` and the natural log-sum-exp of its scaled scores, `[query rows, heads]` float32, stream-major.

    Two results over disjoint keys can be merged by it. Arguments and errors are those of `joint_attention`.
    """
    return _joint_attention_with_lse(*_checked(q, k, v, branches, head_size, scale))
