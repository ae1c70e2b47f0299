"""Pieces of large pictures and long clips: they cover, they blend, they save memory, and how far off they are."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import GOLDEN, relative_error
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavin_rt.errors import InputError
from lavin_rt.vae.model import STVAE
from lavin_rt.vae.tiling import (
    as_frames,
    as_latents,
    as_pixels,
    auto_tile,
    blended,
    decode_axes,
    encode_axes,
    make_axis,
)


@lru_cache
def vae() -> STVAE:
    weights = torch.load(GOLDEN / "stvae.pt", weights_only=True)["state_dict"]
    return STVAE.from_state_dict(weights)[0]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class PeakBytes(TorchDispatchMode):
    """The most bytes that results of operations held at one time."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def peak_bytes(method: str, x: torch.Tensor, **options: int) -> int:
    with torch.inference_mode():
        getattr(vae(), method)(x)  # derived kernels are there
        with PeakBytes() as mode:
            getattr(vae(), method)(x, **options)
    return mode.peak


@settings(deadline=None)
@given(latents=st.integers(1, 40), size=st.integers(4, 45), kind=st.sampled_from(["space", "frames", "latent frames"]))
def test_pieces_cover_and_their_weights_sum_to_one(latents, size, kind):
    target = {"space": as_pixels, "frames": as_frames, "latent frames": as_latents}[kind]
    axis = make_axis(latents, size, as_latents, target, time=kind != "space")
    total = torch.zeros(axis.length)
    end = 0
    for piece in axis.pieces:
        assert piece.source.stop - piece.source.start == min(size, latents)
        assert (piece.source.start == 0) == (piece is axis.pieces[0])
        assert piece.source.start <= end - (kind != "space") if end else True
        assert piece.source.start > end - size
        assert (piece.weights >= 0).all()
        total[piece.target] += piece.weights
        end = piece.source.stop
    assert end == latents and axis.pieces[-1].target.stop == axis.length == target(0, latents).stop
    torch.testing.assert_close(total, torch.ones(axis.length))
    if kind != "space":
        assert all(piece.weights[0] == 0 for piece in axis.pieces[1:])


# A function that acts on every latent alone is the same in pieces: nothing is shifted, dropped or counted twice.
@pytest.mark.parametrize(("tile", "chunk"), [(4, None), (5, 3), (None, 4), (8, 5)])
def test_pieces_of_a_pointwise_function_are_exact(tile, chunk):
    latents = noise(2, 3, 7, 9, 13).double()

    def decode(x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(4, 2)], 2)
        return x.repeat_interleave(8, 3).repeat_interleave(8, 4)

    axes = decode_axes(latents.shape, tile, chunk)
    assert relative_error(blended(decode, latents, axes), decode(latents)) <= 1e-6  # sums are float32
    pixels = decode(latents)

    def encode(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::4, ::8, ::8]

    axes = encode_axes(pixels.shape, tile, chunk)
    assert relative_error(blended(encode, pixels, axes), latents) <= 1e-6


@pytest.mark.parametrize("options", [{"tile": 6}, {"chunk": 3}, {"tile": 8, "chunk": 9}, {"tile": "auto"}])
def test_a_piece_that_covers_everything_is_exact(options):
    latents = noise(1, 16, 3, 4, 6)
    pixels = noise(1, 3, 9, 32, 48)
    with torch.inference_mode():
        assert torch.equal(vae().decode(latents, **options), vae().decode(latents))
        assert torch.equal(vae().encode(pixels, **options).mean, vae().encode(pixels).mean)


# Noise has the same statistics everywhere, so that what is left are the tiles' edges. Measured: 0.44, 0.085, 0.056.
def test_larger_tiles_come_closer_and_leave_no_seam():
    latents = noise(1, 16, 1, 24, 18)
    with torch.inference_mode():
        whole = vae().decode(latents)
        tiled = {tile: vae().decode(latents, tile=tile) for tile in (4, 12, 16)}
    errors = [relative_error(result, whole) for result in tiled.values()]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] <= 0.07
    for dim in (-2, -1):
        steps, steps_of_whole = (
            x.diff(dim=dim).square().transpose(dim, -1).mean((0, 1, 2, 3)) for x in (tiled[12], whole)
        )
        assert steps.max() <= 1.05 * steps_of_whole.max()


def test_longer_chunks_come_closer():
    latents = noise(1, 16, 9, 2, 3)
    with torch.inference_mode():
        whole = vae().decode(latents)
        errors = [relative_error(vae().decode(latents, chunk=chunk), whole) for chunk in (3, 6, 8)]
        assert errors[0] > errors[1] > errors[2] > 0
        encoded = vae().encode(whole, chunk=5)
    assert encoded.mean.shape == (1, 16, 9, 2, 3) and encoded.mean.isfinite().all()


@pytest.mark.parametrize(
    ("method", "shape", "options"),
    [
        ("decode", (1, 16, 1, 16, 16), {"tile": 8}),
        ("encode", (1, 3, 1, 128, 128), {"tile": 8}),
        ("decode", (1, 16, 12, 4, 4), {"chunk": 4}),
        ("encode", (1, 3, 45, 32, 32), {"chunk": 4}),
        ("decode", (4, 16, 1, 6, 6), {"batch": 1}),
        ("encode", (4, 3, 1, 48, 48), {"batch": 1}),
    ],
)
def test_pieces_take_less_memory(method, shape, options):
    x = noise(*shape)
    # A piece is a quarter to a third of the whole; the assembled result and its float32 sums come on top.
    assert peak_bytes(method, x, **options) <= 0.5 * peak_bytes(method, x)


def test_auto_tile_leaves_usual_sizes_whole():
    assert auto_tile(512, 512) is None and auto_tile(1024, 1024) is None
    assert auto_tile(512, 1040) == auto_tile(2048, 2048) == 64


@pytest.mark.parametrize(
    ("method", "shape", "options", "message"),
    [
        ("decode", (1, 16, 1, 8, 8), {"tile": 3}, "tile is 3, expected 'auto' or a number of latents, at least 4"),
        ("decode", (1, 16, 1, 8, 8), {"tile": "small"}, "tile is 'small'"),
        ("decode", (1, 16, 5, 4, 4), {"chunk": 2}, "chunk is 2, expected a number of latent frames, at least 3"),
        (
            "encode",
            (1, 3, 1, 70, 64),
            {"tile": 4},
            "1 frames of 70x64 pixels; expected 1 . 4 k frames",
        ),
        ("encode", (1, 3, 16, 32, 32), {"chunk": 3}, "16 frames of 32x32 pixels"),
    ],
)
def test_what_cannot_be_cut(method, shape, options, message):
    with pytest.raises(InputError, match=message):
        getattr(vae(), method)(torch.zeros(shape), **options)
