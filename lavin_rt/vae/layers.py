"""The layers of the ST-VAE (LaVin-DiT, arXiv 2411.11505, section 3.2), in a plain and a fast form of the same function.

Tensors are `[N, C, T, H, W]`; in the fast form their memory is channels-last. Parameters have the published names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from lavin_kernels.reference import vae as reference_vae

NORM_EPS = 1e-6


@dataclasses.dataclass(eq=False)
class VAEForm:
    """How a network computes; all its layers share one.

    Attributes:
        plain: the textbook form: 3D convolutions on single frames too, upsampling before what follows it.
        group_norm_silu, spatial_norm_silu: the operators, with the signatures of `lavin_kernels.reference.vae`.
    """

    plain: bool
    group_norm_silu: Callable[..., torch.Tensor]
    spatial_norm_silu: Callable[..., torch.Tensor]


def in_memory_of(form: VAEForm, x: torch.Tensor) -> torch.Tensor:
    """Channels-last for the fast form: its convolutions and operators are fastest there, and frames are views.

    The operators' kernels take nothing else, and a convolution does not always keep it: PyTorch's own, which runs small
    ones on a CPU, returns contiguous memory.
    """
    return x if form.plain else x.contiguous(memory_format=torch.channels_last_3d)


def upsampled(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """`x` nearest-upsampled to (frames, rows, columns); of an odd number of frames the first one and the rest apart."""
    frames, *space = size
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(x, size)
    first, rest = F.interpolate(x[:, :, :1], (1, *space)), F.interpolate(x[:, :, 1:], (frames - 1, *space))
    return torch.cat([first, rest], dim=2)


def as_pictures(x: torch.Tensor) -> torch.Tensor:
    """`[N, C, T, H, W]` as `[N * T, C, H, W]`, a view where the memory is channels-last, else a copy that is.

    Flattened behind the channels, the stride of a single picture would be the channels', by which PyTorch takes the
    memory for contiguous: paddings and norms would copy it. A trace keeps the plain way, as engines copy permutations.
    """
    if torch.compiler.is_compiling():
        return x.transpose(1, 2).flatten(0, 1)
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def as_clips(x: torch.Tensor, clips: int) -> torch.Tensor:
    """The inverse of `as_pictures`, as a view."""
    if torch.compiler.is_compiling():
        return x.unflatten(0, (clips, -1)).transpose(1, 2)
    return x.permute(0, 2, 3, 1).unflatten(0, (clips, -1)).permute(0, 4, 1, 2, 3)


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int = 1,
    padding: int | Sequence[int] = 0,
    transposed: bool = False,
) -> torch.Tensor:
    """A convolution in as many dimensions as `weight` has, in which float32 means float32.

    cuDNN would compute it in TF32 by PyTorch's default. That setting is the process's, and other threads read it, so
    what it says is handed over with the call; a trace takes the ordinary one, as compilers know no other.
    """
    dims = weight.dim() - 2
    if chosen_by_process(x):
        if transposed:
            return F.conv_transpose2d(x, weight, bias, stride, padding)
        return (F.conv2d if dims == 2 else F.conv3d)(x, weight, bias, stride, padding)
    paddings = [padding] * dims if isinstance(padding, int) else list(padding)
    cudnn, ones, zeros = torch.backends.cudnn, [1] * dims, [0] * dims
    return torch.ops.aten._convolution.default(
        *(x, weight, bias, [stride] * dims, paddings, ones, transposed, zeros, 1),
        *(cudnn.benchmark, cudnn.deterministic, cudnn.enabled),
        False,  # TF32
    )


def chosen_by_process(x: torch.Tensor) -> bool:
    """Whether a convolution of `x` is left to the process's settings: all but float32 on CUDA outside of a trace."""
    return x.dtype != torch.float32 or x.device.type != "cuda" or torch.compiler.is_compiling()


def pointwise(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """A 1x1x1 convolution as one of pictures: cuDNN's of three dimensions are slower, and missing in some releases.

    A trace keeps the three, as exporters want weights as they are.
    """
    if torch.compiler.is_compiling():
        return convolution(x, conv.weight, conv.bias)
    return as_clips(convolution(as_pictures(x), conv.weight.squeeze(2), conv.bias), x.shape[0])


class DerivedKernel(nn.Module):
    """A convolution `conv` that computes with a kernel derived from its weight, kept outside the state dict.

    The derived kernel is made at first use, and again after the weight was replaced, changed in place, loaded, moved or
    cast; a CUDA graph therefore needs a call before its capture. Where gradients reach the weight it is derived in
    every call and not kept; a trace takes the kept one or derives it.
    """

    conv: nn.Conv2d | nn.Conv3d

    def __init__(self):
        super().__init__()
        self._kept: tuple[torch.Tensor, torch.Tensor, int] | None = None

    def derive(self, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def kernel(self) -> torch.Tensor:
        weight = self.conv.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return self.derive(weight)
        if torch.compiler.is_compiling():
            return self.derive(weight) if self._kept is None else self._kept[0]
        version = 0 if weight.is_inference() else weight._version
        if self._kept is None or self._kept[1] is not weight or self._kept[2] != version:
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not meet autograd later
                derived = self.derive(weight).contiguous(memory_format=torch.channels_last)
            self._kept = (derived, weight, version)
        return self._kept[0]

    @property
    def kept_bytes(self) -> int:
        """Memory of the derived kernel, 0 while there is none."""
        return 0 if self._kept is None else self._kept[0].nbytes

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DerivedKernel:
        self._kept = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)


class CausalConv(DerivedKernel):
    """3D convolution that sees no later frame: the first is repeated in front; rows and columns are padded by zeros.

    On a single frame every time tap sees that frame, so the fast form sums the kernel over time and runs a 2D
    convolution: a third of the work for a kernel of 3, and a kernel of a third of the weight's size to keep.
    """

    conv: nn.Conv3d

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, form: VAEForm):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size)
        self.form = form

    def derive(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.sum(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.conv.kernel_size[0]
        if size == 1 and not self.form.plain:
            return pointwise(x, self.conv)
        if x.shape[2] == 1 and not self.form.plain:
            return convolution(x.squeeze(2), self.kernel(), self.conv.bias, padding=size // 2).unsqueeze(2)
        if size > 1:
            x = torch.cat([x[:, :, :1]] * (size - 1) + [x], dim=2)
        return convolution(x, self.conv.weight, self.conv.bias, padding=(0, size // 2, size // 2))


class NormSiLU(nn.GroupNorm):
    """GroupNorm, then SiLU: the encoder's norm."""

    def __init__(self, groups: int, channels: int, form: VAEForm):
        super().__init__(groups, channels, eps=NORM_EPS)
        self.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = in_memory_of(self.form, x)
        return self.form.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class SpatialNormSiLU(nn.Module):
    """GroupNorm scaled and shifted by two 1x1x1 convolutions of the upsampled latent, then SiLU: the decoder's norm.

    A 1x1x1 convolution commutes with nearest upsampling: the fast form convolves at the latent's size, 64 times fewer
    pixels at the last level (and 4 times fewer frames), and leaves the upsampling to the operator.
    """

    def __init__(self, groups: int, channels: int, latent_channels: int, form: VAEForm):
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.conv_y = CausalConv(latent_channels, channels, 1, form)
        self.conv_b = CausalConv(latent_channels, channels, 1, form)
        self.form = form

    def forward(self, x: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        if self.form.plain:
            latent = upsampled(latent, tuple(x.shape[2:]))
        norm = self.norm_layer
        x, y, b = (in_memory_of(self.form, part) for part in (x, self.conv_y(latent), self.conv_b(latent)))
        return self.form.spatial_norm_silu(x, norm.weight, norm.bias, norm.num_groups, y, b, norm.eps)


class ResidualBlock(nn.Module):
    """norm1, SiLU, conv1, norm2, SiLU, conv2, plus the input; with `latent_channels` the norms are conditioned."""

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, form: VAEForm, latent_channels: int | None = None
    ):
        super().__init__()
        self.norm1 = make_norm(groups, in_channels, form, latent_channels)
        self.conv1 = CausalConv(in_channels, out_channels, 3, form)
        self.norm2 = make_norm(groups, out_channels, form, latent_channels)
        self.conv2 = CausalConv(out_channels, out_channels, 3, form)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)
        self.form = form

    def forward(self, x: torch.Tensor, *latent: torch.Tensor) -> torch.Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x, *latent)), *latent))
        if (conv := self.conv_shortcut) is None:
            return h.add_(x)
        return h.add_(convolution(x, conv.weight, conv.bias) if self.form.plain else pointwise(x, conv))


def make_norm(groups: int, channels: int, form: VAEForm, latent_channels: int | None) -> NormSiLU | SpatialNormSiLU:
    """The encoder's norm, or the decoder's where there is a latent to be conditioned on."""
    if latent_channels is None:
        return NormSiLU(groups, channels, form)
    return SpatialNormSiLU(groups, channels, latent_channels, form)


class Downsampler(nn.Module):
    """Halves rows and columns, and before that the frames where `time` says so."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time = time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.time and x.shape[2] > 1:
            odd = x.shape[2] % 2
            pairs = (x[:, :, odd::2] + x[:, :, odd + 1 :: 2]).mul_(0.5)
            x = torch.cat([x[:, :, :1], pairs], dim=2) if odd else pairs
        padded = F.pad(as_pictures(x), (0, 1, 0, 1))
        return as_clips(convolution(padded, self.conv.weight, self.conv.bias, stride=2), x.shape[0])


class Upsampler(DerivedKernel):
    """Nearest upsampling of rows and columns by two, with `time` of all frames after the first too; then a convolution.

    The fast form convolves a frame before it is repeated in time. Upsampling by two and then convolving with k is one
    transposed convolution of stride 2, in each direction with the taps `[k2, k1 + k2, k0 + k1, k0]`: 4 products per
    element of the result, not 9.
    """

    conv: nn.Conv2d

    def __init__(self, channels: int, time: bool, form: VAEForm):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = time
        self.form = form

    def derive(self, weight: torch.Tensor) -> torch.Tensor:
        folded = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for dim in (2, 3):
            k0, k1, k2 = folded.unbind(dim)
            folded = torch.stack([k2, k1 + k2, k0 + k1, k0], dim)
        return folded.transpose(0, 1).to(weight.dtype)  # [in, out, 4, 4]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        clips, _, frames, rows, columns = x.shape
        repeated = 2 * frames - 1 if self.time else frames
        if self.form.plain:
            size = (repeated, 2 * rows, 2 * columns)
            x = upsampled(x, size) if self.time else F.interpolate(x, size)
            return as_clips(convolution(as_pictures(x), self.conv.weight, self.conv.bias, padding=1), clips)
        x = convolution(as_pictures(x), self.kernel(), self.conv.bias, stride=2, padding=1, transposed=True)
        if repeated == frames:
            return as_clips(x, clips)
        source = (torch.arange(repeated, device=x.device) + 1) // 2
        x = x.unflatten(0, (clips, frames)).permute(0, 1, 3, 4, 2).index_select(1, source)  # [N, T, H, W, C]
        return x.permute(0, 4, 1, 2, 3)


class Level(nn.Module):
    """Residual blocks, and behind them the change of size if there is one."""

    def __init__(self, resnets: Iterable[ResidualBlock], sampler: Downsampler | Upsampler | None = None):
        super().__init__()
        smaller, larger = ([sampler] if isinstance(sampler, kind) else [] for kind in (Downsampler, Upsampler))
        self.resnets = cast("Sequence[ResidualBlock]", nn.ModuleList(resnets))
        self.downsamplers = cast("Sequence[Downsampler]", nn.ModuleList(smaller))
        self.upsamplers = cast("Sequence[Upsampler]", nn.ModuleList(larger))

    def forward(self, x: torch.Tensor, *latent: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            x = resnet(x, *latent)
        for sampler in (*self.downsamplers, *self.upsamplers):
            x = sampler(x)
        return x


def reference_form(plain: bool) -> VAEForm:
    """The form that computes with the plain operators of `lavin_kernels.reference.vae`."""
    return VAEForm(plain, reference_vae.group_norm_silu, reference_vae.spatial_norm_silu)
