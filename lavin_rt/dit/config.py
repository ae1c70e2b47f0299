"""The diffusion transformer's configuration and its presets: the published one, and smaller ones to train."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lavin_rt.errors import InputError


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of a J-DiT (LaVin-DiT, section 3.3; the values of the released weights are in `PRESETS`).

    Raises:
        InputError: a head size not divisible by 6 (3D rotary positions), heads not divisible by `kv_group`, ...
    """

    hidden_size: int
    depth: int
    num_heads: int
    kv_group: int
    patch_size: int = 2
    in_channels: int = 16

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"config: {field.name} is {value!r}, expected a positive integer")
        if self.patch_size != 2:
            raise InputError(f"config: patch_size is {self.patch_size}, this architecture has 2")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"config: hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; "
                "correct the checkpoint's config"
            )
        if self.head_size % 6:
            raise InputError(
                f"config: head size {self.head_size} (hidden_size {self.hidden_size} / num_heads {self.num_heads}) "
                "is not divisible by 6, which 3D rotary positions need; correct the checkpoint's config"
            )
        if self.num_heads % self.kv_group:
            raise InputError(
                f"config: num_heads {self.num_heads} is not divisible by kv_group {self.kv_group}; "
                "correct the checkpoint's config"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads // self.kv_group

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_size

    @property
    def mlp_size(self) -> int:
        """Inner width of the SwiGLU, `64 * floor(4 D * 2 / 3 / 64)`."""
        return 64 * (4 * self.hidden_size * 2 // 3 // 64)

    @property
    def patch_features(self) -> int:
        """Features of one patch: `patch_size ** 2 * in_channels`."""
        return self.patch_size**2 * self.in_channels

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> DiTConfig:
        """Reads a checkpoint's config; unknown keys are ignored, missing ones are an `InputError` naming `source`."""
        names = [field.name for field in dataclasses.fields(cls)]
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise InputError(f"{source}: the config lacks {', '.join(missing)}; expected {', '.join(required)}")
        try:
            return cls(**{name: values[name] for name in names if name in values})
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


PRESETS = {
    "lavin-dit-3.4b": DiTConfig(hidden_size=2304, depth=22, num_heads=32, kv_group=4),
    # Sized by this package to the totals that the paper gives; its own shapes of these are not public.
    "lavin-dit-1b": DiTConfig(hidden_size=1440, depth=17, num_heads=20, kv_group=4),
    "lavin-dit-0.3b": DiTConfig(hidden_size=864, depth=14, num_heads=12, kv_group=4),
    "lavin-dit-0.1b": DiTConfig(hidden_size=576, depth=10, num_heads=8, kv_group=4),
}


def preset(name: str) -> DiTConfig:
    """The configuration of that name."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
