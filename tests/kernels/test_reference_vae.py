"""The references of the autoencoder's operators, against definitions written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import relative_error

from lavin_kernels.reference import vae as reference_vae
from lavin_rt.vae.layers import upsampled


@settings(deadline=None)
@given(latent=st.integers(1, 12), ratio=st.sampled_from([1, 2, 3, 4, 8]))
def test_pixels_read_their_nearest_latent(latent, ratio):
    source = torch.arange(latent * ratio) // reference_vae.pixel_source(latent * ratio, latent)
    expected = F.interpolate(torch.arange(latent, dtype=torch.float64)[None, None], latent * ratio)[0, 0]
    assert torch.equal(source, expected.long())


@settings(deadline=None)
@given(latent=st.integers(1, 9), ratio=st.sampled_from([1, 2, 4]), apart=st.booleans())
def test_frames_read_their_nearest_latent(latent, ratio, apart):
    frames = 1 + ratio * (latent - 1) if apart else ratio * latent
    if frames % 2 == 0 or frames == 1:
        if frames % latent:
            return
        whole = torch.arange(latent, dtype=torch.float64).view(1, 1, -1, 1, 1)
        expected = F.interpolate(whole, (frames, 1, 1)).flatten()
    elif (frames - 1) % max(latent - 1, 1) or latent == 1:
        with pytest.raises(ValueError, match="frames after the first"):
            reference_vae.frame_source(frames, latent)
        return
    else:
        rest = torch.arange(1, latent, dtype=torch.float64).view(1, 1, -1, 1, 1)
        expected = torch.cat([torch.zeros(1), F.interpolate(rest, (frames - 1, 1, 1)).flatten()])
    ratio, lead = reference_vae.frame_source(frames, latent)
    assert torch.equal((torch.arange(frames) + lead) // ratio, expected.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (2, 2), (3, 2), (9, 3), (4, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_spatial_norm_reference(frames, latent_frames, layout, dtype):
    x = (torch.randn(2, 12, frames, 6, 8) * 3 + 1).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, 12).to(dtype)
    y, b = torch.randn(2, 2, 12, latent_frames, 3, 2).to(dtype)
    result = reference_vae.spatial_norm_silu(x, weight, bias, 3, y, b)
    groups = x.double().reshape(2, 3, -1)
    normed = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
    weight, bias = (part.double().view(-1, 1, 1, 1) for part in (weight, bias))
    size = (frames, 6, 8)
    h = (normed.view(x.shape) * weight + bias) * upsampled(y.double(), size) + upsampled(b.double(), size)
    # Four roundings of about half a unit in the last place each: the norm, its scaling, its shift, SiLU.
    assert relative_error(result, h * h.sigmoid()) <= 2 * torch.finfo(dtype).eps
    assert result.dtype == dtype and result.is_contiguous(memory_format=layout)
    h = normed.view(x.shape) * weight + bias
    result = reference_vae.group_norm_silu(x, weight.flatten().to(dtype), bias.flatten().to(dtype), 3)
    assert relative_error(result, h * h.sigmoid()) <= 2 * torch.finfo(dtype).eps
    assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("x_size", "latent_size"), [((1, 5, 8), (1, 2, 2)), ((4, 4, 4), (3, 2, 2)), ((9, 4, 4), (4, 2, 2))]
)
def test_spatial_norm_refuses_broken_ratios(x_size, latent_size):
    latent = torch.zeros(1, 4, *latent_size)
    with pytest.raises(ValueError, match="multiple of the latent's"):
        reference_vae.spatial_norm_silu(torch.zeros(1, 4, *x_size), torch.ones(4), torch.zeros(4), 2, latent, latent)
    with pytest.raises(ValueError, match="expected the same shape"):
        reference_vae.spatial_norm_silu(latent, torch.ones(4), torch.zeros(4), 2, latent, latent[:, :2])
