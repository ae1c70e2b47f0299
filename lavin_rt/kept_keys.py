"""Keys and values of a task's pairs in its file, for the speeds that make them once a task."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lavin_rt.errors import InputError
from lavin_rt.packed import padded_head_size
from lavin_rt.speeds import CONTEXT_TIME

if TYPE_CHECKING:
    from lavin_rt.networks import Network, Tensors

TENSOR, FINGERPRINT = "kept_keys", "kept_keys_fingerprint"
SAMPLES = 4096  # of every parameter: two trainings differ everywhere, and 3.4 billion values take long to read
ANEW = "make the pack again with --keep-keys, or without"


@dataclasses.dataclass(frozen=True, eq=False)
class KeptKeys:
    """What the context's frames leave in every block of one transformer.

    Attributes:
        parts: `[2 * depth, context rows, kv_heads, head_size]`, of every block in turn keys and values.
        fingerprint: `fingerprint` of the transformer.
    """

    parts: torch.Tensor
    fingerprint: str

    @classmethod
    def of(cls, network: Network, keys: Tensors) -> KeptKeys:
        """Those that `Executor.context_keys` made for one context, without what pads their heads."""
        size = network.config.head_size
        return cls(torch.stack([part[0, ..., :size].cpu() for part in keys]), fingerprint(network))

    @classmethod
    def read(cls, file, source: str) -> KeptKeys:
        """Those in an opened safetensors file; raises `InputError` for what are none."""
        parts = file.get_tensor(TENSOR).clone()
        if parts.ndim != 4 or not parts.is_floating_point() or not parts.isfinite().all():
            found = f"{str(parts.dtype).removeprefix('torch.')} {list(parts.shape)}"
            raise InputError(
                f"{source}: kept keys and values are {found}, expected finite numbers "
                f"[2 * blocks, rows, heads, head size]; {ANEW}"
            )
        return cls(parts, file.metadata().get(FINGERPRINT, ""))

    def check(self, network: Network, rows: int, source: str) -> None:
        """Refuses to be used with other weights, or for a context of another number of rows.

        Raises:
            InputError: which of these.
        """
        config = network.config
        expected = [2 * config.depth, rows, config.num_kv_heads, config.head_size]
        if list(self.parts.shape) != expected:
            raise InputError(
                f"{source}: its kept keys and values are {list(self.parts.shape)}, this model and size take "
                f"{expected}; {ANEW}"
            )
        found = fingerprint(network)
        if self.fingerprint != found:
            raise InputError(
                f"{source}: its kept keys and values belong to other weights (fingerprint {self.fingerprint[:12]}, "
                f"these have {found[:12]}); {ANEW}"
            )

    def tensors(self, network: Network) -> Tensors:
        """As `Executor.sample` takes them: on the network's device, in its dtype and with its heads' width."""
        more = padded_head_size(network.config.head_size, network.impl) - network.config.head_size
        return tuple(F.pad(self.parts.to(network.device, network.dtype), (0, more))[:, None])


def fingerprint(network: Network) -> str:
    """32 hexadecimal digits that tell transformers apart, in any dtype: a hash of a part of every parameter.

    Raises:
        InputError: the network is an artifact, whose parameters are not at hand.
    """
    from lavin_rt.context import vae_fingerprint

    if not hasattr(network, "dit"):
        raise InputError("an artifact keeps no keys and values; make and use such packs with its checkpoint")
    parts = {f"made at {CONTEXT_TIME}": torch.zeros(0)}
    for name, parameter in network.dit.named_parameters():
        values = parameter.detach().flatten()
        parts[f"{name} {list(parameter.shape)}"] = values[:: max(1, len(values) // SAMPLES)]
    return vae_fingerprint(parts)
