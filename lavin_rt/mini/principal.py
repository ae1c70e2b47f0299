"""Weights to start the VAE from: an encoder that computes the principal components of 8 x 8 patches, exactly linear.

An encoder with empty residual branches is linear up to its last norm: convolutions of stride 2 gather 2 x 2, 4 x 4 and
8 x 8 pixels. The norm and the SiLU behind it are made linear as well. A latent's signal s goes into both channels of a
group as `s + p` and `-s - p`, where p does not depend on the picture, is 0 but for one corner, and dwarfs s there: the
group's mean is 0, its deviation that of p, and `silu(x) - silu(-x) = x`. The last convolution takes p away again. What
s was in that corner is lost; most latents are therefore the mean of two groups with opposite corners. So training
begins with latents that already tell what can be told linearly, and a transformer can be trained on them at once.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F

from lavin_rt.images import to_pixels
from lavin_rt.mini.corpus import Corpus
from lavin_rt.mini.tasks import PICTURE_TASKS
from lavin_rt.vae import LATENT_SCALE, LATENT_SHIFT, STVAE
from lavin_rt.vae_layers import CausalConv

STILL_INPUT, STILL_HEIGHT = 6.0, 512.0  # p deviates by 64, of 8 x 8 latent pixels, where a signal deviates by 1
SIDE = 8  # latent pixels of the pictures that the deviation is right for
WHITENING = 0.5  # 1 would give all latent channels the same variance, 0 the pixels' own
PATCHES = 30_000


@dataclasses.dataclass(frozen=True, eq=False)
class Components:
    """Principal components of patches, float32; features are ordered (row, column, colour).

    Attributes:
        quarter: `[K, 48]`, of 4 x 4 pixels, orthonormal rows: the finest detail is left out on the way.
        whole: `[16, 4 K]`, of the four quarters (upper left, upper right, lower left, lower right) to signals of unit
            mean square.
        gains: `[16]`, of signals to scaled latents.
    """

    quarter: torch.Tensor
    whole: torch.Tensor
    gains: torch.Tensor

    @classmethod
    def of(cls, pictures: np.ndarray, channels: int, kept: int, seed: int = 0) -> Components:
        """From uint8 pictures `[N, S, S, 3]`.

        Args:
            channels: of the latent.
            kept: components of a quarter.
        """
        patches = _patches(to_pixels(torch.from_numpy(pictures))).flatten(0, 2)  # [M, 8, 8, 3]
        chosen = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))[:PATCHES]
        quarters = _quarters(patches[chosen])  # [M, 2, 2, 48]
        quarter = leading(quarters.flatten(0, 2), kept)[0]
        reduced = (quarters @ quarter.T).flatten(1)  # [M, 4 K]
        whole, deviations = leading(reduced, channels)
        gains = deviations ** (1 - WHITENING)
        # Unit variance over all channels together.
        return cls(quarter, whole / deviations[:, None], gains / gains.square().mean().sqrt())


def _patches(pixels: torch.Tensor) -> torch.Tensor:
    """`[N, S, S, 3]` to `[N, S/8, S/8, 8, 8, 3]`."""
    return pixels.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3)


def _quarters(patches: torch.Tensor) -> torch.Tensor:
    """`[..., 8, 8, 3]` to `[..., 2, 2, 48]`, features of 4 x 4 pixels."""
    return patches.unflatten(-2, (2, 4)).unflatten(-4, (2, 4)).transpose(-4, -3).flatten(-3)


def leading(samples: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The directions `[count, D]` of largest second moment of samples `[M, D]`, and their root mean squares."""
    moments = samples.double().T @ samples.double() / len(samples)
    values, vectors = torch.linalg.eigh(moments)
    return vectors.flip(1)[:, :count].T.float(), values.flip(0)[:count].clamp(min=1e-8).sqrt().float()


def draw_pictures(corpus: Corpus, seed: int, count: int) -> np.ndarray:
    """Targets of random picture tasks, uint8 `[count, S, S, 3]`."""
    rng = np.random.default_rng([seed, 7])
    tasks = [PICTURE_TASKS[rng.integers(len(PICTURE_TASKS))] for _ in range(count)]
    return np.stack([corpus.draw(task, rng)[1, 0] for task in tasks])


@torch.no_grad()
def start_from_components(vae: STVAE, components: Components, deviation: float) -> None:
    """Sets an encoder's weights to compute the components (as raw latents, so that scaled ones have unit variance) and
    every convolution's weights to the present frame. The posterior's deviation is `deviation` of a scaled latent's.

    Takes levels of at least 32, 32 and 64 channels and a last one of 64, two channels to a group.
    """
    encoder, config = vae.encoder, vae.config
    channels, groups, width = config.latent_channels, config.norm_num_groups, config.block_out_channels[-1]
    if (width, groups) != (4 * channels, 2 * channels):
        raise ValueError(f"the last level has {width} channels in {groups} groups; expected 4 and 2 a latent channel")
    for module in vae.modules():
        if isinstance(module, CausalConv) and module.conv.weight.shape[2] > 1:
            module.conv.weight[:, :, :-1] = 0  # frames begin as pictures do
    for level in (*encoder.down_blocks, encoder.mid_block):
        for block in level.resnets:
            block.conv2.conv.weight.zero_()
            block.conv2.conv.bias.zero_()
            if block.conv_shortcut is not None:
                _set(block.conv_shortcut, torch.eye(block.conv_shortcut.in_channels)[:, :, None, None, None])
    _set(encoder.conv_in.conv, F.pad(torch.eye(3)[:, :, None, None, None], (1, 1, 1, 1, 2, 0)))
    first, second, third = (level.downsamplers[0].conv for level in encoder.down_blocks[:3])
    # [12, 3, 2, 2]: the 2 x 2 pixels as they are, (row, column, colour).
    gather = torch.eye(12).view(12, 2, 2, 3).permute(0, 3, 1, 2)
    _set(first, F.pad(gather, (0, 1, 0, 1)))
    # A quarter's features: (row of 2 x 2 pixels, row in them, column of 2 x 2 pixels, column in them, colour).
    kept = len(components.quarter)
    quarter = components.quarter.view(kept, 2, 2, 2, 2, 3).permute(0, 2, 4, 5, 1, 3).reshape(kept, 12, 2, 2)
    _set(second, F.pad(quarter, (0, 1, 0, 1)))
    signals = components.whole.view(channels, 2, 2, kept).permute(0, 3, 1, 2)  # [16, K, 2, 2]
    source = group_sources(channels, groups)
    pairs = torch.stack([signals[source], -signals[source]], 1)
    pairs[channels : channels + 2] = 0  # the pattern alone
    _set(third, F.pad(pairs.flatten(0, 1), (0, 1, 0, 1)))

    # (1 - up)(1 - left), where up and left are 1 if there is a pixel, convolved from a constant: 1 in the upper left.
    corner = (
        torch.tensor([[1.0, -1.0, 0], [-1.0, 1.0, 0], [0, 0, 0]]) * STILL_HEIGHT / F.silu(torch.tensor(STILL_INPUT))
    )
    last = encoder.mid_block.resnets[-1]
    last.norm2.weight[0], last.norm2.bias[0] = 0, STILL_INPUT
    for group, opposite in enumerate(group_corners(channels, groups)):
        pattern = corner.flip(0, 1) if opposite else corner
        last.conv2.conv.weight[2 * group, 0, -1] = pattern
        last.conv2.conv.weight[2 * group + 1, 0, -1] = -pattern
    norm, out = encoder.norm_out, encoder.conv_out.conv
    norm.weight.fill_(1)
    norm.bias.zero_()
    out.weight.zero_()
    mixing = group_mixing(channels, groups) * components.gains[:, None] * (STILL_HEIGHT / SIDE / LATENT_SCALE)
    out.weight[:channels, 0::2, -1, 1, 1] = mixing
    out.weight[:channels, 1::2, -1, 1, 1] = -mixing
    out.bias[:channels], out.bias[channels:] = LATENT_SHIFT, 2 * math.log(deviation / LATENT_SCALE)


def patch_synthesis(components: Components) -> torch.Tensor:
    """Patches from scaled latents, the best linear map: `[64, 3, 16]`, pixels in the order (row, column)."""
    to_latents = components.whole @ torch.block_diag(*[components.quarter] * 4) * components.gains[:, None]
    patches = torch.linalg.pinv(to_latents).view(2, 2, 4, 4, 3, -1)  # quarter's row and column, row, column, colour
    return patches.permute(0, 2, 1, 3, 4, 5).flatten(0, 3)


def group_sources(channels: int, groups: int) -> torch.Tensor:
    """Which latent's signal every group of the last norm carries, int64 `[groups]`; two behind the first `channels`
    carry none.
    """
    return torch.cat([torch.arange(channels), torch.zeros(2, dtype=torch.int64), torch.arange(groups - channels - 2)])


def group_corners(channels: int, groups: int) -> torch.Tensor:
    """Whether a group's pattern is in the lower right, not in the upper left, bool `[groups]`."""
    return torch.arange(groups) > channels


def group_mixing(channels: int, groups: int) -> torch.Tensor:
    """How latents are made of groups, `[channels, groups]`: the mean of those that carry one, less the patterns."""
    mixing = torch.zeros(channels, groups)
    corners, source = group_corners(channels, groups), group_sources(channels, groups)
    for group in (*range(channels), *range(channels + 2, groups)):
        mixing[source[group], group] = 1
    mixing /= mixing.sum(1, keepdim=True)
    upper, lower = mixing[:, ~corners].sum(1), mixing[:, corners].sum(1)
    mixing[:, channels], mixing[:, channels + 1] = -upper, -lower
    return mixing


def _set(conv: torch.nn.Module, weight: torch.Tensor) -> None:
    """Puts a weight into the first output and input channels of a convolution and zero into the rest."""
    conv.weight.zero_()
    conv.weight[: weight.shape[0], : weight.shape[1]] = weight
    if conv.bias is not None:
        conv.bias.zero_()


def component_latents(components: Components, frames: np.ndarray) -> torch.Tensor:
    """What the encoder computes of clips of one or five frames, uint8 `[N, T, S, S, 3]`, directly: scaled latents
    `[N, 16, t, S/8, S/8]`. Of five, the second latent frame is that of the mean of the last four.
    """
    clips, pixels = len(frames), to_pixels(torch.from_numpy(frames))
    if pixels.shape[1] > 1:
        pixels = torch.cat([pixels[:, :1], pixels[:, 1:].mean(1, keepdim=True)], 1)
    quarters = _quarters(_patches(pixels.flatten(0, 1)))  # [N t, r, c, 2, 2, 48]
    signals = ((quarters @ components.quarter.T).flatten(3) @ components.whole.T).permute(0, 3, 1, 2)
    channels, rows, columns = signals.shape[1:]
    groups = 2 * channels
    still = torch.zeros(2, rows, columns)
    still[0, 0, 0] = still[1, -1, -1] = STILL_HEIGHT
    grouped = signals[:, group_sources(channels, groups)]
    grouped[:, channels : channels + 2] = 0
    grouped = grouped + still[group_corners(channels, groups).long()]
    grouped = grouped.unflatten(0, (clips, -1)).transpose(1, 2)  # [N, groups, t, r, c]
    normed = grouped / grouped.square().mean((2, 3, 4), keepdim=True).sqrt()
    latents = torch.einsum("cg,ngtrs->nctrs", group_mixing(channels, groups), normed)
    return latents * (STILL_HEIGHT / SIDE * components.gains[:, None, None, None])
