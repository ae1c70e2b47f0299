"""The attention kernel itself, run by Triton's interpreter on a CPU, against float64.

Without `TRITON_INTERPRET=1` in the environment, `test_in_the_interpreter` runs the rest in a process that has it.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from support.contraction import as_compiled
from support.kernel_checks import run_under_interpreter

from lavin_kernels import Branches, joint_attention, joint_attention_with_lse, tuning
from lavin_kernels.launch import interpreted
from lavin_kernels.reference import dit as reference

module = importlib.import_module("lavin_kernels.ops.joint_attention")
kernels = importlib.import_module("lavin_kernels.ops.joint_attention_triton")


def in_interpreter(test):
    """Collected in the process that `test_in_the_interpreter` starts, and only there."""
    test.__test__ = interpreted()
    return test


# Small tiles: several of them, and partial ones, in a hundred rows.
SMALL = {"block_m": 32, "block_n": 16, "num_warps": 4, "num_stages": 2}
CONFIG = {"variant": "pointer", **SMALL}
BRANCHES = ((37, 21), (16, 9))  # two branches of 53 and 30 rows: odd, and more than one tile of each


if not interpreted():

    @pytest.mark.slow
    def test_in_the_interpreter():
        output = run_under_interpreter(__file__)
        counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
        assert counts["passed"] >= 50 and set(counts) == {"passed"}, counts


class CountingKernel:
    """Stands in for the kernel and counts its launches, whose other arguments it keeps."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            scalars = [arg for arg in args if isinstance(arg, (int, float))]
            self.launches.append((grid, scalars, kwargs))
            return self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    """Counts launches of the kernel, and lets every new tensor start as NaN."""
    kernel = CountingKernel(module.joint_attention_kernel)
    monkeypatch.setattr(module, "joint_attention_kernel", kernel)
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return kernel


def inputs(cond_lens, x_lens, *, heads=2, kv_heads=1, head_size=72, stored=None, dtype=torch.float32, x_only=False):
    """Seeded q, k, v and the branches."""
    generator = torch.Generator().manual_seed(0)
    branches = Branches.make(cond_lens, x_lens)
    rows = branches.rows

    def part(rows, heads):
        values = torch.randn(rows, heads, head_size, generator=generator).to(dtype)
        return torch.nn.functional.pad(values, (0, (stored or head_size) - head_size))

    return part(sum(x_lens) if x_only else rows, heads), part(rows, kv_heads), part(rows, kv_heads), branches


def ulp(values, dtype):
    """Distance of neighbouring numbers of `dtype` at every value."""
    return torch.finfo(dtype).eps * 2.0 ** values.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor()


def assert_in_budget(result, plain, truth, dtype, magnitude=None):
    """At most twice the largest error of plain PyTorch in that dtype, plus one unit in the last place of the truth, or
    of the `magnitude` of what was summed to get there.
    """
    assert torch.isfinite(result).all()
    allowed = 2 * (plain.double() - truth).abs().max() + ulp(truth if magnitude is None else magnitude, dtype)
    error = (result.double() - truth).abs()
    assert (error <= allowed).all(), (
        f"error {error.max():.3g}, allowed {allowed[error.argmax() // truth.shape[1]].max():.3g}"
    )


def check(q, k, v, branches, head_size, counting, scale=None):
    """One launch, both results within the budget."""
    before = len(counting.launches)
    out, lse = joint_attention_with_lse(q, k, v, branches, head_size, scale)
    assert len(counting.launches) == before + 1
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.shape == (q.shape[0], q.shape[1] * head_size) and lse.shape == q.shape[:2]
    q, k, v = (part[..., :head_size] for part in (q, k, v))
    plain = reference.joint_attention_with_lse(q, k, v, branches, head_size, scale)
    truth = reference.joint_attention_with_lse(q.double(), k.double(), v.double(), branches, head_size, scale)
    assert_in_budget(out, plain[0], truth[0], q.dtype)
    # A score is a sum of products far larger than itself, in whatever order a processor adds them up.
    _, magnitude = reference.joint_attention_with_lse(
        q.double().abs(), k.double().abs(), v.double(), branches, head_size, scale
    )
    assert_in_budget(lse, plain[1], truth[1], torch.float32, magnitude)
    return out, lse


@in_interpreter
class TestResults:
    @pytest.fixture(autouse=True)
    def _config(self):
        with tuning.override("joint_attention", **CONFIG):
            yield

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("stored", [72, 80])
    def test_released_head_size(self, dtype, stored, counting):
        check(*inputs(*BRANCHES, stored=stored, dtype=dtype), 72, counting)

    @pytest.mark.parametrize("head_size", [8, 24, 40, 80, 104, 128])
    def test_head_sizes(self, head_size, counting):
        check(*inputs((10,), (9,), heads=1, head_size=head_size), head_size, counting)

    @pytest.mark.parametrize(
        ("cond_lens", "x_lens"),
        [
            ((0,), (1,)),  # one row
            ((1,), (0,)),
            ((32,), (32,)),  # whole tiles only
            ((0, 0), (33, 5)),  # empty cond stream
            ((18, 3), (0, 0)),  # empty x stream
            ((5, 40, 1, 0, 17), (11, 2, 1, 4, 0)),  # five branches, the longest in the middle
            ((7, 0, 7), (3, 0, 3)),  # an empty branch, and equal ones
        ],
    )
    def test_branches(self, cond_lens, x_lens, counting):
        check(*inputs(cond_lens, x_lens), 72, counting)

    @pytest.mark.parametrize(("cond_lens", "x_lens"), [BRANCHES, ((5, 40, 1, 30, 17), (11, 2, 0, 35, 1))])
    def test_x_queries_alone(self, cond_lens, x_lens, counting):
        check(*inputs(cond_lens, x_lens, x_only=True), 72, counting)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (8, 2), (6, 1)])
    def test_grouped_heads(self, heads, kv_heads, counting):
        check(*inputs((11,), (6,), heads=heads, kv_heads=kv_heads, head_size=24), 24, counting)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_extreme_scores(self, dtype, counting):
        q, k, v, branches = inputs(*BRANCHES, dtype=dtype)
        check(q * 60, k * 60, v * 1e4, branches, 72, counting)  # scaled scores of some 3e4: one key gets all the weight
        check(q * 1e-4, k, v, branches, 72, counting)  # all keys weigh the same
        check(q, -1e3 * k.abs(), v, branches, 72, counting)

    def test_scale(self, counting):
        check(*inputs(*BRANCHES), 72, counting, scale=0.5)

    def test_strided_rows_and_heads(self, counting):
        q, k, v, branches = inputs(*BRANCHES)
        joined = torch.cat([q, k, v], dim=1)  # heads of one row side by side, as a joined projection leaves them
        q, k, v = joined.split([2, 1, 1], dim=1)
        check(q, k, v, branches, 72, counting)
        check(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, branches, 72, counting)

    def test_unaligned_input_is_copied(self, counting):
        q, k, v, branches = inputs(*BRANCHES, stored=75)  # rows that do not start on 16 bytes
        check(q, k, v, branches, 72, counting)
        shifted = torch.empty(k.numel() + 1).as_strided(k.shape, k.stride(), 1).copy_(k)
        check(q, shifted, v, branches, 72, counting)

    # Longer than a tile of queries, and shorter than a tile of keys, which then reaches into the next branch.
    @pytest.mark.parametrize(("cond", "x"), [(37, 21), (7, 2)])
    def test_neighbouring_branches_do_not_leak(self, cond, x, counting):
        q, k, v, branches = inputs((10, cond, 9), (3, x, 8))
        out, lse = check(q, k, v, branches, 72, counting)
        for poison in (float("nan"), 3e38):
            for part in (q, k, v):
                part[:13], part[13 + cond + x :] = poison, -poison
            poisoned_out, poisoned_lse = joint_attention_with_lse(q, k, v, branches, 72)
            # Rows of the second branch in the stream-major results.
            for rows in (slice(10, 10 + cond), slice(22 + cond, 22 + cond + x)):
                assert torch.equal(poisoned_out[rows], out[rows])
                assert torch.equal(poisoned_lse[rows], lse[rows])

    def test_storage_beyond_the_head_and_the_rows_is_ignored(self, counting):
        q, k, v, branches = inputs(*BRANCHES)
        out, lse = check(q, k, v, branches, 72, counting)

        def framed(part):
            frame = torch.full((part.shape[0] + 40, part.shape[1] + 1, 80), float("nan"))
            frame[20:-20, :-1, :72] = part
            return frame[20:-20, :-1]

        framed_out, framed_lse = joint_attention_with_lse(framed(q), framed(k), framed(v), branches, 72)
        assert torch.equal(framed_out, out) and torch.equal(framed_lse, lse)

    def test_without_lse(self, counting):
        q, k, v, branches = inputs(*BRANCHES)
        assert torch.equal(joint_attention(q, k, v, branches, 72), joint_attention_with_lse(q, k, v, branches, 72)[0])
        assert len(counting.launches) == 2

    def test_no_queries(self, counting):
        q, k, v, branches = inputs((5,), (0,), x_only=True)
        out, lse = joint_attention_with_lse(q, k, v, branches, 72)
        assert out.shape == (0, 144) and lse.shape == (0, 2)

    def test_lengths_are_run_time_values(self, counting):
        """Other lengths change the grid and nothing that a kernel is compiled for."""
        for cond_lens, x_lens in (((37, 21), (16, 9)), ((90, 1), (2, 64))):
            joint_attention(*inputs(cond_lens, x_lens), 72)
        first, second = counting.launches
        assert first[0] != second[0] and first[1:] == second[1:]


@in_interpreter
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_configuration(capability, dtype, counting):
    config = tuning.default_config("joint_attention", capability, dtype)  # the Gluon form falls back here
    with tuning.override("joint_attention", **config):
        check(*inputs((150, 70), (40, 3), stored=80, dtype=dtype), 72, counting)


def check_as_compiled(counting):
    """Float32 over 1,370 keys, in the arithmetic that a GPU's compiler makes of it."""
    config = tuning.default_config("joint_attention", 90, torch.float32)
    with tuning.override("joint_attention", **config), as_compiled():
        check(*inputs((1338,), (32,), heads=1, x_only=True), 72, counting)


@in_interpreter
def test_errors_do_not_add_up_over_tiles(counting):
    check_as_compiled(counting)


# Kernels that are wrong in one line: the check that sees it, the line, and what stands there instead.
MUTATIONS = {
    "scores beyond the branch": ("result", "(row + tl.arange(0, BLOCK_N) < end)[None", "(row < end)[None"),
    "one key too many": ("result", "tl.arange(0, BLOCK_N) < end)[None", "tl.arange(0, BLOCK_N) <= end)[None"),
    "values beyond the branch": (
        "leak",
        "v_head_stride, BLOCK_N, 0, WIDTH, HEAD_SIZE, MASK)",
        "v_head_stride, BLOCK_N, 0, WIDTH, HEAD_SIZE, False)",
    ),
    "values beyond it, rest": (
        "leak",
        "v_head_stride, BLOCK_N, WIDTH, REST, HEAD_SIZE, MASK",
        "v_head_stride, BLOCK_N, WIDTH, REST, HEAD_SIZE, False",
    ),
    "wrong key/value head": ("result", "kv_head * GROUP + program % GROUP,", "program % GROUP * 2 + kv_head,"),
    "swapped streams": ("result", "tl.where(rows < cond, cond_start", "tl.where(rows >= cond, cond_start"),
    "keys of another branch": ("result", "_of(before, keys),", "_of(before, queries) * 0,"),
    "scores without the rest": ("result", "scores = _add_dot(q_rest, keys.T, scores, 1.0, UPCAST)", "pass"),
    "scores of one piece twice": ("result", "_add_dot(q[i], keys.T,", "_add_dot(q[0], keys.T,"),
    "weights of earlier tiles": ("result", "total * decay + ", "total + "),
    "decay of a product": ("compiled", "exp2(offset - new_offset)", "exp2(offset / scale * scale - new_offset)"),
    "values of earlier tiles": ("result", "tl.fma(acc, factor,", "tl.fma(acc, factor * 0 + 1,"),
    "values of earlier tiles, 16 bits": ("16 bits", "_dot(a, b, acc * factor,", "_dot(a, b, acc,"),
    "last tile dropped": ("result", "range(whole, first_key + keys,", "range(whole, first_key + keys - BLOCK_N,"),
    "log-sum-exp in base 2": ("result", "* 0.6931471805599453", ""),
    "x rows at another place": ("x only", "x_start - tl.load(table_ptr + 3) + rows", "x_start * 0 + rows"),
}


@in_interpreter
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_kernel_is_caught(name, tmp_path, counting):
    test, line, instead = MUTATIONS[name]
    source = Path(kernels.__file__).read_text()
    assert source.count(line) == 1
    path = tmp_path / "mutated_kernel.py"
    path.write_text(source.replace(line, instead))
    spec = importlib.util.spec_from_file_location("mutated_kernel", path)
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)

    counting.kernel = mutated.joint_attention_kernel
    with tuning.override("joint_attention", **CONFIG), pytest.raises((AssertionError, IndexError)):
        if test == "leak":  # of the second branch into the first, which is shorter than a tile of keys
            q, k, v, branches = inputs((7, 5), (2, 3))
            k[9:], v[9:] = float("nan"), float("nan")
            assert torch.isfinite(joint_attention(q, k, v, branches, 72)[:7]).all()
        elif test == "compiled":
            check_as_compiled(counting)
        else:
            heads, dtype = 4 if "head" in name else 2, torch.bfloat16 if test == "16 bits" else torch.float32
            made = inputs((37, 9), (16, 4), heads=heads, kv_heads=heads // 2, dtype=dtype, x_only=test == "x only")
            check(*made, 72, counting)
