"""Plain PyTorch meaning of the video autoencoder's two fused operators: the oracle of tests and benchmarks.

Functions of the same names in `lavin_kernels` say what the arguments and results are, check them, and call these for
tensors on a CPU. Statistics are computed in float32 (float64 for float64 tensors), results are in the dtype of `x`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float = 1e-6
) -> torch.Tensor:
    """`silu(group_norm(x))`, the statistics of a group over its channels, all frames, rows and columns."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps), inplace=True)


def spatial_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    conv_y: torch.Tensor,
    conv_b: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`silu(group_norm(x) * up(conv_y) + up(conv_b))`, `up` as `frame_source` and `pixel_source` say.

    A 1x1 convolution commutes with nearest upsampling, so `conv_y` and `conv_b` are convolved at the latent's size and
    nothing of the size of `x` is made of them.

    Raises:
        ValueError: sizes of `x` that are no whole multiples of the latent's (see `frame_source`), or `conv_b` unlike
            `conv_y`.
    """
    if conv_y.shape != conv_b.shape:
        raise ValueError(f"conv_y is {list(conv_y.shape)} and conv_b {list(conv_b.shape)}; expected the same shape")
    frames, rows, columns = x.shape[2:]
    latent_frames, latent_rows, latent_columns = conv_y.shape[2:]
    row_ratio, column_ratio = pixel_source(rows, latent_rows), pixel_source(columns, latent_columns)
    frame_ratio, lead = frame_source(frames, latent_frames)
    if frames != latent_frames:
        source = (torch.arange(frames, device=x.device) + lead) // frame_ratio
        # index_select forgets the memory format.
        conv_y, conv_b = (
            part.index_select(2, source).contiguous(memory_format=torch.channels_last_3d) for part in (conv_y, conv_b)
        )
    # Every latent row and column stands for a block of pixels: views that broadcast over the block, no upsampled copy.
    scale, shift = conv_y[:, :, :, :, None, :, None], conv_b[:, :, :, :, None, :, None]  # [N, C, T, h, 1, w, 1]
    normed = F.group_norm(x, groups, weight, bias, eps)
    blocks = normed.unflatten(4, (latent_columns, column_ratio)).unflatten(3, (latent_rows, row_ratio))
    return F.silu((blocks * scale).add_(shift).flatten(5, 6).flatten(3, 4), inplace=True)


def pixel_source(size: int, latent_size: int) -> int:
    """The ratio of nearest upsampling along rows or columns: output index `i` reads latent index `i // ratio`.

    Raises:
        ValueError: `size` is no whole multiple of `latent_size`.
    """
    if size % latent_size:
        raise ValueError(f"x has {size} rows or columns, expected a multiple of the latent's {latent_size}")
    return size // latent_size


def frame_source(frames: int, latent_frames: int) -> tuple[int, int]:
    """`(ratio, lead)` of nearest upsampling along time: output frame `i` reads latent frame `(i + lead) // ratio`.

    With an odd number of frames above one, the first frame reads the first latent frame alone and the rest is upsampled
    apart, which `lead = ratio - 1` expresses: 0 reads 0, and i reads `1 + (i - 1) // ratio`. Otherwise all are
    upsampled together, `lead = 0`.

    Raises:
        ValueError: `frames` (or all but the first on both sides) is no whole multiple of `latent_frames`.
    """
    if frames % 2 and frames > 1:
        if latent_frames < 2 or (frames - 1) % (latent_frames - 1):
            raise ValueError(
                f"x has {frames} frames and the latent {latent_frames}; "
                "expected the frames after the first to be a multiple of the latent's after the first"
            )
        ratio = (frames - 1) // (latent_frames - 1)
        return ratio, ratio - 1
    if frames % latent_frames:
        raise ValueError(f"x has {frames} frames, expected a multiple of the latent's {latent_frames}")
    return frames // latent_frames, 0
