"""The ST-VAE: pictures and clips to latents and back (LaVin-DiT, arXiv 2411.11505, section 3.2)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

import lavin_kernels
from lavin_rt.errors import InputError, listed
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.layers import (
    CausalConv,
    Downsampler,
    Level,
    NormSiLU,
    ResidualBlock,
    SpatialNormSiLU,
    Upsampler,
    VAEForm,
    in_memory_of,
    reference_form,
)
from lavin_rt.vae.tiling import PIXELS, Axis, blended, decode_axes, encode_axes

LATENT_SHIFT = 0.032470703125
LATENT_SCALE = 1.08936170213
TIME_LEVELS = 2  # of the levels, which all but the last halve (or double) rows and columns, halve frames as well
SOUND_CUDNN = 91500  # 9.15.0, as PyTorch numbers it
NAMED_TENSORS = 8  # so many are named in an error


def scale_latents(latents: torch.Tensor) -> torch.Tensor:
    """What the encoder gives, as the diffusion transformer takes it: `(latents - LATENT_SHIFT) * LATENT_SCALE`."""
    return (latents - LATENT_SHIFT) * LATENT_SCALE


def unscale_latents(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `scale_latents`: what the decoder takes."""
    return latents / LATENT_SCALE + LATENT_SHIFT


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """The encoder's answer: a diagonal Gaussian over raw (unscaled) latents.

    Attributes:
        mean, logvar: `[N, latent channels, t, h, w]`; the log-variance clamped to [-30, 20].
    """

    mean: torch.Tensor
    logvar: torch.Tensor

    def mode(self) -> torch.Tensor:
        """The mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """A draw; its noise is made on the CPU in float32, so that a seed means the same on every device."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32)
        deviation = torch.exp(0.5 * self.logvar.float())
        return (self.mean.float() + deviation * noise.to(self.mean.device)).to(self.mean.dtype)


class Encoder(nn.Module):
    """Pixels `[N, 3, T, H, W]` to moments `[N, 2 * latent channels, t, H // 8, W // 8]`, mean then log-variance."""

    def __init__(self, config: VAEConfig, form: VAEForm):
        super().__init__()
        groups, widths = config.norm_num_groups, config.block_out_channels
        self.form = form
        self.conv_in = CausalConv(3, widths[0], 3, form)
        self.down_blocks = cast("list[Level]", nn.ModuleList())
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            resnets = [
                ResidualBlock(width if layer else before, width, groups, form)
                for layer in range(config.layers_per_block)
            ]
            smaller = Downsampler(width, time=level < TIME_LEVELS) if level < len(widths) - 1 else None
            self.down_blocks.append(Level(resnets, smaller))
        self.mid_block = Level([ResidualBlock(widths[-1], widths[-1], groups, form) for _ in range(2)])
        self.norm_out = NormSiLU(groups, widths[-1], form)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, 3, form)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(in_memory_of(self.form, pixels))
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid_block(x))).contiguous()


class Decoder(nn.Module):
    """Latents `[N, latent channels, t, h, w]` to pixels `[N, 3, 1 + 4 (t - 1), 8 h, 8 w]`."""

    def __init__(self, config: VAEConfig, form: VAEForm):
        super().__init__()
        groups, widths, latent = config.norm_num_groups, config.block_out_channels[::-1], config.latent_channels
        self.form = form
        self.conv_in = CausalConv(latent, widths[0], 3, form)
        self.mid_block = Level([ResidualBlock(widths[0], widths[0], groups, form, latent) for _ in range(2)])
        self.up_blocks = cast("list[Level]", nn.ModuleList())
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            resnets = [
                ResidualBlock(width if layer else before, width, groups, form, latent)
                for layer in range(config.layers_per_block + 1)
            ]
            larger = Upsampler(width, level < TIME_LEVELS, form) if level < len(widths) - 1 else None
            self.up_blocks.append(Level(resnets, larger))
        self.norm_out = SpatialNormSiLU(groups, widths[-1], latent, form)
        self.conv_out = CausalConv(widths[-1], 3, 3, form)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        latents = in_memory_of(self.form, latents)
        x = self.mid_block(self.conv_in(latents), latents)
        for level in self.up_blocks:
            x = level(x, latents)
        return self.conv_out(self.norm_out(x, latents)).contiguous()


class STVAE(nn.Module):
    """The ST-VAE. `encode` and `decode` are raw: latent scaling is the caller's (`scale_latents`).

    Args:
        config: the network's shape.
        impl: how to compute the one function: "plain" (3D convolutions on every input, upsampling before what follows
            it), "torch" (the exact savings described in `lavin_rt.vae.layers`, with the plain operators) or "triton"
            (the same with the kernels of `lavin_kernels`). `in_form` gives the others.
    """

    def __init__(self, config: VAEConfig, impl: str = "torch"):
        super().__init__()
        self.config = config
        self.impl = impl
        self.form = _form(impl)
        self.encoder = Encoder(config, self.form)
        self.decoder = Decoder(config, self.form)

    def in_form(self, impl: str) -> STVAE:
        """This network computing by `impl` ("plain", "torch" or "triton"): itself, or another on the same parameters.

        Whatever changes this one's parameters, a move or an optimiser, changes the other's.
        """
        if impl == self.impl:
            return self
        with torch.device("meta"):
            view = STVAE(self.config, impl)
        for mine, its in zip(self.modules(), view.modules(), strict=True):
            its._parameters = mine._parameters
        return view.train(self.training)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        impl: str = "torch",
    ) -> tuple[STVAE, list[str]]:
        """The network with a checkpoint's weights, for inference: no parameter wants a gradient.

        Args:
            state_dict: tensors by their published names; those that need no cast or move are taken, not copied.
            dtype, device: of the network.
            impl: see `STVAE`.

        Returns:
            The network, and the names of tensors that are not the ST-VAE's.

        Raises:
            InputError: tensors are missing or have another shape than the network's; all in one line.
        """
        with torch.device("meta"):
            vae = cls(VAEConfig.from_state_dict(state_dict), impl)
        expected = vae.state_dict()
        missing = [name for name in expected if name not in state_dict]
        misshapen = [
            f"{name} {list(state_dict[name].shape)} for {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state_dict and state_dict[name].shape != tensor.shape
        ]
        faults = abbreviated("missing", missing) + abbreviated("of another shape", misshapen)
        if faults:
            raise InputError(f"ST-VAE weights do not fit {vae.config}: {'; '.join(faults)}")
        vae.load_state_dict({name: state_dict[name].to(device, dtype) for name in expected}, assign=True)
        return vae.requires_grad_(False).eval(), [name for name in state_dict if name not in expected]

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.conv_in.conv.weight.device

    @property
    def fingerprint(self) -> str:
        """Hash of the tensors, which an encoded context carries (`vae_fingerprint`)."""
        return vae_fingerprint(self.state_dict())

    def encode(
        self,
        pixels: torch.Tensor,
        *,
        tile: int | str | None = None,
        chunk: int | None = None,
        batch: int | None = None,
    ) -> Posterior:
        """The posterior over latents of pictures or clips.

        Args:
            pixels: `[N, 3, T, H, W]` in [-1, 1], any float dtype and device; T at least 1, H and W at least 8.
            tile, chunk: as in `decode`, approximate. What is cut has H and W multiples of 8 and `1 + 4 k` frames.
            batch: items per pass, exact; all by default.

        Returns:
            `Posterior` of `[N, latent channels, t, H // 8, W // 8]` in the network's dtype; `1 + 4 k` frames become
            `t = 1 + k`, other numbers what halving twice leaves, the first frame kept apart where the number is odd.

        Raises:
            InputError: another shape, an empty one, or sizes that cannot be cut.
        """
        self._check(pixels, "pixels", 3, PIXELS)
        moments = self._run(self.encoder, pixels, encode_axes(pixels.shape, tile, chunk), batch)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(
        self,
        latents: torch.Tensor,
        *,
        tile: int | str | None = None,
        chunk: int | None = None,
        batch: int | None = None,
    ) -> torch.Tensor:
        """The pictures or clips of raw latents.

        `tile` and `chunk` bound the memory of large pictures and long clips, and are approximate: every piece is
        normalised by its own statistics (the group norms of the whole read all of it) and sees nothing beyond its
        edges, a chunk nothing before it but its overlap. Pieces overlap by a quarter (chunks by two latent frames at
        least) and are blended linearly. Nothing is cut unless asked for; one piece that covers everything is exact.

        Args:
            latents: `[N, latent channels, t, h, w]`, any float dtype and device.
            tile: side of a tile in latent rows and columns (8 pixels each), at least 4, or "auto": `auto_tile` of
                `lavin_rt.vae.tiling`, which cuts pictures of more than 1024 pixels a side.
            chunk: latent frames per piece (4 frames each), at least 3.
            batch: items per pass, exact; all by default.

        Returns:
            `[N, 3, 1 + 4 (t - 1), 8 h, 8 w]` in the network's dtype, in [-1, 1] but for overshoot.

        Raises:
            InputError: another shape, an empty one, or a tile or chunk too small.
        """
        self._check(latents, "latents", self.config.latent_channels, 1)
        return self._run(self.decoder, latents, decode_axes(latents.shape, tile, chunk), batch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The reconstruction from the posterior's mean."""
        return self.decode(self.encode(pixels).mode())

    def _check(self, x: torch.Tensor, name: str, channels: int, least: int) -> None:
        expected = f"expected float [N, {channels}, frames, rows, columns]"
        if x.ndim != 5 or x.shape[1] != channels or not x.is_floating_point():
            raise InputError(f"VAE {name} are {x.dtype} {list(x.shape)}, {expected}")
        if min(x.shape) < 1 or min(x.shape[3:]) < least:
            raise InputError(
                f"VAE {name} are {list(x.shape)}, {expected}, at least one of each and {least} rows and columns"
            )

    def _run(self, network: nn.Module, x: torch.Tensor, axes: list[Axis] | None, batch: int | None) -> torch.Tensor:
        if batch is not None and batch < 1:
            raise InputError(f"batch is {batch}, expected at least 1")

        def run(part: torch.Tensor) -> torch.Tensor:
            return network(part.to(self.device, self.dtype))

        if x.shape[2] > 1:
            warn_of_slow_clips(self.dtype, self.device)
        parts = x.split(batch or x.shape[0])
        results = [run(part) if axes is None else blended(run, part, axes) for part in parts]
        return results[0] if len(results) == 1 else torch.cat(results)


def _form(impl: str) -> VAEForm:
    """
    Raises:
        InputError: no such way to compute.
    """
    if impl == "triton":
        return VAEForm(False, lavin_kernels.group_norm_silu, lavin_kernels.spatial_norm_silu)
    if impl in ("plain", "torch"):
        return reference_form(plain=impl == "plain")
    raise InputError(f"impl is {impl!r}, expected 'plain', 'torch' or 'triton'")


def abbreviated(what: str, names: list[str]) -> list[str]:
    """One piece of an error message for `names`, none if there are none."""
    if not names:
        return []
    return [f"{len(names)} {what}: {listed(names, NAMED_TENSORS)}"]


def warn_of_slow_clips(dtype: torch.dtype, device: torch.device) -> None:
    """Says, where it is so, that 3D convolutions in 16 bits are slow and take many times the memory: torch 2.9 runs
    none of cuDNN's before 9.15. Pictures need none.
    """
    if device.type != "cuda" or dtype == torch.float32 or not torch.__version__.startswith("2.9."):
        return
    found = torch.backends.cudnn.version() or 0
    if found < SOUND_CUDNN:
        warnings.warn(
            f"torch {torch.__version__} with cuDNN {found} convolves clips in {dtype} slowly and with much memory; "
            "install torch 2.10 or newer, or cuDNN 9.15 or newer",
            stacklevel=2,
        )


def vae_fingerprint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """32 hexadecimal digits that tell VAEs apart: SHA-256 over names, shapes and bfloat16 values of the tensors.

    Names are sorted, so the kind of file and the order in it do not matter. Rounded to bfloat16, the same weights have
    one fingerprint whether they run in float32 or in bfloat16. Tensors are read one by one.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        values = tensor.detach().to("cpu", torch.bfloat16).contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
