"""Group norm with SiLU, plain and conditioned on the latent: the kernels against float64, and what they refuse."""

from __future__ import annotations

import contextlib
import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import kernel_checks
from support.golden import GOLDEN, golden_cases, relative_error
from support.kernel_checks import (
    DEVICE,
    DTYPES,
    assert_within_budget,
    compiled_test,
    kernel_test,
    launches,
    poisoned_memory,
)

from lavin_kernels import group_norm_silu, spatial_norm_silu, tuning
from lavin_kernels.reference import vae as reference_vae
from lavin_rt.vae.layers import NormSiLU, SpatialNormSiLU
from lavin_rt.vae.model import STVAE

CHANNELS_LAST = torch.channels_last_3d
OPERATORS = [group_norm_silu, spatial_norm_silu]
MOMENTS = {"_channel_moments_kernel": 1, "_group_moments_kernel": 1}
# (items, channels, groups, latent size, size): the model's widths and its ratio of 8, odd sizes, one pixel (no variance
# where it has a channel per group), groups of 3, more channels than a block, odd channels, one group of all; clips of
# 1, 2, 3 and 5 frames, upsampled together and with the first frame apart; ratios that are no power of two.
SHAPES = [
    (1, 128, 32, (1, 2, 3), (1, 16, 24)),
    (1, 512, 32, (2, 3, 1), (2, 3, 1)),
    (1, 256, 8, (2, 1, 3), (5, 2, 6)),
    (2, 8, 8, (1, 1, 1), (1, 1, 1)),
    (2, 48, 16, (2, 2, 3), (3, 6, 3)),
    (1, 640, 8, (1, 2, 1), (2, 2, 2)),
    (1, 7, 7, (3, 1, 2), (5, 5, 12)),
    (2, 24, 1, (3, 3, 2), (3, 3, 4)),
]
# Tiles so small that every loop goes round, and programs that take several tiles and rows.
SMALL = {
    "channel_moments": {"tile": 64, "num_warps": 4, "programs": 3},
    "group_norm_silu": {"tile": 64, "num_warps": 4, "tiles": 4, "programs": 1},
    "spatial_norm_silu": {"tile": 64, "num_warps": 4, "run": 2, "rows": 2, "programs": 1},
}


@compiled_test
@pytest.mark.slow
def test_under_the_interpreter():
    kernel_checks.run_under_interpreter(__file__)


@contextlib.contextmanager
def small_tiles():
    with contextlib.ExitStack() as stack:
        for name, values in SMALL.items():
            stack.enter_context(tuning.override(name, **values))
        yield


def arguments(operator, shape, dtype: torch.dtype, mean: float = 0.0, deviation: float = 1.0) -> list:
    items, channels, groups, latent, size = shape
    x = kernel_checks.random(items, channels, *size, dtype=torch.float64, seed=1, magnitude=deviation) + mean
    weight, bias = (kernel_checks.random(channels, dtype=dtype, seed=seed) for seed in (2, 3))
    convolved = [kernel_checks.random(items, channels, *latent, dtype=dtype, seed=seed) for seed in (4, 5)]
    x, *convolved = (part.to(dtype).contiguous(memory_format=CHANNELS_LAST) for part in (x, *convolved))
    return [x, weight, bias, groups, *(convolved if operator.__name__ == "spatial_norm_silu" else [])]


def in_float64(values: list) -> list:
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


def check(operator, values: list, against: list | None = None) -> None:
    """The error budget, `against` what the reference is given instead of `values`."""
    name = operator.__name__
    with poisoned_memory(), launches() as counts:
        result = operator(*values)
    assert counts == {**MOMENTS, f"_{name}_kernel": 1}
    assert result.stride() == values[0].stride()
    of_reference = getattr(reference_vae, name)
    assert_within_budget(result, of_reference(*(against or values)), of_reference(*in_float64(values)))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_error_budget(operator, shape, dtype):
    check(operator, arguments(operator, shape, dtype))


@kernel_test
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_many_tiles(operator, shape):
    with small_tiles():
        check(operator, arguments(operator, shape, torch.float32))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
# At 1e-4 the variance is a hundredth of eps; in float16 a square of 1e4 overflows; a sum of squares of 1e3 +- 0.1 in
# float32 keeps no digit of the variance.
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1e-4), (0, 1e4), (1e3, 1e-1), (-1e3, 1e-1)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_extreme_values(operator, mean, deviation, dtype):
    values = arguments(operator, (1, 64, 4, (1, 3, 2), (1, 6, 16)), dtype, mean, deviation)
    # On a CPU PyTorch sums squares where memory is channels-last, Welford's way where it is not: the better one counts.
    x, *rest = values
    with small_tiles() if mean else contextlib.nullcontext():
        check(operator, values, against=[x.contiguous(), *rest])


@kernel_test
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_size(data):
    def draw(most):
        return data.draw(st.integers(1, most))

    groups, latent = draw(4), [draw(2) for _ in range(3)]
    frames = data.draw(st.sampled_from([frames for frames in range(1, 6) if goes(frames, latent[0])]))
    size = (frames, latent[1] * draw(3), latent[2] * draw(4))
    # PyTorch's group norm refuses a single value per group, whose result is silu(bias).
    width = 1 + draw(6)
    with small_tiles():
        shape = (draw(2), groups * width, groups, latent, size)
        check(spatial_norm_silu, arguments(spatial_norm_silu, shape, torch.float32))


def goes(frames: int, latent_frames: int) -> bool:
    with contextlib.suppress(ValueError):
        return bool(reference_vae.frame_source(frames, latent_frames))
    return False


@kernel_test
@pytest.mark.parametrize("operator", OPERATORS)
def test_weights_in_float32(operator):
    x, weight, bias, *rest = arguments(operator, SHAPES[0], torch.bfloat16)
    check(operator, [x, weight.float(), bias.float(), *rest])


@kernel_test
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_item_is_alone_in_its_batch(operator):
    x, weight, bias, groups, *convolved = arguments(operator, (3, 32, 8, (1, 2, 3), (2, 8, 12)), torch.bfloat16)
    alone = operator(x[1:2], weight, bias, groups, *(part[1:2] for part in convolved))
    for harm in (math.nan, 3e38):
        for part in (x, *convolved):
            part[0], part[2] = harm, harm
        assert torch.equal(operator(x, weight, bias, groups, *convolved)[1:2], alone)


@kernel_test
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_run_gives_the_same_bits(operator):
    values = arguments(operator, SHAPES[1], torch.float32)
    assert torch.equal(operator(*values), operator(*values))


@kernel_test
@pytest.mark.parametrize("kernel", SMALL)
def test_every_candidate_is_right(kernel):
    spatial = kernel == "spatial_norm_silu"
    candidates = import_module(
        "lavin_kernels.ops.spatial_norm" if spatial else "lavin_kernels.ops.group_norm"
    ).CANDIDATES
    operator = spatial_norm_silu if spatial else group_norm_silu
    values = arguments(operator, (1, 512, 4, (1, 1, 1), (1, 8, 8)), torch.bfloat16)
    # The interpreter knows no warps.
    for candidate in {str({**candidate, "num_warps": 4}): candidate for candidate in candidates[kernel]}.values():
        with tuning.override(kernel, **{**candidate, "programs": min(candidate["programs"], 8)}):
            check(operator, values)


# Two clips, partial tiles and chunks, groups of 3, cells of 5 x 2 pixels in bands of 2 rows, a variance as low as eps.
MUTANT_SHAPE = (2, 12, 4, (2, 1, 3), (3, 5, 6))


@kernel_test
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_kernels_that_mutants_are_made_of_are_right(operator):
    with small_tiles():
        check(operator, arguments(operator, MUTANT_SHAPE, torch.float32, deviation=1e-3))


GROUP, SPATIAL = "lavin_kernels.ops.group_norm", "lavin_kernels.ops.spatial_norm"


@kernel_test
@pytest.mark.parametrize(
    ("module", "original", "changed"),
    [
        (GROUP, "(start // BLOCK_P + 1)", "(start // BLOCK_P + 2)"),
        (GROUP, "tl.where(inside, x - mean, 0.0)", "x - mean"),
        (GROUP, "squares + counts * distance * distance", "squares"),
        (GROUP, "within + count * distance * distance", "within"),
        (GROUP, "/ size + eps", "/ size"),
        (GROUP, "(part // chunks * pixels + first) * C", "first * C"),
        (GROUP, "inverse * weight", "inverse"),
        (GROUP, "(x - mean) * factor + bias", "(x - mean) * factor"),
        (GROUP, "mask = (start + rows < count) & (channels < C)", "mask = (start + rows < count) & (channels < C - 1)"),
        (SPATIAL, "(frame + lead) // frame_ratio", "frame // frame_ratio"),
        (SPATIAL, "latent = item * latent_frames", "latent = frame * 0"),
        (SPATIAL, "* conv_y + conv_b", "* conv_b + conv_y"),
        (SPATIAL, "        row += (column == column_ratio).to(tl.int64)\n", ""),
        (SPATIAL, "row_band % bands * band", "row_band % bands"),
        (SPATIAL, "(cells < latent_columns)", "(cells < latent_columns - 1)"),
    ],
    ids=[
        "count of the recurrence",
        "rows beyond the chunk",
        "spread of the lanes",
        "spread of the chunks",
        "no eps",
        "another item's pixels",
        "no weight",
        "no bias",
        "a channel not written",
        "first frame not apart",
        "another item's latent",
        "latents swapped",
        "rows of a cell",
        "bands of rows",
        "a cell not written",
    ],
)
def test_mutants_are_caught(module, original, changed, tmp_path):
    broken = kernel_checks.mutant(module, original, changed, tmp_path)
    operator = broken.group_norm_silu if module == GROUP else broken.spatial_norm_silu
    values = arguments(operator, MUTANT_SHAPE, torch.float32, deviation=1e-3)
    with small_tiles(), pytest.raises(AssertionError):
        check(operator, values)


@kernel_test
def test_a_difference_of_sums_of_squares_is_caught(tmp_path):
    changed = "tl.sum(squares + counts * (mean * mean), 0) - count * of_chunk * of_chunk"
    broken = kernel_checks.mutant(GROUP, "tl.sum(squares + counts * distance * distance, 0)", changed, tmp_path)
    x, *rest = arguments(group_norm_silu, (1, 64, 4, (1, 3, 2), (1, 12, 16)), torch.float32, 1e3, 1e-1)
    with pytest.raises(AssertionError):
        check(broken.group_norm_silu, [x, *rest], against=[x.contiguous(), *rest])


def whole_bands():
    """Fewer programs than the default: 16 x 16 pixels do not fill a device anyway, and every program takes a while."""
    return tuning.override("spatial_norm_silu", tile=2048, num_warps=4, run=8, rows=8, programs=1)


@kernel_test
def test_golden_vae():
    case = golden_cases("stvae")["vae3"]
    state_dict = torch.load(GOLDEN / "stvae.pt", weights_only=True)["state_dict"]
    vae, _ = STVAE.from_state_dict(state_dict, device=DEVICE, impl="triton")
    counts = {kind: sum(isinstance(part, kind) for part in vae.modules()) for kind in (NormSiLU, SpatialNormSiLU)}
    with launches() as launched, whole_bands():
        posterior = vae.encode(case["pixels"].to(DEVICE))
        decoded = vae.decode(case["mean"].to(DEVICE))
    assert launched["_group_norm_silu_kernel"] == counts[NormSiLU] > 0
    assert launched["_spatial_norm_silu_kernel"] == counts[SpatialNormSiLU] > 0
    for result, name in ((posterior.mean, "mean"), (posterior.logvar, "logvar"), (decoded, "decoded")):
        assert relative_error(result.cpu(), case[name]) <= 1e-5


def last(*shape: int, **options) -> torch.Tensor:
    return torch.ones(shape, **options).contiguous(memory_format=CHANNELS_LAST)


GOOD = {
    "x": last(2, 8, 3, 4, 6),
    "weight": torch.ones(8),
    "bias": torch.ones(8),
    "groups": 4,
    "conv_y": last(2, 8, 2, 2, 2),
    "conv_b": last(2, 8, 2, 2, 2),
}


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("x", None, TypeError, "x is of type NoneType; expected a tensor"),
        ("x", last(2, 8, 3, 4, 6, dtype=torch.int32), TypeError, "x has dtype int32; expected bfloat16"),
        ("x", torch.ones(8, 3, 4, 6), ValueError, r"x has shape .*; expected \[N, C, frames, rows, columns\]"),
        ("x", torch.ones(2, 8, 0, 4, 6), ValueError, r"x has shape .* at least one of each"),
        ("x", torch.ones(2, 8, 3, 4, 6), ValueError, "x has strides .*; expected channels-last memory"),
        ("x", last(2, 8, 3, 4, 12)[..., ::2], ValueError, "x has strides .*; expected channels-last memory"),
        ("weight", torch.ones(4), ValueError, r"weight has shape \[4\]; expected \[8\]"),
        ("weight", torch.ones(8).half(), TypeError, "weight has dtype float16; expected float32"),
        ("bias", [1.0], TypeError, "bias is of type list; expected a tensor"),
        ("bias", torch.ones(8, device="meta"), ValueError, "bias is on meta; expected cpu"),
        ("groups", 3, ValueError, "groups is 3; expected a divisor of 8, the channels of x"),
        ("groups", 0, ValueError, "groups is 0; expected a divisor of 8, the channels of x"),
        ("groups", 4.0, TypeError, "groups is of type float; expected an int"),
        ("conv_y", torch.ones(2, 8, 2, 2, 2), ValueError, r"conv_y has strides .*; expected channels-last memory"),
        ("conv_y", last(1, 8, 2, 2, 2), ValueError, r"conv_y has shape \[1, 8, 2, 2, 2\]; expected \[2, 8, t, h, w\]"),
        ("conv_b", last(2, 8, 2, 2, 2, dtype=torch.bfloat16), TypeError, "conv_b has dtype bfloat16; expected float32"),
        ("conv_b", last(2, 8, 2, 2, 1), ValueError, r"conv_b has shape \[2, 8, 2, 2, 1\]; expected \[2, 8, 2, 2, 2\]"),
        ("x", last(2, 8, 3, 5, 6), ValueError, "x has 5 rows or columns, expected a multiple of the latent's 2"),
        ("x", last(2, 8, 3, 4, 5), ValueError, "x has 5 rows or columns, expected a multiple of the latent's 2"),
        ("x", last(2, 8, 1, 4, 6), ValueError, "x has 1 frames, expected a multiple of the latent's 2"),
    ],
)  # fmt: skip
def test_bad_input(argument, value, error, message):
    with launches() as counts, pytest.raises(error, match=message) as raised:
        spatial_norm_silu(**{**GOOD, argument: value})
    assert not counts and "\n" not in str(raised.value)
    if not argument.startswith("conv") and "latent" not in message:
        with pytest.raises(error, match=message):
            group_norm_silu(**{name: {**GOOD, argument: value}[name] for name in ("x", "weight", "bias", "groups")})


@kernel_test
def test_kernel_refuses_float64():
    values = in_float64(arguments(group_norm_silu, SHAPES[3], torch.float32))
    with pytest.raises(TypeError, match="x has dtype float64; kernels take bfloat16 or float16 or float32"):
        group_norm_silu(*values)


@compiled_test
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("operator", OPERATORS)
def test_cpu_runs_the_reference(operator, dtype):
    values = [value.to(dtype) if isinstance(value, torch.Tensor) else value for value in GOOD.values()]
    values = values[: 6 if operator is spatial_norm_silu else 4]
    assert torch.equal(operator(*values), getattr(reference_vae, operator.__name__)(*values))


@compiled_test
@pytest.mark.parametrize("module", [GROUP, SPATIAL])
def test_no_size_is_compiled_in(module):
    kernels = [value for name, value in vars(import_module(module)).items() if name.endswith("_kernel")]
    kernels = [kernel for kernel in kernels if hasattr(kernel, "params")]
    assert len(kernels) == (3 if module == GROUP else 1)
    for kernel in kernels:
        sizes = [part for part in kernel.params if not part.is_constexpr and not part.name.endswith("_ptr")]
        assert all(part.do_not_specialize for part in sizes if part.name != "eps")
        assert {part.name for part in kernel.params if part.is_constexpr} <= {
            "C", "GROUPS", "RUN", "BLOCK_P", "BLOCK_C", "BLOCK_ROWS"
        }  # fmt: skip
