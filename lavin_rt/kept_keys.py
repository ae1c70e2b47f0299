"""Keys and values of a task's pairs in its file, for the speeds that make them once a task."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lavin_rt.dit.model import JDiT
from lavin_rt.dit.packed import padded_head_size
from lavin_rt.dit.prepacked import parameter_samples
from lavin_rt.errors import InputError
from lavin_rt.pictures.encoded import ANEW, KeptKeys
from lavin_rt.sampling.denoisers import Denoiser, Tensors
from lavin_rt.sampling.speeds import CONTEXT_TIME
from lavin_rt.vae.model import vae_fingerprint

NO_WEIGHTS = (
    "keys and values in a file belong to weights by their fingerprint, which an artifact does not have; make and use "
    "such packs with its checkpoint"
)


def keys_to_keep(network: Denoiser, fingerprint: str, keys: Tensors) -> KeptKeys:
    """What `Executor.context_keys` made for one context, in the plain model's order of columns and without padding,
    with the network's fingerprint.
    """
    size = network.config.head_size
    parts = torch.stack([part[0, ..., :size].cpu() for part in keys])
    if network.impl != "plain":
        parts[0::2] = _swapped(parts[0::2], size // 6, 2)
    return KeptKeys(parts, fingerprint)


def check_kept_keys(kept: KeptKeys, network: Denoiser, fingerprint: str, rows: int, source: str) -> None:
    """Refuses keys and values of other weights than this fingerprint's, or of a context of another number of rows.

    Raises:
        InputError: which of these.
    """
    config = network.config
    expected = [2 * config.depth, rows, config.num_kv_heads, config.head_size]
    if list(kept.parts.shape) != expected:
        raise InputError(
            f"{source}: its kept keys and values are {list(kept.parts.shape)}, this model and size take "
            f"{expected}; {ANEW}"
        )
    if kept.fingerprint != fingerprint:
        raise InputError(
            f"{source}: its kept keys and values belong to other weights (fingerprint {kept.fingerprint[:12]}, "
            f"these have {fingerprint[:12]}); {ANEW}"
        )


def kept_tensors(kept: KeptKeys, network: Denoiser) -> Tensors:
    """As `Executor.sample` takes them: on the network's device, in its dtype and with its heads' width."""
    size = network.config.head_size
    parts = kept.parts.to(network.device, network.dtype, copy=True)
    if network.impl != "plain":
        parts[0::2] = _swapped(parts[0::2], 2, size // 6)
    return tuple(F.pad(parts, (0, padded_head_size(size, network.impl) - size))[:, None])


def _swapped(keys: torch.Tensor, inner: int, outer: int) -> torch.Tensor:
    """Every third of a head with its two dimensions, `[inner, outer]`, exchanged: from pairs side by side, `(j, 2)`, to
    the plain model's halves, `(2, j)`, or back (see `lavin_kernels.qk_norm_rope`).
    """
    return keys.unflatten(-1, (3, inner, outer)).transpose(-1, -2).flatten(-3)


def transformer_of(network: Denoiser) -> JDiT:
    """The transformer that a network runs.

    Raises:
        InputError: it is an artifact's, whose parameters are not at hand.
    """
    dit = getattr(network, "dit", None)
    if dit is None:
        raise InputError(NO_WEIGHTS)
    return dit


def transformer_fingerprint(network: Denoiser) -> str:
    """32 hexadecimal digits that tell transformers apart, the same in float32 and in bfloat16: a hash of a part of
    every parameter.

    Raises:
        InputError: as `transformer_of`.
    """
    parts = {f"made at {CONTEXT_TIME}": torch.zeros(0)}
    for name, shape, samples in parameter_samples(transformer_of(network)):
        parts[f"{name} {list(shape)}"] = samples
    return vae_fingerprint(parts)
