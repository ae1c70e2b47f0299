"""What the kernel benchmarks run: every operator at the model's real shapes, against the best that PyTorch has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import lavin_kernels
from lavin_bench.kernels.attention_backends import attention_backends
from lavin_kernels.branches import Branches
from lavin_kernels.reference import dit as reference
from lavin_kernels.reference import vae as reference_vae
from lavin_rt.dit import cpu_operators
from lavin_rt.dit.config import PRESETS, DiTConfig
from lavin_rt.dit.layout import REUSED, Form, Layout, Shape
from lavin_rt.dit.prepacked import PrepackedLinear, can_prepack

RELEASED = PRESETS["lavin-dit-3.4b"]
SIZES, PAIRS = (256, 512, 1024), (1, 4, 8)
OPERATORS = (
    *("ada_rms_norm", "gated_residual", "gated_residual_ada_rms_norm", "qk_norm_rope", "swiglu"),
    *("qk_norm_rope_into", "stream_linear", "joint_attention", "group_norm_silu", "spatial_norm_silu"),
)
# A CPU has no patience for the released widths unless asked for all.
ONE_BLOCK = DiTConfig(hidden_size=576, depth=1, num_heads=8, kv_group=4)

Tensors = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class OperatorVariant:
    """One way to compute an operator.

    Attributes:
        call: does it once.
        compared: picks from its results what the case's truth holds.
    """

    call: Callable[[], Any]
    compared: Callable[[Any], Tensors] = lambda results: results if isinstance(results, tuple) else (results,)


@dataclasses.dataclass(frozen=True)
class ShapeSetting:
    """One shape of the standard run and its neighbours: picture size, pairs, whether the null branch runs, and whether
    the context's keys and values are reused.
    """

    size: int
    pairs: int
    guided: bool = True
    config: DiTConfig = RELEASED
    label: str = ""
    reuse: bool = False

    @property
    def name(self) -> str:
        if self.label:
            return self.label
        name = f"{self.size} px, {self.pairs} pair{'s' * (self.pairs > 1)}, {'guided' if self.guided else 'one branch'}"
        return name + ", reuse" * self.reuse

    def layout(self, device: torch.device) -> Layout:
        latent = self.size // 8
        shape = Shape(1, 2 * self.pairs + 1, 1, 1, latent, latent, self.guided, self.reuse)
        form = Form(REUSED, REUSED if self.guided else None) if self.reuse else None
        return Layout.make(self.config, shape, device, form)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator at one shape.

    Attributes:
        operator: name of the public function.
        setting: the shape's name.
        bytes: that one call must move through device memory, every operand once.
        flops: useful ones of one call, 0 where memory is the limit.
        variants: ways to compute it, by name.
        skipped: why a variant that people will look for is not among them.
        truth: the results in float32 or float64, to hold the variants' errors against.
    """

    operator: str
    setting: str
    bytes: int
    flops: int
    variants: dict[str, OperatorVariant]
    truth: Callable[[], Tensors]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.operator} [{self.setting}]"


def settings(device: torch.device, full: bool = False) -> list[ShapeSetting]:
    """The standard run, 256 px with 4 pairs, and the standard run's step that reuses the context; or all sizes and
    pairs with and without the null branch. On a CPU a small model's, or the released one's at 256 px.
    """
    if device.type != "cuda":
        whole = ShapeSetting(256, 4) if full else ShapeSetting(64, 2, config=ONE_BLOCK)
        return [whole, dataclasses.replace(whole, reuse=True)]
    if not full:
        return [ShapeSetting(512, 4), ShapeSetting(256, 4), ShapeSetting(512, 4, reuse=True)]
    return [ShapeSetting(size, pairs, guided) for size in SIZES for pairs in PAIRS for guided in (True, False)]


def cases(setting: ShapeSetting, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every operator's case at a setting, one at a time, so that their memory is not held together."""
    if setting.reuse:
        # Of the others, only the number of rows is another.
        yield _qk_norm_rope(setting, device, dtype, into=True)
        yield from _linears(setting, device, dtype)
        yield _joint_attention(setting, device, dtype)
        return
    for make in (_ada_rms_norm, _gated_residual, _gated_residual_ada_rms_norm, _qk_norm_rope, _swiglu):
        yield make(setting, device, dtype)
    yield from _linears(setting, device, dtype)
    yield _joint_attention(setting, device, dtype)
    # The VAE's norms know neither pairs nor branches: once a size is enough.
    if setting.guided and (setting.pairs == 4 or device.type != "cuda"):
        for channels, size in ((128, setting.size), (512, setting.size // 8)):
            yield _group_norm_silu(setting, device, dtype, channels, size)
            yield _spatial_norm_silu(setting, device, dtype, channels, size)


def plain_operator(operator: str) -> Callable[..., Any]:
    """The reference of an operator."""
    return getattr(reference, operator, None) or getattr(reference_vae, operator)


def variants(
    operator: str, arguments: tuple[Any, ...], device: torch.device
) -> tuple[dict[str, OperatorVariant], dict[str, str]]:
    """Ours, eager PyTorch and compiled PyTorch of an operator; and what is skipped, with the reason.

    Ours on a CPU is what a packed step calls there eagerly, where that is not the reference.
    """
    plain = plain_operator(operator)
    ours = getattr(lavin_kernels, operator) if device.type == "cuda" else getattr(cpu_operators, operator, plain)
    # torch compiles the same code eight times at most and then runs it eagerly: every case starts afresh.
    torch._dynamo.reset()
    compiled = torch.compile(plain, dynamic=False)
    calls = {
        "eager": OperatorVariant(lambda: plain(*arguments)),
        "compiled": OperatorVariant(lambda: compiled(*arguments)),
    }
    if ours is plain:
        return calls, {"ours": "the kernels need a CUDA device, and a CPU runs the reference"}
    return {"ours": OperatorVariant(lambda: ours(*arguments)), **calls}, {}


def _double(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with their tensors in float64, for a truth; integer tables stay."""
    return tuple(
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in arguments
    )


def _nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Random:
    """Random tensors of a device and dtype, the same ones in every run."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, device=self.device, dtype=self.dtype, generator=self.generator)
        return values.mul_(scale)


def _row_case(
    operator: str, setting: ShapeSetting, device: torch.device, arguments: tuple[Any, ...], moved: int
) -> Case:
    calls, skipped = variants(operator, arguments, device)

    def truth() -> Tensors:
        results = plain_operator(operator)(*_double(arguments))
        return results if isinstance(results, tuple) else (results,)

    return Case(operator, setting.name, moved, 0, calls, truth, skipped)


def _rows(
    setting: ShapeSetting, device: torch.device, dtype: torch.dtype, count: int
) -> tuple[_Random, Branches, list]:
    random, branches = _Random(device, dtype), setting.layout(device).branches
    return random, branches, [random(branches.rows, setting.config.hidden_size) for _ in range(count)]


def _ada_rms_norm(setting: ShapeSetting, device: torch.device, dtype: torch.dtype) -> Case:
    random, branches, [rows] = _rows(setting, device, dtype, 1)
    scale = random(2, rows.shape[1]).float()
    return _row_case("ada_rms_norm", setting, device, (rows, branches.split, scale), 2 * _nbytes(rows))


def _gated_residual(setting: ShapeSetting, device: torch.device, dtype: torch.dtype) -> Case:
    random, branches, [residual, update] = _rows(setting, device, dtype, 2)
    gate = random(2, residual.shape[1]).float()
    arguments = (residual, update, branches.split, gate)
    return _row_case("gated_residual", setting, device, arguments, 3 * _nbytes(residual))


def _gated_residual_ada_rms_norm(setting: ShapeSetting, device: torch.device, dtype: torch.dtype) -> Case:
    random, branches, [residual, update] = _rows(setting, device, dtype, 2)
    gate, scale = random(2, residual.shape[1]).float(), random(2, residual.shape[1]).float()
    arguments = (residual, update, branches.split, gate, scale)
    return _row_case("gated_residual_ada_rms_norm", setting, device, arguments, 4 * _nbytes(residual))


def _qk_norm_rope(setting: ShapeSetting, device: torch.device, dtype: torch.dtype, into: bool = False) -> Case:
    config, layout = setting.config, setting.layout(device)
    random, branches = _Random(device, dtype), layout.branches
    qkv = random(branches.rows, config.hidden_size + 2 * config.kv_size)
    weights = random(2, config.hidden_size, scale=0.1) + 1, random(2, config.kv_size, scale=0.1) + 1
    padded = -(-config.head_size // 16) * 16
    kept = [qkv.new_zeros(branches.keys, config.num_kv_heads, padded) for _ in range(2)] if into else []
    arguments = (
        *(qkv[: branches.split], qkv[branches.split :], *kept, branches, layout.positions, layout.cos, layout.sin),
        *(*weights, config.head_size, 1e-6, *([] if into else [padded])),
    )
    written = branches.rows * (config.num_heads + 2 * config.num_kv_heads) * padded * qkv.element_size()
    moved = _nbytes(qkv, layout.positions, branches.branch_rows) + written
    return _row_case("qk_norm_rope_into" if into else "qk_norm_rope", setting, device, arguments, moved)


def _swiglu(setting: ShapeSetting, device: torch.device, dtype: torch.dtype) -> Case:
    random, branches = _Random(device, dtype), setting.layout(device).branches
    gate_up = random(branches.rows, 2 * setting.config.mlp_size)
    return _row_case("swiglu", setting, device, (gate_up,), _nbytes(gate_up) * 3 // 2)


def _linears(setting: ShapeSetting, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    config = setting.config
    random, branches = _Random(device, dtype), setting.layout(device).branches
    for name, inner, outer in (
        ("qkv", config.hidden_size, config.hidden_size + 2 * config.kv_size),
        ("proj", config.hidden_size, config.hidden_size),
        ("gate_up", config.hidden_size, 2 * config.mlp_size),
        ("down", config.mlp_size, config.hidden_size),
    ):
        rows, weight = random(branches.rows, inner), random(2, outer, inner, scale=inner**-0.5)
        calls, skipped = variants("stream_linear", (rows, branches.split, weight), device)
        if can_prepack(device, dtype):
            both = PrepackedLinear(weight).both
            calls["prepacked"] = OperatorVariant(partial(both, rows, branches.split))
        elif device.type == "cpu":
            skipped["prepacked"] = f"this PyTorch has no layout of {dtype}".replace("torch.", "")
        flops = 2 * branches.rows * inner * outer
        moved = _nbytes(rows, weight) + branches.rows * outer * rows.element_size()

        def truth(rows=rows, weight=weight) -> Tensors:
            return (reference.stream_linear(rows.double(), branches.split, weight.double()),)

        yield Case("stream_linear", f"{name}, {setting.name}", moved, flops, calls, truth, skipped)


def _feature_map(random: _Random, channels: int, size: int) -> torch.Tensor:
    """One frame of the VAE, `[1, channels, 1, size, size]` channels-last."""
    return random(1, channels, 1, size, size).contiguous(memory_format=torch.channels_last_3d)


def _norm_case(operator: str, setting: ShapeSetting, device: torch.device, arguments: tuple[Any, ...]) -> Case:
    x = arguments[0]
    # Read once and written once: the second reading may come from the L2, and a share must not exceed the whole.
    moved = 2 * _nbytes(x) + _nbytes(*(part for part in arguments[4:] if isinstance(part, torch.Tensor)))
    named = dataclasses.replace(setting, label=f"{x.shape[1]} channels, {x.shape[3]}x{x.shape[4]}, {setting.size} px")
    return _row_case(operator, named, device, arguments, moved)


def _group_norm_silu(setting: ShapeSetting, device: torch.device, dtype: torch.dtype, channels: int, size: int) -> Case:
    random = _Random(device, dtype)
    arguments = (_feature_map(random, channels, size), random(channels), random(channels), 32)
    return _norm_case("group_norm_silu", setting, device, arguments)


def _spatial_norm_silu(
    setting: ShapeSetting, device: torch.device, dtype: torch.dtype, channels: int, size: int
) -> Case:
    random = _Random(device, dtype)
    latents = [_feature_map(random, channels, setting.size // 8) for _ in range(2)]
    arguments = (_feature_map(random, channels, size), random(channels), random(channels), 32, *latents)
    return _norm_case("spatial_norm_silu", setting, device, arguments)


def _joint_attention(setting: ShapeSetting, device: torch.device, dtype: torch.dtype) -> Case:
    config, branches = setting.config, setting.layout(device).branches
    random = _Random(device, dtype)
    heads, kv_heads, head_size = config.num_heads, config.num_kv_heads, config.head_size
    lens = [cond + x for cond, x in zip(branches.cond_lens, branches.x_lens, strict=True)]
    key_lens = list(branches.key_lens)
    # The kernel reads heads padded to 16 elements, as `qk_norm_rope` stores them; libraries read them unpadded or
    # padded as they need, made beforehand and not timed.
    q = random(branches.rows, heads, head_size)
    k, v = (random(branches.keys, kv_heads, head_size) for _ in range(2))
    q_padded, k_padded, v_padded = (torch.nn.functional.pad(part, (0, -head_size % 16)) for part in (q, k, v))
    calls, skipped = variants("joint_attention", (q, k, v, branches, head_size), device)
    if "ours" in calls:
        calls["ours"] = OperatorVariant(
            lambda: lavin_kernels.joint_attention(q_padded, k_padded, v_padded, branches, head_size)
        )

    # The truth of 64 query rows of every branch, in float64 (all rows would take 10,240 x 10,240 scores of 32 heads).
    sampled = [torch.linspace(0, rows - 1, min(64, rows)).long().to(device) for rows in lens]

    def truth() -> Tensors:
        outputs = []
        for picked, of_q, of_k, of_v in zip(sampled, q.split(lens), k.split(key_lens), v.split(key_lens), strict=True):
            keys, values = (part.double().repeat_interleave(heads // kv_heads, dim=1) for part in (of_k, of_v))
            scores = torch.einsum("qhd,khd->hqk", of_q[picked].double(), keys) * head_size**-0.5
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1))
        return (torch.cat(outputs),)

    stream_rows = torch.argsort(branches.branch_rows)  # stream-major row of every branch-contiguous one
    starts = [sum(lens[:branch]) for branch in range(len(lens))]
    picked_rows = torch.cat([stream_rows[picked + start] for picked, start in zip(sampled, starts, strict=True)])
    calls = {name: OperatorVariant(variant.call, lambda out: (out[picked_rows],)) for name, variant in calls.items()}

    def of_branches(outputs: list[torch.Tensor]) -> Tensors:
        """Of outputs `[1, heads, rows, padded]` a branch."""
        pairs = zip(outputs, sampled, strict=True)
        return (torch.cat([out[0, :, picked, :head_size].transpose(0, 1).flatten(1) for out, picked in pairs]),)

    libraries, more_skipped = attention_backends(q, k, v, lens, key_lens)
    calls |= {name: OperatorVariant(call, of_branches) for name, call in libraries.items()}
    flops = sum(4 * rows * keys * heads * head_size for rows, keys in zip(lens, key_lens, strict=True))
    moved = 2 * _nbytes(q) + _nbytes(k, v)
    return Case("joint_attention", setting.name, moved, flops, calls, truth, {**skipped, **more_skipped})
