"""The VAE's two networks in a form to compile: plain torch calls, every derived kernel a parameter with a name.

Pictures are one frame: every time tap of a convolution sees the same frame, so kernels are summed over time and the
networks run on `[N, C, H, W]`. Clips of a given number of frames keep the three-dimensional convolutions. Upsampling by
two and the convolution behind it are one transposed convolution, as in `lavin_rt.vae.layers`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lavin_export.networks.denoiser import fixed
from lavin_rt.artifact.parts import Ranges, TensorSpec
from lavin_rt.pictures.images import check_clip_frames, latent_frames
from lavin_rt.vae import layers as vae_layers
from lavin_rt.vae import model as vae_model
from lavin_rt.vae.model import STVAE

ROWS = [2, 512]  # latent rows and columns that a part takes: 16 to 4096 pixels


class ExportedEncoder(nn.Module):
    """Pixels `[1, 3, frames, H, W]` in [-1, 1] to mean and log-variance `[1, 16, 1 + (frames - 1) / 4, H/8, W/8]`.

    Args:
        vae: whose weights; floats in its dtype.
        frames: of the clips that it takes, `1 + 4 k`.
    """

    def __init__(self, vae: STVAE, frames: int = 1):
        super().__init__()
        self.picture = frames == 1
        self.network = _exported(vae.encoder, self.picture)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moments = self.network(pixels.squeeze(2)).unsqueeze(2) if self.picture else self.network(pixels)
        half = moments.shape[1] // 2
        return moments[:, :half], moments[:, half:].clamp(-30.0, 20.0)


class ExportedDecoder(nn.Module):
    """Raw latents `[1, 16, t, h, w]` to pixels `[1, 3, frames, 8 h, 8 w]`, `t = 1 + (frames - 1) / 4`.

    Args:
        vae: whose weights; floats in its dtype.
        frames: of the clips that it makes, `1 + 4 k`.
    """

    def __init__(self, vae: STVAE, frames: int = 1):
        super().__init__()
        self.picture = frames == 1
        self.network = _exported(vae.decoder, self.picture)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.network(latents.squeeze(2)).unsqueeze(2) if self.picture else self.network(latents)


NETWORKS = {"encoder": ExportedEncoder, "decoder": ExportedDecoder}


class PictureConv(nn.Module):
    """A causal 3D convolution on a single frame: its kernel summed over time."""

    def __init__(self, source: vae_layers.CausalConv | nn.Conv3d):
        super().__init__()
        conv = source if isinstance(source, nn.Conv3d) else source.conv
        assert conv.bias is not None
        self.weight = fixed(conv.weight.double().sum(2).to(conv.weight.dtype))
        self.bias = fixed(conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class Norm(nn.Module):
    """GroupNorm, then SiLU, in float32 whatever the network's dtype: a compiler of 16-bit graphs is told outright.

    Args:
        source: the group norm.
        dims: dimensions behind the channels: 2 for pictures, 3 for clips.
    """

    def __init__(self, source: nn.GroupNorm, dims: int = 2):
        super().__init__()
        self.weight, self.bias = (fixed(value.float().view(-1, *[1] * dims)) for value in (source.weight, source.bias))
        self.groups, self.eps = source.num_groups, source.eps

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x.float(), self.groups, eps=self.eps) * self.weight + self.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.normed(x)).to(x.dtype)


class SpatialNorm(Norm):
    """The decoder's norm: GroupNorm, scaled and shifted by two 1x1 convolutions of the latent, then SiLU."""

    def __init__(self, source: vae_layers.SpatialNormSiLU):
        super().__init__(source.norm_layer)
        self.conv_y, self.conv_b = PictureConv(source.conv_y), PictureConv(source.conv_b)

    def forward(self, x: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # conditioned
        scale, shift = (conv(latent).float() for conv in (self.conv_y, self.conv_b))
        return F.silu(_on_blocks(self.normed(x), scale, shift)).to(x.dtype)


def _on_blocks(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`x * scale + shift` where every row and column of the latter two stands for a block of pixels: views that
    broadcast over it, no upsampled copy.
    """
    rows, columns = scale.shape[-2:]
    blocks = x.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))  # [..., h, r, w, r]
    scale, shift = (part[..., :, None, :, None] for part in (scale, shift))
    # All four at once: torch 2.11 joins two of them under a guard on their strides that it cannot prove.
    return (blocks * scale + shift).flatten(-4).unflatten(-1, x.shape[-2:])


class PictureDownsampler(nn.Module):
    """One zero row below and one zero column right, then a 3x3 convolution of stride 2."""

    def __init__(self, source: vae_layers.Downsampler):
        super().__init__()
        assert source.conv.bias is not None
        self.weight, self.bias = fixed(source.conv.weight), fixed(source.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, stride=2)


class PictureUpsampler(nn.Module):
    """Nearest upsampling by two and a 3x3 convolution, as one transposed convolution."""

    def __init__(self, source: vae_layers.Upsampler):
        super().__init__()
        self.weight = fixed(source.derive(source.conv.weight))  # [in, out, 4, 4]
        assert source.conv.bias is not None
        self.bias = fixed(source.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


class ClipUpsampler(PictureUpsampler):
    """The same for every frame; with `time`, all frames after the first come twice."""

    def __init__(self, source: vae_layers.Upsampler):
        super().__init__(source)
        self.time = source.time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        clips, frames = x.shape[0], x.shape[2]
        x = vae_layers.as_clips(super().forward(vae_layers.as_pictures(x)), clips)
        if not self.time or frames == 1:
            return x
        return _after_first(x, 2)


class ClipSpatialNorm(Norm):
    """`SpatialNorm` of clips: latent frames after the first are repeated to the frames that they stand for."""

    def __init__(self, source: vae_layers.SpatialNormSiLU):
        super().__init__(source.norm_layer, dims=3)
        self.conv_y, self.conv_b = source.conv_y, source.conv_b

    def forward(self, x: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # conditioned
        frames, of_latent = x.shape[2], latent.shape[2]
        scale, shift = (conv(latent).float() for conv in (self.conv_y, self.conv_b))
        if frames != of_latent:
            ratio = (frames - 1) // (of_latent - 1)
            scale, shift = (_after_first(part, ratio) for part in (scale, shift))
        return F.silu(_on_blocks(self.normed(x), scale, shift)).to(x.dtype)


def _after_first(clip: torch.Tensor, ratio: int) -> torch.Tensor:
    """`[N, C, T, ...]` with every frame but the first `ratio` times."""
    first, rest = clip[:, :, :1], clip[:, :, 1:]
    return torch.cat([first, rest.unsqueeze(3).expand(-1, -1, -1, ratio, -1, -1).flatten(2, 3)], dim=2)


def _exported(network: vae_model.Encoder | vae_model.Decoder, picture: bool) -> nn.Module:
    """A copy of the encoder or decoder, sharing its weights, without kernels derived while running; for pictures one
    of tensors `[N, C, H, W]`.
    """
    memo = {id(parameter): fixed(parameter) for parameter in network.parameters()}
    network = copy.deepcopy(network, memo)
    network.form.plain = picture  # what is left of the layers then does nothing of its own but add and go on
    _exchange(network, picture)
    return network


def _exchange(owner: nn.Module, picture: bool) -> None:
    """Puts the layers of this file in place of the network's own."""
    for name, child in list(owner.named_children()):
        layer: nn.Module | None = None
        if isinstance(child, vae_layers.Upsampler):
            layer = PictureUpsampler(child) if picture else ClipUpsampler(child)
        elif isinstance(child, vae_layers.SpatialNormSiLU):
            layer = SpatialNorm(child) if picture else ClipSpatialNorm(child)
        elif isinstance(child, vae_layers.NormSiLU):
            layer = Norm(child, dims=2 if picture else 3)
        elif picture and isinstance(child, vae_layers.Downsampler):
            layer = PictureDownsampler(child)
        elif picture and isinstance(child, vae_layers.CausalConv | nn.Conv3d):
            layer = PictureConv(child)
        if layer is None:
            _exchange(child, picture)
        else:
            setattr(owner, name, layer)


def in_dtype(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts an exported encoder or decoder, its norms' weights aside, which stay in float32 as they compute."""
    for module in network.modules():
        if isinstance(module, Norm):
            continue
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, fixed(value.to(dtype)))
    return network


def clip_lengths(clip_frames: Sequence[int]) -> list[int]:
    """Numbers of frames to export the VAE for: 1, of pictures, and those of the clips asked for, each once.

    Raises:
        InputError: a number that is not `1 + 4 k`.
    """
    for frames in clip_frames:
        check_clip_frames(frames)
    return list(dict.fromkeys([1, *clip_frames]))


def dynamic_shapes(part: str) -> tuple[dict[int, object]]:
    """What may vary of the input of "encoder" or "decoder", as `torch.export.export` wants it."""
    from torch.export import Dim

    factor = 8 if part == "encoder" else 1
    rows, columns = (Dim(name, min=ROWS[0], max=ROWS[1]) for name in ("rows", "columns"))
    return ({3: factor * rows, 4: factor * columns},)


def example_inputs(
    part: str, dtype: torch.dtype = torch.float32, frames: int = 1, rows: int = 4, columns: int = 6, seed: int = 0
) -> tuple[torch.Tensor]:
    """A random input of "encoder" or "decoder" whose latent has these rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    if part == "decoder":
        return (torch.randn(1, 16, latent_frames(frames), rows, columns, generator=generator).to(dtype),)
    pixels = torch.rand(1, 3, frames, 8 * rows, 8 * columns, generator=generator) * 2 - 1
    return (pixels.to(dtype),)


def part_name(part: str, frames: int = 1) -> str:
    """The name in the manifest: `vae_encoder`, `vae_decoder_clip5`, ..."""
    return f"vae_{part}" + ("" if frames == 1 else f"_clip{frames}")


def network_of(name: str, vae: STVAE) -> nn.Module:
    """The network of a name that `part_name` gave."""
    part, _, frames = name.removeprefix("vae_").partition("_clip")
    return NETWORKS[part](vae, int(frames or 1))


def specification(part: str, dtype: str, frames: int = 1) -> tuple[list[TensorSpec], list[TensorSpec], Ranges]:
    """Inputs, outputs and ranges of a part, as the manifest has them."""
    pixels: TensorSpec = {"name": "pixels", "dtype": dtype, "shape": [1, 3, frames, "8*rows", "8*columns"]}
    latent: TensorSpec = {"name": "latents", "dtype": dtype, "shape": [1, 16, latent_frames(frames), "rows", "columns"]}
    ranges = {"rows": list(ROWS), "columns": list(ROWS)}
    if part == "encoder":
        return [pixels], [{**latent, "name": name} for name in ("mean", "logvar")], ranges
    return [latent], [pixels], ranges
