"""Run LaVin-DiT: official checkpoints in, pictures out.

Names are imported when first used, so that `import lavin_rt` and `lavin-rt --help` do not wait for torch.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "Cancelled": "errors",
    "DiTConfig": "config",
    "EncodedContext": "context",
    "InputError": "errors",
    "JDiT": "model",
    "NonFiniteError": "errors",
    "PRESETS": "config",
    "Pipeline": "pipeline",
    "SPEEDS": "speeds",
    "STVAE": "vae",
    "Speed": "speeds",
    "Task": "pipeline",
    "find_checkpoint": "checkpoint",
    "load_dit": "checkpoint",
    "load_vae": "checkpoint",
    "randomize_": "model",
    "sample": "sampler",
    "save_dit": "checkpoint",
    "save_vae": "checkpoint",
    "schedule": "knots",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("lavin-rt")
    if name not in _HOMES:
        raise AttributeError(f"module 'lavin_rt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lavin_rt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
