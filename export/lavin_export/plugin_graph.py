"""The denoiser with its row-wise work as custom ONNX nodes: our kernels in TensorRT, standard operators anywhere else.

Every node carries `plugin_namespace`, `plugin_version` and `aot`, by which TensorRT's parser finds the plugin; the
model holds a function of the same name for each, which ONNX Runtime and others inline. No operator is named like one of
ONNX's own, since the parser looks those up by name alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lavin_export.denoiser import Denoiser
from lavin_export.kernel_denoiser import row_positions, row_tables
from lavin_export.onnx_support import OPSET
from lavin_export.onnx_support import PLUGIN_DOMAIN as DOMAIN
from lavin_rt.model import GATE_MLP, GATE_MSA, NORM_EPS, SCALE_MLP, SCALE_MSA, JDiT, patchify, unpatchify

if TYPE_CHECKING:
    import onnx
    import onnx_ir

    from lavin_rt.config import DiTConfig

VERSION = 1
ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION), "aot": 1}

# A norm times a vector is a norm with that vector for its weight, so that the functions round no more than once either.
FUNCTIONS = {
    "LavinAdaRmsNorm": """
        LavinAdaRmsNorm <epsilon> (rows, scale) => (normed) {
            one = Constant <value_float = 1.0> ()
            shifted = Add (scale, one)
            weight = CastLike (shifted, rows)
            normed = RMSNormalization <axis = -1, epsilon: float = @epsilon, stash_type = 1> (rows, weight)
        }""",
    "LavinGatedResidualAdaRmsNorm": """
        LavinGatedResidualAdaRmsNorm <epsilon> (residual, update, gate, scale) => (sum, normed) {
            gate_weight = CastLike (gate, update)
            gated = RMSNormalization <axis = -1, epsilon: float = @epsilon, stash_type = 1> (update, gate_weight)
            sum = Add (residual, gated)
            one = Constant <value_float = 1.0> ()
            shifted = Add (scale, one)
            weight = CastLike (shifted, sum)
            normed = RMSNormalization <axis = -1, epsilon: float = @epsilon, stash_type = 1> (sum, weight)
        }""",
    "LavinSwiglu": """
        LavinSwiglu (gate_up) => (product) {
            gate, up = Split <axis = -1, num_outputs = 2> (gate_up)
            weight = Sigmoid (gate)
            silu = Mul (gate, weight)
            product = Mul (silu, up)
        }""",
}
# Of q or k of one stream, `[B, L, heads * head_size]`: the norm, and the rotation by the stream's `ANGLES`.
ROTATED = """
            {name}_normed = RMSNormalization <axis = -1, epsilon: float = @epsilon, stash_type = 1> ({name}, {weight})
            {name}_wide = Cast <to = 1> ({name}_normed)
            {name}_halves = Reshape ({name}_wide, half_shape)
            {name}_first, {name}_second = Split <axis = -2, num_outputs = 2> ({name}_halves)
            {name}_fc = Mul ({name}_first, {stream}_cos)
            {name}_ss = Mul ({name}_second, {stream}_sin)
            {name}_sc = Mul ({name}_second, {stream}_cos)
            {name}_fs = Mul ({name}_first, {stream}_sin)
            {name}_low = Sub ({name}_fc, {name}_ss)
            {name}_high = Add ({name}_sc, {name}_fs)
            {name}_both = Concat <axis = -2> ({name}_low, {name}_high)
            {name}_joined = Reshape ({name}_both, head_shape)
            {name}_turned = CastLike ({name}_joined, {name})
"""
# Rows of one stream from a table of cosines or sines. Rows of cond come first in `positions`, batch by batch.
ANGLES = """
            {stream}_{table}_rows = Gather <axis = 0> ({table}, {stream}_positions)
            {stream}_{table}_shape = Concat <axis = 0> ({stream}_shape, angle_tail)
            {stream}_{table} = Reshape ({stream}_{table}_rows, {stream}_{table}_shape)
"""


class PluginDenoiser(Denoiser):
    """`Denoiser` whose norms, rotary positions and SwiGLU are nodes of the domain `lavin`; to trace, not to run.

    Calls and parameters are those of `Denoiser`, but for `unit`. Called outside of an export it gives zeros of the
    right shape.
    """

    def __init__(self, dit: JDiT):
        super().__init__(dit)
        del self.unit

    def forward(
        self, latents: torch.Tensor, cond_latents: torch.Tensor, modulation: torch.Tensor, head_scale: torch.Tensor
    ) -> torch.Tensor:
        frames, height, width = latents.shape[2:]
        batch, cond_frames, device = latents.shape[0], cond_latents.shape[2], latents.device
        grid = height // 2, width // 2
        tokens = grid[0] * grid[1]
        _, branch_rows = row_tables(batch, cond_frames * tokens, frames * tokens, device)
        tables = branch_rows, row_positions(batch, cond_frames, frames, *grid, device)
        cond, x = self.cond_embedder(patchify(cond_latents)), self.x_embedder(patchify(latents))
        scales = modulation.flatten(0, 2)  # [depth * 2 * 4, D]

        def scale(index: int, stream: int, kind: int) -> torch.Tensor:
            return scales[8 * index + 4 * stream + kind]

        normed_cond = ada_rms_norm(cond, scale(0, 0, SCALE_MSA))
        normed_x = ada_rms_norm(x, scale(0, 1, SCALE_MSA))
        for index, block in enumerate(self.blocks):
            last = index + 1 == len(self.blocks)
            joint = self._attention(block, normed_cond, normed_x, tables)
            streams = []
            for stream, rows in enumerate((cond, x)):
                if last and stream == 0:
                    streams.append((cond, normed_cond))
                    continue
                of = block["x" if stream else "cond"]
                part = joint if last else joint[:, cond.shape[1] :] if stream else joint[:, : cond.shape[1]]
                following = head_scale if last else scale(index + 1, stream, SCALE_MSA)
                update = F.linear(part, of.proj)
                gate, mlp_scale = scale(index, stream, GATE_MSA), scale(index, stream, SCALE_MLP)
                rows, normed = gated_residual_ada_rms_norm(rows, update, gate, mlp_scale)
                update = F.linear(swiglu(F.linear(normed, of.gate_up)), of.down)
                gate = scale(index, stream, GATE_MLP)
                streams.append(gated_residual_ada_rms_norm(rows, update, gate, following))
            (cond, normed_cond), (x, normed_x) = streams
        return unpatchify(self.head(normed_x), frames, height, width)

    def _attention(
        self, block: torch.nn.ModuleDict, cond: torch.Tensor, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Joint attention of normed rows `[B, Lc, D]` and `[B, Lx, D]`: `[B, L, D]`, of x alone in the last block."""
        of_cond, of_x = block["cond"], block["x"]
        keys_only = hasattr(of_cond, "kv")
        cond_qkv = F.linear(cond, of_cond.kv if keys_only else of_cond.qkv)
        q, k, v = qk_norm_rope(
            cond_qkv,
            F.linear(x, of_x.qkv),
            *tables,
            self.rotary_cos,
            self.rotary_sin,
            torch.stack([of_x.q_norm if keys_only else of_cond.q_norm, of_x.q_norm]),
            torch.stack([of_cond.k_norm, of_x.k_norm]),
            self.config.head_size,
        )
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        joint = F.scaled_dot_product_attention(q, k, v, scale=self.config.head_size**-0.5, enable_gqa=True)
        return joint.transpose(1, 2).flatten(2)


def ada_rms_norm(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`rms(rows) * (1 + scale)` of `[B, L, D]` and `[D]`, as a node."""
    (normed,) = _node("LavinAdaRmsNorm", (rows, scale), [rows.shape], {"epsilon": NORM_EPS})
    return normed


def gated_residual_ada_rms_norm(
    residual: torch.Tensor, update: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`s = residual + gate * rms(update)` and `rms(s) * (1 + scale)` of `[B, L, D]` and `[D]`, as a node."""
    inputs, shapes = (residual, update, gate, scale), [residual.shape, residual.shape]
    total, normed = _node("LavinGatedResidualAdaRmsNorm", inputs, shapes, {"epsilon": NORM_EPS})
    return total, normed


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of the joined projection `[B, L, 2 * inner]`, as a node."""
    (product,) = _node("LavinSwiglu", (gate_up,), [(*gate_up.shape[:-1], gate_up.shape[-1] // 2)], {})
    return product


def qk_norm_rope(
    cond: torch.Tensor,
    x: torch.Tensor,
    branch_rows: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    head_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`lavin_kernels.qk_norm_rope` as a node; cond `[B, Lc, Q + 2 KV]` or `[B, Lc, 2 KV]`, x `[B, Lx, Q + 2 KV]`.

    Returns q `[B, L, heads, head_size]` (x rows alone where cond has no queries), k, v `[B, L, kv heads, head_size]`.
    """
    batch, length = x.shape[0], cond.shape[1] + x.shape[1]
    heads, kv_heads = q_weight.shape[1] // head_size, k_weight.shape[1] // head_size
    with_queries = cond.shape[2] == x.shape[2]
    keys = (batch, length, kv_heads, head_size)
    queries = (batch, length if with_queries else x.shape[1], heads, head_size)
    inputs = (cond, x, branch_rows, positions, cos, sin, q_weight, k_weight)
    name = "LavinQkNormRope" if with_queries else "LavinKeyNormRope"
    q, k, v = _node(name, inputs, [queries, keys, keys], {"epsilon": NORM_EPS, "head_size": head_size})
    return q, k, v


def _node(name: str, inputs: tuple, shapes: list, attributes: dict) -> tuple[torch.Tensor, ...]:
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}",
        inputs,
        {**attributes, **ATTRIBUTES},
        dtypes=[inputs[0].dtype] * len(shapes),
        shapes=[tuple(shape) for shape in shapes],
        version=VERSION,
    )
    # They are on the CPU, wherever the inputs are; the exporter makes nothing of the move.
    return tuple(output.to(inputs[0].device) for output in outputs)


def functions(heads: int, kv_heads: int, head_size: int) -> list[onnx.FunctionProto]:
    """The functions of the domain `lavin` in standard operators, for models of these sizes."""
    import onnx.parser

    texts = [*FUNCTIONS.values()]
    texts += [_qk_function(heads, kv_heads, head_size, cond_queries) for cond_queries in (True, False)]
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>'
    return [onnx.parser.parse_function(header + text) for text in texts]


def _qk_function(heads: int, kv_heads: int, head_size: int, cond_queries: bool) -> str:
    q_size, kv_size = heads * head_size, kv_heads * head_size
    name = "LavinQkNormRope" if cond_queries else "LavinKeyNormRope"
    cond_parts = ["cond_q"] * cond_queries + ["cond_k", "cond_v"]
    cond_sizes = [q_size] * cond_queries + [kv_size, kv_size]
    lines = [
        f"{name} <epsilon, head_size> (cond, x, branch_rows, positions, cos, sin, q_weight, k_weight) => (q, k, v) {{",
        f"cond_sizes = Constant <value_ints = {cond_sizes}> ()",
        f"{', '.join(cond_parts)} = Split <axis = -1> (cond, cond_sizes)",
        f"x_sizes = Constant <value_ints = {[q_size, kv_size, kv_size]}> ()",
        "x_q, x_k, x_v = Split <axis = -1> (x, x_sizes)",
        f"half_shape = Constant <value_ints = {[0, 0, -1, 3, 2, head_size // 6]}> ()",
        f"head_shape = Constant <value_ints = {[0, 0, -1, head_size]}> ()",
        # [B, L, 1, 3, 1, head_size / 6] against [B, L, heads, 3, 2, head_size / 6]
        f"angle_tail = Constant <value_ints = {[1, 3, 1, head_size // 6]}> ()",
        "cond_shape = Shape <start = 0, end = 2> (cond)",
        "x_shape = Shape <start = 0, end = 2> (x)",
        "cond_rows = ReduceProd <keepdims = 1> (cond_shape)",
        "x_rows = ReduceProd <keepdims = 1> (x_shape)",
        "row_counts = Concat <axis = 0> (cond_rows, x_rows)",
        "cond_positions, x_positions = Split <axis = 0> (positions, row_counts)",
        "cond_qw, x_qw = Split <axis = 0, num_outputs = 2> (q_weight)",
        "cond_kw, x_kw = Split <axis = 0, num_outputs = 2> (k_weight)",
        "first = Constant <value_ints = [0]> ()",
    ]
    lines += [f"{stream}_{kind}w1 = Squeeze ({stream}_{kind}w, first)" for stream in ("cond", "x") for kind in "qk"]
    lines += [ANGLES.format(stream=stream, table=table) for stream in ("cond", "x") for table in ("cos", "sin")]
    rotated = ["cond_q"] * cond_queries + ["x_q", "cond_k", "x_k"]
    for part in rotated:
        stream, _, kind = part.rpartition("_")
        lines.append(ROTATED.format(name=part, stream=stream, weight=f"{stream}_{kind}w1"))
    lines.append("q = Concat <axis = 1> (cond_q_turned, x_q_turned)" if cond_queries else "q = Identity (x_q_turned)")
    lines += [
        "k = Concat <axis = 1> (cond_k_turned, x_k_turned)",
        "joined_v = Concat <axis = 1> (cond_v, x_v)",
        "v = Reshape (joined_v, head_shape)",
        "}",
    ]
    return "\n".join(lines)


def add_functions(model: onnx_ir.Model, config: DiTConfig) -> None:
    """Adds the functions that the model's nodes of the domain `lavin` name, and the import of the domain."""
    import onnx_ir

    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for proto in functions(config.num_heads, config.num_heads // config.kv_group, config.head_size):
        if proto.name in used:
            function = onnx_ir.from_proto(proto)
            model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
