"""Properties of the schedule, of patches, rotary positions and the packed layout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavin_kernels.branches import Branches
from lavin_kernels.reference import dit as reference
from lavin_rt.dit.config import DiTConfig, preset
from lavin_rt.dit.layout import Layout, Shape
from lavin_rt.dit.model import patchify, unpatchify
from lavin_rt.dit.rope import grid_positions, rotary_tables, token_angles
from lavin_rt.errors import InputError
from lavin_rt.sampling.schedule import schedule

counts = st.integers(1, 4)
halves = st.integers(1, 5)

PUBLISHED_20 = [
    *(0, 0.0056, 0.0111, 0.0167, 0.0222, 0.0278, 0.0333, 0.0389, 0.0444, 0.05),
    *(0.0524, 0.073, 0.1148, 0.1777, 0.2618, 0.3671, 0.4936, 0.6412, 0.81, 1),
]


def test_schedule_of_20_is_the_published_table():
    assert schedule(20).tolist() == torch.tensor(PUBLISHED_20).tolist()


@given(st.integers(2, 68).map(lambda half: 2 * half))
def test_schedule(steps):
    knots = schedule(steps)
    assert knots.shape == (steps,) and knots.dtype == torch.float32
    assert knots[0] == 0 and knots[-1] == 1
    assert (knots.diff() > 0).all()
    assert knots[steps // 2 - 1].item() == pytest.approx(0.05)
    assert all(abs(knot * 1e4 - round(knot * 1e4)) < 1e-2 for knot in knots.tolist())


@pytest.mark.parametrize("steps", [0, -2, 2, 3, 19, 137, 138, 20.0, "20", True, None])
def test_bad_steps(steps):
    with pytest.raises(InputError, match="even number from 4 to 136"):
        schedule(steps)


@given(st.integers(1, 3), st.integers(1, 3), halves, halves, st.integers(1, 5))
def test_patchify_round_trip(batch, frames, rows, columns, channels):
    latents = torch.arange(batch * channels * frames * rows * columns * 4).view(
        batch, channels, frames, 2 * rows, 2 * columns
    )
    tokens = patchify(latents)
    assert tokens.shape == (batch, frames * rows * columns, 4 * channels)
    assert torch.equal(unpatchify(tokens, frames, 2 * rows, 2 * columns), latents)


def test_patch_features_are_row_column_channel():
    latents = torch.zeros(1, 16, 2, 4, 6)
    latents[0, 5, 1, 3, 2] = 1  # frame 1, patch row 1, patch column 1, row 1 and column 0 in the patch, channel 5
    assert patchify(latents).nonzero().tolist() == [[0, 1 * 6 + 1 * 3 + 1, (1 * 2 + 0) * 16 + 5]]


@st.composite
def shapes(draw):
    query_frames = draw(st.integers(1, 3))
    return Shape(
        queries=draw(counts),
        cond_frames=query_frames + draw(st.integers(0, 4)),
        query_frames=query_frames,
        target_frames=draw(st.integers(1, 3)),
        height=2 * draw(halves),
        width=2 * draw(halves),
        guided=draw(st.booleans()),
    )


@settings(deadline=None)
@given(shapes())
def test_layout(shape):
    config = DiTConfig(hidden_size=24, depth=1, num_heads=2, kv_group=1)
    layout = Layout.make(config, shape)
    branches = layout.branches
    rows, columns = shape.height // 2, shape.width // 2
    assert branches.rows == len(layout.positions) == sum(branches.cond_lens) + sum(branches.x_lens)
    assert len(branches.cond_lens) == shape.queries * (2 if shape.guided else 1)
    for branch, (cond_len, x_len, cond_start, x_start) in enumerate(branches.table.tolist()):
        of_query = branch < shape.queries
        frames = shape.cond_frames if of_query else 1 + shape.query_frames
        joint = torch.cat([layout.positions[cond_start:][:cond_len], layout.positions[x_start:][:x_len]])
        # Position counts the joint sequence of the branch, cond first.
        assert torch.equal(joint, grid_positions(frames + shape.target_frames, rows, columns))
    assert layout.positions.max() < len(layout.cos)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5))
def test_branch_order_round_trip(lens):
    branches = Branches.make(*zip(*lens, strict=True))
    rows = torch.arange(branches.rows, dtype=torch.float32)
    assert sorted(branches.branch_rows.tolist()) == list(range(branches.rows))
    contiguous = torch.empty_like(rows)
    contiguous[branches.branch_rows.long()] = rows
    parts = list(contiguous.split([cond + x for cond, x in lens]))
    for part, (cond_len, x_len, cond_start, x_start) in zip(parts, branches.table.tolist(), strict=True):
        expected = [*range(cond_start, cond_start + cond_len), *range(x_start, x_start + x_len)]
        assert part.tolist() == expected
    assert torch.equal(reference._stream_major(parts, branches), rows)


@pytest.mark.parametrize(("cond", "x"), [([], []), ([1], [1, 2]), ([-1], [1])])
def test_bad_branches(cond, x):
    with pytest.raises(ValueError, match="cond_lens"):
        Branches.make(cond, x)


def test_rotary_angles():
    """Angles of a token, written out: position times `10000 ** (-2 j / w)` over its own third of the head."""
    cos, sin = token_angles(2, 3, 4, head_size=72)
    token = (1 * 3 + 2) * 4 + 3  # frame 1, row 2, column 3
    for axis, position in enumerate((1, 2, 3)):
        for j in range(12):
            angle = position * 10000 ** (-2 * j / 24)
            assert cos[token, axis, j].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[token, axis, j].item() == pytest.approx(math.sin(angle), abs=1e-6)
    table = rotary_tables(4, 72)
    assert torch.equal(table[0][grid_positions(2, 3, 4)], cos) and torch.equal(table[1][grid_positions(2, 3, 4)], sin)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 160, "num_heads": 2}, "head size 80.*not divisible by 6"),
        ({"hidden_size": 145}, "not divisible by num_heads"),
        ({"kv_group": 3}, "not divisible by kv_group 3"),
        ({"depth": 0}, "depth is 0, expected a positive integer"),
        ({"num_heads": "2"}, "num_heads is '2'"),
        ({"patch_size": 4}, "patch_size is 4"),
    ],
)
def test_bad_config(values, message):
    good = {"hidden_size": 144, "depth": 1, "num_heads": 2, "kv_group": 2}
    with pytest.raises(InputError, match=message) as error:
        DiTConfig.from_dict({**good, **values}, "model.safetensors")
    assert str(error.value).startswith("model.safetensors: ")


def test_unknown_preset():
    assert preset("lavin-dit-3.4b").head_size == 72
    with pytest.raises(InputError, match=r"unknown preset 'lavin-dit-9b'; expected one of lavin-dit-3.4b"):
        preset("lavin-dit-9b")


def test_config_names_what_is_missing():
    with pytest.raises(InputError, match="the config lacks num_heads, kv_group"):
        DiTConfig.from_dict({"hidden_size": 144, "depth": 1}, "model.safetensors")
